/* quad: the codes of 16 rows by 4 columns, a byte each, as the integer dot product of this instruction set
 * wants them. A stored code is level - offset for a constant QUAD_OFFSET_*, which the caller adds back as
 * offset * sum(x). */
#ifndef HB_QUAD_H
#define HB_QUAD_H

#include "kernels/kernels.h"
#include "kernels/v16.h"

#if defined(HB_AVX512)
/* vpdpbusd multiplies unsigned by signed bytes: weights are held as level + 128. */
typedef __m512i quad;
#define QUAD_BYTES_ARE_SIGNED 0
#define QUAD_FLIP_SIGNED 0x80
#define QUAD_OFFSET_SIGNED (-128)
#define QUAD_FLIP_UNSIGNED 0
#define QUAD_OFFSET_UNSIGNED 0
#define QUAD_WIDE 12  /* tokens whose sums fit the registers */
#define QUAD_DIRECT 8 /* tokens whose sums fit beside codes unpacked in registers */
#define QUAD_FEW 48   /* tokens for which that is better than unpacking codes to memory once */
#define QUAD_PANELS 2 /* panels of a blocked product, which then share every load of activations */

HB_INLINE quad quad_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
HB_INLINE void quad_store(uint8_t *p, quad a) { _mm512_storeu_si512(p, a); }
HB_INLINE quad quad_set1(int byte) { return _mm512_set1_epi8((char)byte); }
HB_INLINE quad quad_xor(quad a, quad b) { return _mm512_xor_si512(a, b); }
HB_INLINE quad quad_add_rows(quad a, vi16 rows) { /* adds rows[r] (0..127) to the 4 bytes of row r */
    return _mm512_add_epi8(a, _mm512_mullo_epi32(rows, _mm512_set1_epi32(0x01010101)));
}
HB_INLINE quad quad_table(const int8_t levels[16]) {
    __m128i t = _mm_xor_si128(_mm_loadu_si128((const __m128i *)levels), _mm_set1_epi8((char)0x80));
    return _mm512_broadcast_i32x4(t);
}
HB_INLINE quad quad_or(quad a, quad b) { return _mm512_or_si512(a, b); }
HB_INLINE quad quad_add(quad a, quad b) { return _mm512_add_epi8(a, b); }
/* Of every byte the bits of `mask` after a shift to the right (to the left if negative). */
HB_INLINE quad quad_field(quad raw, const int shift, const int mask) {
    if (shift > 0) raw = _mm512_srli_epi16(raw, shift > 0 ? shift : 0);
    if (shift < 0) raw = _mm512_slli_epi16(raw, shift < 0 ? -shift : 0);
    return _mm512_and_si512(raw, _mm512_set1_epi8((char)mask));
}
HB_INLINE quad quad_lookup(quad table, quad index) { return _mm512_shuffle_epi8(table, index); }
/* The same of 32 entries: bit `bit` of `high` says which table. */
HB_INLINE quad quad_lookup_32(const quad table[2], quad index, quad high, const int bit) {
    __mmask64 second = _mm512_test_epi8_mask(high, _mm512_set1_epi8((char)(1 << bit)));
    return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(table[0], index), second, table[1], index);
}
HB_INLINE vi16 quad_dot(vi16 sum, quad w, const int8_t *x) {
    int32_t x4;
    memcpy(&x4, x, 4);
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x4));
}

#elif defined(__AVX2__)
typedef struct {
    __m256i l, h;
} quad;
#if defined(__AVXVNNI__) || defined(HB_AVX512VLVNNI) /* vpdpbusd, on halves */
#define QUAD_BYTES_ARE_SIGNED 0
#define QUAD_FLIP_SIGNED 0x80
#define QUAD_OFFSET_SIGNED (-128)
#define QUAD_FLIP_UNSIGNED 0
#define QUAD_OFFSET_UNSIGNED 0
#define QUAD_WIDE 6
#define QUAD_DIRECT 2
#define QUAD_FEW 8
#if defined(HB_AVX512VLVNNI)
#define HB_DOT_8 _mm256_dpbusd_epi32
#else
#define HB_DOT_8 _mm256_dpbusd_avx_epi32
#endif
#else
/* vpmaddubsw multiplies unsigned by signed bytes and saturates pairs to 16 bits: with |level| <= 128 and
 * |x| <= 127 a pair is at most 32512, so it never does. */
#define QUAD_BYTES_ARE_SIGNED 1
#define QUAD_FLIP_SIGNED 0
#define QUAD_OFFSET_SIGNED 0
#define QUAD_FLIP_UNSIGNED 0x80
#define QUAD_OFFSET_UNSIGNED 128
#define QUAD_WIDE 4
#define QUAD_DIRECT 4
#define QUAD_FEW 8
#define HB_DOT_8 hb_dot_8
/* The sum is wanted now: GCC would put all additions of an unrolled loop off and run out of registers. */
HB_INLINE __m256i hb_add_now(__m256i sum, __m256i a) {
    sum = _mm256_add_epi32(sum, a);
    __asm__("" : "+x"(sum));
    return sum;
}
HB_INLINE __m256i hb_dot_8(__m256i sum, __m256i w, __m256i x) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return hb_add_now(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

HB_INLINE quad quad_load(const uint8_t *p) {
    return (quad){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32))};
}
HB_INLINE void quad_store(uint8_t *p, quad a) {
    _mm256_storeu_si256((__m256i *)p, a.l);
    _mm256_storeu_si256((__m256i *)(p + 32), a.h);
}
HB_INLINE quad quad_set1(int byte) {
    return (quad){_mm256_set1_epi8((char)byte), _mm256_set1_epi8((char)byte)};
}
HB_INLINE quad quad_xor(quad a, quad b) {
    return (quad){_mm256_xor_si256(a.l, b.l), _mm256_xor_si256(a.h, b.h)};
}
HB_INLINE quad quad_add_rows(quad a, vi16 rows) {
    __m256i spread = _mm256_set1_epi32(0x01010101);
    return (quad){_mm256_add_epi8(a.l, _mm256_mullo_epi32(rows.l, spread)),
                  _mm256_add_epi8(a.h, _mm256_mullo_epi32(rows.h, spread))};
}
HB_INLINE quad quad_table(const int8_t levels[16]) {
    __m128i half = _mm_loadu_si128((const __m128i *)levels);
    if (!QUAD_BYTES_ARE_SIGNED) half = _mm_xor_si128(half, _mm_set1_epi8((char)0x80));
    __m256i t = _mm256_broadcastsi128_si256(half);
    return (quad){t, t};
}
HB_INLINE quad quad_or(quad a, quad b) {
    return (quad){_mm256_or_si256(a.l, b.l), _mm256_or_si256(a.h, b.h)};
}
HB_INLINE quad quad_add(quad a, quad b) {
    return (quad){_mm256_add_epi8(a.l, b.l), _mm256_add_epi8(a.h, b.h)};
}
HB_INLINE __m256i hb_field_32(__m256i raw, const int shift, const int mask) {
    if (shift > 0) raw = _mm256_srli_epi16(raw, shift > 0 ? shift : 0);
    if (shift < 0) raw = _mm256_slli_epi16(raw, shift < 0 ? -shift : 0);
    return _mm256_and_si256(raw, _mm256_set1_epi8((char)mask));
}
HB_INLINE quad quad_field(quad raw, const int shift, const int mask) {
    return (quad){hb_field_32(raw.l, shift, mask), hb_field_32(raw.h, shift, mask)};
}
HB_INLINE quad quad_lookup(quad table, quad index) {
    return (quad){_mm256_shuffle_epi8(table.l, index.l), _mm256_shuffle_epi8(table.h, index.h)};
}
HB_INLINE quad quad_lookup_32(const quad table[2], quad index, quad high, const int bit) {
    quad a = quad_lookup(table[0], index), b = quad_lookup(table[1], index);
    return (quad){_mm256_blendv_epi8(a.l, b.l, _mm256_slli_epi16(high.l, 7 - bit)),
                  _mm256_blendv_epi8(a.h, b.h, _mm256_slli_epi16(high.h, 7 - bit))};
}
HB_INLINE vi16 quad_dot(vi16 sum, quad w, const int8_t *x) {
    int32_t x4;
    memcpy(&x4, x, 4);
    __m256i v = _mm256_set1_epi32(x4);
    return (vi16){HB_DOT_8(sum.l, w.l, v), HB_DOT_8(sum.h, w.h, v)};
}

#elif defined(HB_NEON)
#include "kernels/linear/quad_arm.h"

#else
typedef struct {
    int8_t v[64];
} quad;
#define QUAD_BYTES_ARE_SIGNED 1
#define QUAD_FLIP_SIGNED 0
#define QUAD_OFFSET_SIGNED 0
#define QUAD_FLIP_UNSIGNED 0x80
#define QUAD_OFFSET_UNSIGNED 128
#define QUAD_WIDE 1
#define QUAD_DIRECT 0 /* unpacking first costs little beside the arithmetic */

HB_INLINE quad quad_load(const uint8_t *p) {
    quad a;
    memcpy(a.v, p, 64);
    return a;
}
HB_INLINE void quad_store(uint8_t *p, quad a) { memcpy(p, a.v, 64); }
HB_INLINE quad quad_set1(int byte) {
    quad a;
    memset(a.v, byte, 64);
    return a;
}
HB_INLINE quad quad_xor(quad a, quad b) {
    for (int i = 0; i < 64; i++) a.v[i] = (int8_t)(a.v[i] ^ b.v[i]);
    return a;
}
HB_INLINE quad quad_add_rows(quad a, vi16 rows) {
    for (int i = 0; i < 64; i++) a.v[i] = (int8_t)(a.v[i] + rows.v[i / 4]);
    return a;
}
HB_INLINE quad quad_table(const int8_t levels[16]) {
    quad a;
    for (int i = 0; i < 64; i++) a.v[i] = levels[i & 15];
    return a;
}
HB_INLINE quad quad_or(quad a, quad b) {
    for (int i = 0; i < 64; i++) a.v[i] = (int8_t)(a.v[i] | b.v[i]);
    return a;
}
HB_INLINE quad quad_add(quad a, quad b) {
    for (int i = 0; i < 64; i++) a.v[i] = (int8_t)(a.v[i] + b.v[i]);
    return a;
}
HB_INLINE quad quad_field(quad raw, const int shift, const int mask) {
    for (int i = 0; i < 64; i++) {
        const int byte = (uint8_t)raw.v[i];
        raw.v[i] =
            (int8_t)((shift < 0 ? byte << (shift < 0 ? -shift : 0) : byte >> (shift > 0 ? shift : 0)) & mask);
    }
    return raw;
}
HB_INLINE quad quad_lookup(quad table, quad index) {
    for (int i = 0; i < 64; i++) index.v[i] = table.v[index.v[i] & 15];
    return index;
}
HB_INLINE quad quad_lookup_32(const quad table[2], quad index, quad high, const int bit) {
    for (int i = 0; i < 64; i++) index.v[i] = table[high.v[i] >> bit & 1].v[index.v[i] & 15];
    return index;
}
HB_INLINE vi16 quad_dot(vi16 sum, quad w, const int8_t *x) {
    for (int r = 0; r < 16; r++)
        sum.v[r] += w.v[4 * r] * x[0] + w.v[4 * r + 1] * x[1] + w.v[4 * r + 2] * x[2] + w.v[4 * r + 3] * x[3];
    return sum;
}
#endif

#if !defined(QUAD_PANELS)
#define QUAD_PANELS 1
#endif
#if !defined(QUAD_PARTS)
#define QUAD_PARTS 0
#endif

#endif
