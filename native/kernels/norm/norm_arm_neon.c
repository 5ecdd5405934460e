#include "kernels/norm/norm.inc"
