/* GATHER: the columns of one row in the order of an index vector. */
#include "kernels/kernels.h"

void hb_gather_scalar(const float *x, const uint32_t *index, uint32_t n, float *y) {
    for (uint32_t j = 0; j < n; j++) y[j] = x[index[j]];
}
