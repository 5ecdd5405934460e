#include "kernels/linear/linear_float.inc"
