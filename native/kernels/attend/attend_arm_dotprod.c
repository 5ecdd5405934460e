#include "kernels/attend/attend.inc"
