#include "kernels/kv_put/kv_put.inc"
