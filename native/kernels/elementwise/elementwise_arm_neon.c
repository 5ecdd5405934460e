#include "kernels/elementwise/elementwise.inc"
