/* v16: sixteen floats, and vi16: sixteen int32, by the widest registers the file is compiled for. Every
 * operation is defined lane by lane and every reduction has one order, so that a kernel written with these
 * gives the same bits on every instruction set. */
#ifndef HB_V16_H
#define HB_V16_H

#include "kernels/half.h"

#define HB_CAT2(a, b) a##_##b
#define HB_CAT(a, b) HB_CAT2(a, b)

#if defined(__AVX512F__) && !defined(HB_AVX512VLVNNI)
#define HB_AVX512 1
#include <immintrin.h>
#define HB_ISA avx512vnni

typedef __m512 v16;
typedef __m512i vi16;

HB_INLINE __mmask16 v16_mask(uint32_t n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }
HB_INLINE v16 v16_zero(void) { return _mm512_setzero_ps(); }
HB_INLINE v16 v16_set1(float x) { return _mm512_set1_ps(x); }
HB_INLINE v16 v16_load(const float *p) { return _mm512_loadu_ps(p); }
HB_INLINE v16 v16_load_n(const float *p, uint32_t n) { return _mm512_maskz_loadu_ps(v16_mask(n), p); }
HB_INLINE void v16_store(float *p, v16 a) { _mm512_storeu_ps(p, a); }
HB_INLINE void v16_store_n(float *p, v16 a, uint32_t n) { _mm512_mask_storeu_ps(p, v16_mask(n), a); }
HB_INLINE v16 v16_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
HB_INLINE v16 v16_sub(v16 a, v16 b) { return _mm512_sub_ps(a, b); }
HB_INLINE v16 v16_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
HB_INLINE v16 v16_div(v16 a, v16 b) { return _mm512_div_ps(a, b); }
HB_INLINE v16 v16_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }
HB_INLINE v16 v16_max(v16 a, v16 b) { return _mm512_max_ps(a, b); } /* b when either is NaN */
HB_INLINE v16 v16_min(v16 a, v16 b) { return _mm512_min_ps(a, b); }
HB_INLINE v16 v16_abs(v16 a) { return _mm512_abs_ps(a); }
HB_INLINE v16 v16_copysign(v16 a, v16 sign) {
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(a), _mm512_castps_si512(sign),
                                                         _mm512_set1_epi32(INT32_MIN), 0xd8));
}
HB_INLINE v16 v16_select_lt(v16 a, v16 b, v16 yes, v16 no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
HB_INLINE v16 v16_rint(v16 a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
HB_INLINE v16 v16_pow2(v16 n) { /* 2^n of integers -126..127 */
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
HB_INLINE v16 v16_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
HB_INLINE void v16_store_f16(uint16_t *p, v16 a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
HB_INLINE v16 v16_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
HB_INLINE float v16_sum(v16 a) {
    __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

HB_INLINE float v16_top(v16 a) { /* the largest lane */
    __m256 b = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

HB_INLINE vi16 vi16_zero(void) { return _mm512_setzero_si512(); }
HB_INLINE vi16 vi16_set1(int32_t x) { return _mm512_set1_epi32(x); }
HB_INLINE vi16 vi16_load(const int32_t *p) { return _mm512_loadu_si512(p); }
HB_INLINE void vi16_store(int32_t *p, vi16 a) { _mm512_storeu_si512(p, a); }
HB_INLINE vi16 vi16_load_u8(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
}
HB_INLINE vi16 vi16_add(vi16 a, vi16 b) { return _mm512_add_epi32(a, b); }
HB_INLINE vi16 vi16_sub(vi16 a, vi16 b) { return _mm512_sub_epi32(a, b); }
HB_INLINE vi16 vi16_mul(vi16 a, vi16 b) { return _mm512_mullo_epi32(a, b); }
HB_INLINE vi16 vi16_and(vi16 a, vi16 b) { return _mm512_and_si512(a, b); }
HB_INLINE vi16 vi16_shl(vi16 a, int n) { return _mm512_slli_epi32(a, (unsigned)n); }
HB_INLINE vi16 vi16_shr(vi16 a, int n) { return _mm512_srli_epi32(a, (unsigned)n); }
HB_INLINE int32_t vi16_sum(vi16 a) { return _mm512_reduce_add_epi32(a); }
HB_INLINE void vi16_store_i8(int8_t *p, vi16 a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a)); }
HB_INLINE vi16 vi16_round(v16 a) { return _mm512_cvtps_epi32(a); } /* half to even */
HB_INLINE v16 v16_from_int(vi16 a) { return _mm512_cvtepi32_ps(a); }
HB_INLINE v16 v16_as_float(vi16 a) { return _mm512_castsi512_ps(a); }
HB_INLINE vi16 v16_bits(v16 a) { return _mm512_castps_si512(a); }
HB_INLINE v16 v16_keep_nonzero(vi16 test, v16 a) { /* 0 where test is 0 */
    return _mm512_maskz_mov_ps(_mm512_test_epi32_mask(test, test), a);
}

#elif defined(__AVX2__)
#include <immintrin.h>
#if defined(HB_AVX512VLVNNI)
#define HB_ISA avx512vlvnni
#elif defined(__AVXVNNI__)
#define HB_ISA avxvnni
#else
#define HB_ISA avx2
#endif

typedef struct {
    __m256 l, h;
} v16;
typedef struct {
    __m256i l, h;
} vi16;

#define HB_V16(expr_l, expr_h) ((v16){(expr_l), (expr_h)})
#define HB_VI16(expr_l, expr_h) ((vi16){(expr_l), (expr_h)})
HB_INLINE v16 v16_zero(void) { return HB_V16(_mm256_setzero_ps(), _mm256_setzero_ps()); }
HB_INLINE v16 v16_set1(float x) { return HB_V16(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
HB_INLINE v16 v16_load(const float *p) { return HB_V16(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
HB_INLINE void v16_store(float *p, v16 a) {
    _mm256_storeu_ps(p, a.l);
    _mm256_storeu_ps(p + 8, a.h);
}
HB_INLINE v16 v16_load_n(const float *p, uint32_t n) {
    static const int32_t mask[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    const __m256i *of = (const __m256i *)(const void *)(mask + 16 - (n < 16 ? n : 16));
    return HB_V16(_mm256_maskload_ps(p, _mm256_loadu_si256(of)),
                  _mm256_maskload_ps(p + 8, _mm256_loadu_si256(of + 1)));
}
HB_OUTLINE void v16_store_n(float *p, v16 a, uint32_t n) {
    float t[16];
    v16_store(t, a);
    for (uint32_t i = 0; i < 16 && i < n; i++) p[i] = t[i];
}
HB_INLINE v16 v16_add(v16 a, v16 b) { return HB_V16(_mm256_add_ps(a.l, b.l), _mm256_add_ps(a.h, b.h)); }
HB_INLINE v16 v16_sub(v16 a, v16 b) { return HB_V16(_mm256_sub_ps(a.l, b.l), _mm256_sub_ps(a.h, b.h)); }
HB_INLINE v16 v16_mul(v16 a, v16 b) { return HB_V16(_mm256_mul_ps(a.l, b.l), _mm256_mul_ps(a.h, b.h)); }
HB_INLINE v16 v16_div(v16 a, v16 b) { return HB_V16(_mm256_div_ps(a.l, b.l), _mm256_div_ps(a.h, b.h)); }
HB_INLINE v16 v16_fma(v16 a, v16 b, v16 c) {
    return HB_V16(_mm256_fmadd_ps(a.l, b.l, c.l), _mm256_fmadd_ps(a.h, b.h, c.h));
}
HB_INLINE v16 v16_max(v16 a, v16 b) { return HB_V16(_mm256_max_ps(a.l, b.l), _mm256_max_ps(a.h, b.h)); }
HB_INLINE v16 v16_min(v16 a, v16 b) { return HB_V16(_mm256_min_ps(a.l, b.l), _mm256_min_ps(a.h, b.h)); }
HB_INLINE v16 v16_abs(v16 a) {
    __m256 s = _mm256_set1_ps(-0.0f);
    return HB_V16(_mm256_andnot_ps(s, a.l), _mm256_andnot_ps(s, a.h));
}
HB_INLINE v16 v16_copysign(v16 a, v16 sign) {
    __m256 s = _mm256_set1_ps(-0.0f);
    return HB_V16(_mm256_or_ps(_mm256_andnot_ps(s, a.l), _mm256_and_ps(s, sign.l)),
                  _mm256_or_ps(_mm256_andnot_ps(s, a.h), _mm256_and_ps(s, sign.h)));
}
HB_INLINE v16 v16_select_lt(v16 a, v16 b, v16 yes, v16 no) {
    return HB_V16(_mm256_blendv_ps(no.l, yes.l, _mm256_cmp_ps(a.l, b.l, _CMP_LT_OQ)),
                  _mm256_blendv_ps(no.h, yes.h, _mm256_cmp_ps(a.h, b.h, _CMP_LT_OQ)));
}
HB_INLINE v16 v16_rint(v16 a) {
    return HB_V16(_mm256_round_ps(a.l, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                  _mm256_round_ps(a.h, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
HB_INLINE __m256 hb_pow2_8(__m256 n) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
HB_INLINE v16 v16_pow2(v16 n) { return HB_V16(hb_pow2_8(n.l), hb_pow2_8(n.h)); }
HB_INLINE v16 v16_load_f16(const uint16_t *p) {
    return HB_V16(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                  _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8))));
}
HB_INLINE void v16_store_f16(uint16_t *p, v16 a) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a.l, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(a.h, _MM_FROUND_TO_NEAREST_INT));
}
HB_INLINE __m256 hb_bf16_8(const uint16_t *p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
HB_INLINE v16 v16_load_bf16(const uint16_t *p) { return HB_V16(hb_bf16_8(p), hb_bf16_8(p + 8)); }
HB_INLINE float v16_sum(v16 a) {
    __m256 b = _mm256_add_ps(a.l, a.h);
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
HB_INLINE float v16_top(v16 a) { /* the largest lane */
    __m256 b = _mm256_max_ps(a.l, a.h);
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

HB_INLINE vi16 vi16_zero(void) { return HB_VI16(_mm256_setzero_si256(), _mm256_setzero_si256()); }
HB_INLINE vi16 vi16_set1(int32_t x) { return HB_VI16(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
HB_INLINE vi16 vi16_load(const int32_t *p) {
    return HB_VI16(_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 8)));
}
HB_INLINE void vi16_store(int32_t *p, vi16 a) {
    _mm256_storeu_si256((__m256i *)p, a.l);
    _mm256_storeu_si256((__m256i *)(p + 8), a.h);
}
HB_INLINE vi16 vi16_load_u8(const uint8_t *p) {
    __m128i b = _mm_loadu_si128((const __m128i *)p);
    return HB_VI16(_mm256_cvtepu8_epi32(b), _mm256_cvtepu8_epi32(_mm_srli_si128(b, 8)));
}
HB_INLINE vi16 vi16_add(vi16 a, vi16 b) {
    return HB_VI16(_mm256_add_epi32(a.l, b.l), _mm256_add_epi32(a.h, b.h));
}
HB_INLINE vi16 vi16_sub(vi16 a, vi16 b) {
    return HB_VI16(_mm256_sub_epi32(a.l, b.l), _mm256_sub_epi32(a.h, b.h));
}
HB_INLINE vi16 vi16_mul(vi16 a, vi16 b) {
    return HB_VI16(_mm256_mullo_epi32(a.l, b.l), _mm256_mullo_epi32(a.h, b.h));
}
HB_INLINE vi16 vi16_and(vi16 a, vi16 b) {
    return HB_VI16(_mm256_and_si256(a.l, b.l), _mm256_and_si256(a.h, b.h));
}
HB_INLINE vi16 vi16_shl(vi16 a, int n) {
    return HB_VI16(_mm256_slli_epi32(a.l, n), _mm256_slli_epi32(a.h, n));
}
HB_INLINE vi16 vi16_shr(vi16 a, int n) {
    return HB_VI16(_mm256_srli_epi32(a.l, n), _mm256_srli_epi32(a.h, n));
}
HB_INLINE int32_t vi16_sum(vi16 a) {
    __m256i b = _mm256_add_epi32(a.l, a.h);
    __m128i c = _mm_add_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    c = _mm_add_epi32(c, _mm_shuffle_epi32(c, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
}
HB_INLINE void vi16_store_i8(int8_t *p, vi16 a) { /* of values that fit */
    __m256i b = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.l, a.h), 0xd8);
    _mm_storeu_si128((__m128i *)p,
                     _mm_packs_epi16(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1)));
}
HB_INLINE vi16 vi16_round(v16 a) { return HB_VI16(_mm256_cvtps_epi32(a.l), _mm256_cvtps_epi32(a.h)); }
HB_INLINE v16 v16_from_int(vi16 a) { return HB_V16(_mm256_cvtepi32_ps(a.l), _mm256_cvtepi32_ps(a.h)); }
HB_INLINE v16 v16_as_float(vi16 a) { return HB_V16(_mm256_castsi256_ps(a.l), _mm256_castsi256_ps(a.h)); }
HB_INLINE vi16 v16_bits(v16 a) { return HB_VI16(_mm256_castps_si256(a.l), _mm256_castps_si256(a.h)); }
HB_INLINE __m256 hb_keep_8(__m256i test, __m256 a) {
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(test, _mm256_setzero_si256())), a);
}
HB_INLINE v16 v16_keep_nonzero(vi16 test, v16 a) {
    return HB_V16(hb_keep_8(test.l, a.l), hb_keep_8(test.h, a.h));
}

#elif defined(HB_NEON)
#if defined(HB_I8MM)
#define HB_ISA i8mm
#elif defined(HB_DOTPROD)
#define HB_ISA dotprod
#else
#define HB_ISA neon
#endif
#include "kernels/v16_arm.h"

#else
#define HB_ISA scalar

typedef struct {
    float v[16];
} v16;
typedef struct {
    int32_t v[16];
} vi16;

#define HB_LANES(type, expr)                      \
    type r;                                       \
    for (int i = 0; i < 16; i++) r.v[i] = (expr); \
    return r
HB_INLINE v16 v16_set1(float x) { HB_LANES(v16, x); }
HB_INLINE v16 v16_zero(void) { return v16_set1(0.0f); }
HB_INLINE v16 v16_load(const float *p) { HB_LANES(v16, p[i]); }
HB_OUTLINE v16 v16_load_n(const float *p, uint32_t n) { HB_LANES(v16, (uint32_t)i < n ? p[i] : 0.0f); }
HB_INLINE void v16_store(float *p, v16 a) { memcpy(p, a.v, sizeof a.v); }
HB_OUTLINE void v16_store_n(float *p, v16 a, uint32_t n) {
    for (uint32_t i = 0; i < 16 && i < n; i++) p[i] = a.v[i];
}
HB_INLINE v16 v16_add(v16 a, v16 b) { HB_LANES(v16, a.v[i] + b.v[i]); }
HB_INLINE v16 v16_sub(v16 a, v16 b) { HB_LANES(v16, a.v[i] - b.v[i]); }
HB_INLINE v16 v16_mul(v16 a, v16 b) { HB_LANES(v16, a.v[i] * b.v[i]); }
HB_INLINE v16 v16_div(v16 a, v16 b) { HB_LANES(v16, a.v[i] / b.v[i]); }
HB_OUTLINE v16 v16_fma(v16 a, v16 b, v16 c) { HB_LANES(v16, hb_fma(a.v[i], b.v[i], c.v[i])); }
HB_INLINE v16 v16_max(v16 a, v16 b) { HB_LANES(v16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
HB_INLINE v16 v16_min(v16 a, v16 b) { HB_LANES(v16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
HB_INLINE v16 v16_abs(v16 a) { HB_LANES(v16, hb_from_bits(hb_to_bits(a.v[i]) & 0x7fffffff)); }
HB_INLINE v16 v16_copysign(v16 a, v16 sign) {
    HB_LANES(v16, hb_from_bits((hb_to_bits(a.v[i]) & 0x7fffffff) | (hb_to_bits(sign.v[i]) & 0x80000000)));
}
HB_INLINE v16 v16_select_lt(v16 a, v16 b, v16 yes, v16 no) {
    HB_LANES(v16, a.v[i] < b.v[i] ? yes.v[i] : no.v[i]);
}
HB_INLINE v16 v16_rint(v16 a) { HB_LANES(v16, nearbyintf(a.v[i])); }
/* Of a number that no int32 holds, the smallest one, as on x86: C leaves that conversion undefined. */
HB_INLINE int32_t hb_to_i32(float x) {
    return x >= -2147483648.0f && x < 2147483648.0f ? (int32_t)x : INT32_MIN;
}
HB_INLINE v16 v16_pow2(v16 n) { HB_LANES(v16, hb_from_bits((uint32_t)(hb_to_i32(n.v[i]) + 127) << 23)); }
HB_INLINE v16 v16_load_f16(const uint16_t *p) { HB_LANES(v16, hb_from_f16(p[i])); }
HB_INLINE void v16_store_f16(uint16_t *p, v16 a) {
    for (int i = 0; i < 16; i++) p[i] = hb_to_f16(a.v[i]);
}
HB_INLINE v16 v16_load_bf16(const uint16_t *p) { HB_LANES(v16, hb_from_bf16(p[i])); }
HB_INLINE float v16_sum(v16 a) {
    float b[8], c[4];
    for (int i = 0; i < 8; i++) b[i] = a.v[i] + a.v[i + 8];
    for (int i = 0; i < 4; i++) c[i] = b[i] + b[i + 4];
    return (c[0] + c[2]) + (c[1] + c[3]);
}
HB_INLINE float v16_top(v16 a) { /* the largest lane */
    float top = a.v[0];
    for (int i = 1; i < 16; i++) top = a.v[i] > top ? a.v[i] : top;
    return top;
}

HB_INLINE vi16 vi16_set1(int32_t x) { HB_LANES(vi16, x); }
HB_INLINE vi16 vi16_zero(void) { return vi16_set1(0); }
HB_INLINE vi16 vi16_load(const int32_t *p) { HB_LANES(vi16, p[i]); }
HB_INLINE void vi16_store(int32_t *p, vi16 a) { memcpy(p, a.v, sizeof a.v); }
HB_INLINE vi16 vi16_load_u8(const uint8_t *p) { HB_LANES(vi16, p[i]); }
HB_INLINE vi16 vi16_add(vi16 a, vi16 b) { HB_LANES(vi16, (int32_t)((uint32_t)a.v[i] + (uint32_t)b.v[i])); }
HB_INLINE vi16 vi16_sub(vi16 a, vi16 b) { HB_LANES(vi16, a.v[i] - b.v[i]); }
HB_INLINE vi16 vi16_mul(vi16 a, vi16 b) { HB_LANES(vi16, (int32_t)((uint32_t)a.v[i] * (uint32_t)b.v[i])); }
HB_INLINE vi16 vi16_and(vi16 a, vi16 b) { HB_LANES(vi16, a.v[i] & b.v[i]); }
HB_INLINE vi16 vi16_shl(vi16 a, int n) { HB_LANES(vi16, (int32_t)((uint32_t)a.v[i] << n)); }
HB_INLINE vi16 vi16_shr(vi16 a, int n) { HB_LANES(vi16, (int32_t)((uint32_t)a.v[i] >> n)); }
HB_INLINE int32_t vi16_sum(vi16 a) {
    int32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += a.v[i];
    return sum;
}
HB_INLINE void vi16_store_i8(int8_t *p, vi16 a) {
    for (int i = 0; i < 16; i++) p[i] = (int8_t)a.v[i];
}
HB_INLINE vi16 vi16_round(v16 a) { HB_LANES(vi16, hb_to_i32(nearbyintf(a.v[i]))); }
HB_INLINE v16 v16_from_int(vi16 a) { HB_LANES(v16, (float)a.v[i]); }
HB_INLINE v16 v16_as_float(vi16 a) { HB_LANES(v16, hb_from_bits((uint32_t)a.v[i])); }
HB_INLINE vi16 v16_bits(v16 a) { HB_LANES(vi16, (int32_t)hb_to_bits(a.v[i])); }
HB_INLINE v16 v16_keep_nonzero(vi16 test, v16 a) { HB_LANES(v16, test.v[i] ? a.v[i] : 0.0f); }
#endif

#define HB_NAME(op) HB_CAT(op, HB_ISA)

/* e^x, below 1.2 units in the last place; x is held in [-87.33, 88.37], NaN stays NaN. Reduction by
 * ln 2 in two parts and the degree-5 polynomial of Cephes' expf. */
HB_INLINE v16 v16_exp(v16 x) {
    x = v16_min(v16_set1(88.37f), v16_max(v16_set1(-87.33f), x));
    v16 n = v16_rint(v16_mul(x, v16_set1(1.44269504088896341f)));
    v16 r = v16_fma(n, v16_set1(-0.693359375f), x);
    r = v16_fma(n, v16_set1(2.12194440e-4f), r);
    v16 p = v16_set1(1.9875691500e-4f);
    p = v16_fma(p, r, v16_set1(1.3981999507e-3f));
    p = v16_fma(p, r, v16_set1(8.3334519073e-3f));
    p = v16_fma(p, r, v16_set1(4.1665795894e-2f));
    p = v16_fma(p, r, v16_set1(1.6666665459e-1f));
    p = v16_fma(p, r, v16_set1(5.0000001201e-1f));
    p = v16_add(v16_fma(p, v16_mul(r, r), r), v16_set1(1.0f));
    return v16_mul(p, v16_pow2(n));
}

/* The same of x <= 0, held above -86, within 3e-6: 2^n times a polynomial of degree 4. */
HB_INLINE v16 v16_exp_short(v16 x) {
    const v16 log2e = v16_set1(1.44269504088896341f),
              shift = v16_set1(12582912.0f); /* n in the lowest bits */
    x = v16_max(v16_set1(-86.0f), x);
    const v16 n = v16_fma(x, log2e, shift), r = v16_fma(x, log2e, v16_sub(shift, n));
    v16 p = v16_fma(v16_set1(9.570102e-3f), r, v16_set1(5.5917863e-2f));
    p = v16_fma(p, r, v16_set1(2.4024744e-1f));
    p = v16_fma(p, r, v16_set1(6.931218e-1f));
    p = v16_fma(p, r, v16_set1(1.0f));
    return v16_as_float(vi16_add(v16_bits(p), vi16_shl(v16_bits(n), 23)));
}

/* tanh: Cephes' tanhf polynomial near zero, 1 - 2 / (e^2x + 1) elsewhere. */
HB_INLINE v16 v16_tanh(v16 x) {
    v16 a = v16_abs(x), z = v16_mul(x, x);
    v16 p = v16_set1(-5.70498872745e-3f);
    p = v16_fma(p, z, v16_set1(2.06390887954e-2f));
    p = v16_fma(p, z, v16_set1(-5.37397155531e-2f));
    p = v16_fma(p, z, v16_set1(1.33314422036e-1f));
    p = v16_fma(p, z, v16_set1(-3.33332819422e-1f));
    v16 near = v16_fma(v16_mul(p, z), x, x);
    v16 e = v16_exp(v16_add(a, a));
    v16 far = v16_sub(v16_set1(1.0f), v16_div(v16_set1(2.0f), v16_add(e, v16_set1(1.0f))));
    return v16_select_lt(a, v16_set1(0.625f), near, v16_copysign(far, x));
}

/* Sixteen stored scales of a type, and the E6M2 row scales of q4. */
HB_INLINE v16 v16_load_scale(const uint8_t *plane, size_t index, uint32_t type) {
    if (type == 2) return v16_load_f16((const uint16_t *)(const void *)(plane + index * 32));
    if (type == 1) return v16_load((const float *)(const void *)(plane + index * 64));
    return v16_load_bf16((const uint16_t *)(const void *)(plane + index * 32));
}

HB_INLINE v16 v16_load_e6m2(const uint8_t *p) {
    vi16 r = vi16_load_u8(p);
    vi16 bits = vi16_add(vi16_shl(r, 21), vi16_set1((127 - 60) << 23)); /* (r >> 2) << 23 | (r & 3) << 21 */
    return v16_keep_nonzero(r, v16_as_float(bits));
}

#endif
