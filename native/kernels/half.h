/* Exact scalar arithmetic that a baseline machine may lack: binary16, bfloat16 and a true fused multiply-add.
 */
#ifndef HB_HALF_H
#define HB_HALF_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(HB_SMALL) /* a fallback of machines that always have better: bytes count, time does not */
#define HB_INLINE static __attribute__((unused))
#else
#define HB_INLINE static inline __attribute__((always_inline, unused))
#endif
#define HB_OUTLINE \
    static __attribute__((noinline, unused)) /* tails: rare, and large where there are no masks */

/* Loops over register arrays, which must be unrolled to live in registers; scalar code has none to fill. */
#if !defined(__AVX2__) && !defined(HB_NEON)
#define HB_UNROLL
#elif defined(__clang__)
#define HB_UNROLL _Pragma("unroll")
#else
#define HB_UNROLL _Pragma("GCC unroll 16")
#endif

HB_INLINE float hb_from_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

HB_INLINE uint32_t hb_to_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

HB_INLINE float hb_from_bf16(uint16_t h) { return hb_from_bits((uint32_t)h << 16); }

HB_INLINE float hb_from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00)
        return hb_from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13 | (rest > 0x7c00 ? 0x400000 : 0));
    /* 2^112 moves the exponent; it also normalises subnormals, exactly */
    float f = hb_from_bits(rest << 13) * hb_from_bits((uint32_t)(127 + 112) << 23);
    return hb_from_bits(hb_to_bits(f) | sign);
}

/* Round to nearest even; overflow to infinity; NaN stays NaN. */
HB_INLINE uint16_t hb_to_f16(float f) {
    uint32_t bits = hb_to_bits(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x3ff));
    if (rest >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) {
        /* subnormal: adding 1/2 makes the unit in the last place of a float that of a half */
        float shifted = hb_from_bits(rest) + 0.5f;
        return (uint16_t)(sign | (hb_to_bits(shifted) - 0x3f000000));
    }
    rest += 0xfff + (rest >> 13 & 1);
    return (uint16_t)(sign | (rest - 0x38000000) >> 13);
}

/* A true fused multiply-add on every machine. Without the instruction: the product is exact in double, the
 * sum is rounded to odd, so that the final rounding is the only one (Boldo and Melquiond, 2008). */
HB_INLINE float hb_fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    double p = (double)a * b, s = p + c, t = s - p, e = (p - (s - t)) + (c - t);
    int64_t bits;
    memcpy(&bits, &s, 8);
    int64_t inexact = (e < 0) | (e > 0), outward = (e > 0) == (s > 0);
    bits += (inexact & ~bits & 1) * (2 * outward - 1);
    memcpy(&s, &bits, 8);
    return (float)s;
#endif
}

#endif
