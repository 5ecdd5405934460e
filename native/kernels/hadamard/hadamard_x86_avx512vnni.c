#include "kernels/hadamard/hadamard.inc"
