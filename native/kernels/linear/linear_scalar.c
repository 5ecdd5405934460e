#include "kernels/linear/linear_codes.inc"
#include "kernels/linear/linear_float.inc"
