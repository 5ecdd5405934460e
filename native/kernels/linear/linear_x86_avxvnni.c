#include "kernels/linear/linear_codes.inc"
