#include "kernels/quantize/quantize.inc"
