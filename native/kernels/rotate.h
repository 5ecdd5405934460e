/* Hadamard transforms, and the rotation of stored keys and values (SPEC.md section 10.5). Columns 1, 2, 4 ...
 * apart are added and subtracted, in that order on every instruction set, so that all give the same bits. */
#ifndef HB_ROTATE_H
#define HB_ROTATE_H

#include "halfbyte_ops.h"
#include "kernels/v16.h"

HB_INLINE void butterflies(float *y, const uint32_t n, const uint32_t apart) {
    for (uint32_t i = 0; i < n; i += 2 * apart)
        for (uint32_t j = i; j < i + apart; j++) {
            const float a = y[j], b = y[j + apart];
            y[j] = a + b, y[j + apart] = a - b;
        }
}

/* Every run of `dim` columns times the Hadamard matrix in Sylvester's order, over sqrt(dim). */
HB_OUTLINE void hadamard_runs(float *y, uint32_t width, uint32_t dim) {
    const float scale = (float)(1.0 / sqrt((double)dim));
    for (float *run = y; run < y + width; run += dim) {
        uint32_t apart = 1;
        if (dim >= 16) { /* four steps on 16 columns at a time */
            for (uint32_t i = 0; i < dim; i += 16)
                for (uint32_t h = 1; h < 16; h *= 2) butterflies(run + i, 16, h);
            apart = 16;
        }
        for (; apart < dim && apart < 16; apart *= 2) butterflies(run, dim, apart);
        for (; apart < dim; apart *= 2)
            for (uint32_t i = 0; i < dim; i += 2 * apart)
                for (uint32_t j = i; j < i + apart; j += 16) {
                    v16 a = v16_load(run + j), b = v16_load(run + j + apart);
                    v16_store(run + j, v16_add(a, b));
                    v16_store(run + j + apart, v16_sub(a, b));
                }
    }
    for (uint32_t i = 0; i < width; i++) y[i] *= scale;
}

/* Bit i % 64 of number i / 64 of splitmix64 says whether column i changes its sign. */
HB_OUTLINE void flip_signs(float *y, uint32_t n) {
    for (uint32_t i = 0; i < n; i += 64) {
        uint64_t z = HB_SIGN_SEED + (i / 64 + 1) * 0x9e3779b97f4a7c15ull;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        z ^= z >> 31;
        for (uint32_t j = i; j < n && j < i + 64; j++)
            y[j] = hb_from_bits(hb_to_bits(y[j]) ^ (uint32_t)(z >> (j - i) & 1) << 31);
    }
}

HB_INLINE void rotate(float *y, uint32_t n) {
    flip_signs(y, n);
    hadamard_runs(y, n, n & (0 - n));
}
HB_INLINE void unrotate(float *y, uint32_t n) {
    hadamard_runs(y, n, n & (0 - n));
    flip_signs(y, n);
}

/* The values of scale bytes. */
HB_INLINE v16 v16_load_e5m3(const uint8_t *p) {
    const vi16 code = vi16_load_u8(p);
    const vi16 bits = vi16_shl(vi16_add(code, vi16_set1((127 - HB_E5M3_BIAS) << 3)), 20);
    return v16_keep_nonzero(code, v16_as_float(bits));
}

#endif
