#include "kernels/rope/rope.inc"
