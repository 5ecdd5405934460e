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

/* The first four steps, on 16 columns. */
#if defined(HB_AVX512)
HB_INLINE v16 hb_butterfly(v16 a, v16 b, const int minus) { /* of lanes in `minus`, a - b */
    return _mm512_mask_sub_ps(_mm512_add_ps(a, b), (__mmask16)minus, a, b);
}
HB_INLINE void butterflies_16(float *y) {
    v16 x = v16_load(y);
    x = hb_butterfly(_mm512_moveldup_ps(x), _mm512_movehdup_ps(x), 0xaaaa);
    x = hb_butterfly(_mm512_shuffle_ps(x, x, 0x44), _mm512_shuffle_ps(x, x, 0xee), 0xcccc);
    x = hb_butterfly(_mm512_shuffle_f32x4(x, x, 0xa0), _mm512_shuffle_f32x4(x, x, 0xf5), 0xf0f0);
    x = hb_butterfly(_mm512_shuffle_f32x4(x, x, 0x44), _mm512_shuffle_f32x4(x, x, 0xee), 0xff00);
    v16_store(y, x);
}
#elif defined(__AVX2__)
HB_INLINE __m256 hb_butterflies_8(__m256 x) {
    __m256 a = _mm256_moveldup_ps(x), b = _mm256_movehdup_ps(x);
    x = _mm256_blend_ps(_mm256_add_ps(a, b), _mm256_sub_ps(a, b), 0xaa);
    a = _mm256_shuffle_ps(x, x, 0x44), b = _mm256_shuffle_ps(x, x, 0xee);
    x = _mm256_blend_ps(_mm256_add_ps(a, b), _mm256_sub_ps(a, b), 0xcc);
    a = _mm256_permute2f128_ps(x, x, 0x00), b = _mm256_permute2f128_ps(x, x, 0x11);
    return _mm256_blend_ps(_mm256_add_ps(a, b), _mm256_sub_ps(a, b), 0xf0);
}
HB_INLINE void butterflies_16(float *y) {
    const __m256 a = hb_butterflies_8(_mm256_loadu_ps(y)), b = hb_butterflies_8(_mm256_loadu_ps(y + 8));
    v16_store(y, HB_V16(_mm256_add_ps(a, b), _mm256_sub_ps(a, b)));
}
#else
HB_INLINE void butterflies_16(float *y) {
    for (uint32_t h = 1; h < 16; h *= 2) butterflies(y, 16, h);
}
#endif

/* Every run of `dim` columns times the Hadamard matrix in Sylvester's order, over sqrt(dim). */
HB_OUTLINE void hadamard_runs(float *y, uint32_t width, uint32_t dim) {
    const float scale = (float)(1.0 / sqrt((double)dim));
    for (float *run = y; run < y + width; run += dim) {
        uint32_t apart = 1;
        if (dim >= 16) { /* four steps on 16 columns at a time */
            for (uint32_t i = 0; i < dim; i += 16) butterflies_16(run + i);
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
HB_OUTLINE void flip_signs(float *y, uint32_t n, uint64_t seed) {
    for (uint32_t i = 0; i < n; i += 64) {
        uint64_t z = seed + (i / 64 + 1) * 0x9e3779b97f4a7c15ull;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        z ^= z >> 31;
        uint32_t j = i;
        for (; j + 16 <= n && j < i + 64; j += 16) {
            static const int32_t to_sign[16] = {INT32_MIN, 1 << 30, 1 << 29, 1 << 28, 1 << 27, 1 << 26,
                                                1 << 25,   1 << 24, 1 << 23, 1 << 22, 1 << 21, 1 << 20,
                                                1 << 19,   1 << 18, 1 << 17, 1 << 16};
            const vi16 bits = vi16_mul(vi16_set1((int32_t)(z >> (j - i) & 0xffff)), vi16_load(to_sign));
            const vi16 one = vi16_add(vi16_and(bits, vi16_set1(INT32_MIN)), vi16_set1(0x3f800000));
            v16_store(y + j, v16_mul(v16_load(y + j), v16_as_float(one)));
        }
        for (; j < n && j < i + 64; j++)
            y[j] = hb_from_bits(hb_to_bits(y[j]) ^ (uint32_t)(z >> (j - i) & 1) << 31);
    }
}

HB_INLINE void rotate(float *y, uint32_t n, uint64_t seed) {
    flip_signs(y, n, seed);
    hadamard_runs(y, n, n & (0 - n));
}
HB_INLINE void unrotate(float *y, uint32_t n) {
    hadamard_runs(y, n, n & (0 - n));
    flip_signs(y, n, HB_SIGN_SEED);
}

/* The values of scale bytes. */
HB_INLINE v16 v16_load_e5m3(const uint8_t *p) {
    const vi16 code = vi16_load_u8(p);
    const vi16 bits = vi16_shl(vi16_add(code, vi16_set1((127 - HB_E5M3_BIAS) << 3)), 20);
    return v16_keep_nonzero(code, v16_as_float(bits));
}

#endif
