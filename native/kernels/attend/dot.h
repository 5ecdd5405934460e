/* Dot products of a panel of codes with rows of integers, `n` rows at a time so that codes are unpacked once
 * for all of them. How numbers lie is up to the instruction set; the sums are exact, so that all give the
 * same. */
#ifndef HB_DOT_H
#define HB_DOT_H

#include <stdbool.h>

#include "kernels/linear/quad.h"

/* Numbers of up to 127 * 128 in magnitude, -64..64, and 0..127. */
enum { WIDE, SMALL, POSITIVE };

/* Integers of `n` rows: `data` int8[n][cols], of WIDE ones int16[n][cols] or two digits (number = 128 * high
 * + low) int8[n][cols / 32][2][32]; `sums`, of each digit, are what an offset of the codes' bytes adds. */
typedef struct {
    int form;
    int8_t *data;
    int32_t *sums; /* [n], of WIDE [n][2] */
    float *scale;  /* [n] */
    uint32_t cols;
} numbers;

HB_INLINE const int8_t *row_of(const int form, const numbers *a, uint32_t i) {
    return a->data + (size_t)i * a->cols * (form == WIDE ? 2 : 1);
}

/* The sums of one row of numbers; `low` is used only for low digits. */
typedef struct {
    vi16 high, low;
} dot_sum;

#if defined(__AVX2__) && QUAD_BYTES_ARE_SIGNED
/* vpmaddubsw wants one side unsigned and pairs within 16 bits: codes are held as level + 128 (255 * 64 * 2
 * fits), or the numbers are positive. WIDE ones are multiplied as 16 bits, whose order in 4 columns is 0 2
 * 1 3. */
enum { DOTS = 4 };
#define DOT_OFFSET(form) ((form) == SMALL ? -128 : 0)
HB_INLINE quad dot_flip(const int form) { return quad_set1(form == SMALL ? 0x80 : 0); }

HB_INLINE __m256i hb_spread_32(const int8_t *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
}
HB_INLINE __m256i hb_dot_words(__m256i sum, __m256i codes, __m256i x, __m256i y) {
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8);
    sum = hb_add_now(sum, _mm256_madd_epi16(even, x));
    return hb_add_now(sum, _mm256_madd_epi16(_mm256_srai_epi16(codes, 8), y));
}
HB_INLINE __m256i hb_dot_bytes(__m256i sum, __m256i positive, __m256i other) {
    const __m256i pairs = _mm256_maddubs_epi16(positive, other);
    return hb_add_now(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
/* Adds quad k of 32 columns to the sums of n rows. */
HB_INLINE void dot_quad(const int n, const int form, dot_sum *s, quad w, const int8_t *const *rows,
                        const int k) {
    HB_UNROLL
    for (int i = 0; i < n; i++) {
        vi16 *sum = &s[i].high;
        if (form == WIDE) {
            const __m256i x = hb_spread_32(rows[i] + 8 * k), y = hb_spread_32(rows[i] + 8 * k + 4);
            *sum = (vi16){hb_dot_words(sum->l, w.l, x, y), hb_dot_words(sum->h, w.h, x, y)};
            continue;
        }
        const __m256i x = hb_spread_32(rows[i] + 4 * k);
        if (form == SMALL)
            *sum = (vi16){hb_dot_bytes(sum->l, w.l, x), hb_dot_bytes(sum->h, w.h, x)};
        else
            *sum = (vi16){hb_dot_bytes(sum->l, x, w.l), hb_dot_bytes(sum->h, x, w.h)};
    }
}
HB_INLINE vi16 dot_total(const int form, dot_sum s) {
    (void)form;
    return s.high;
}
/* Stores 16 WIDE numbers of row i, from column c on. */
HB_INLINE void put_wide(const numbers *a, uint32_t i, uint32_t c, vi16 v, dot_sum *sums) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.l, v.h), 0xd8);
    const __m256i order =
        _mm256_broadcastsi128_si256(_mm_set_epi8(15, 14, 11, 10, 13, 12, 9, 8, 7, 6, 3, 2, 5, 4, 1, 0));
    (void)sums;
    _mm256_storeu_si256((__m256i *)(a->data + ((size_t)i * a->cols + c) * 2),
                        _mm256_shuffle_epi8(words, order));
}

#else
#if defined(HB_AVX512)
enum {
    DOTS = 4,
    DOT_BY_TURNS = 1
}; /* rows that have two sums each, also of one digit: a sum waits for the last */
#elif defined(HB_NEON)
enum { DOTS = 2, DOT_BY_TURNS = 0 };
#else
enum { DOTS = 1, DOT_BY_TURNS = 0 };
#endif
#define DOT_OFFSET(form) QUAD_OFFSET_SIGNED
HB_INLINE quad dot_flip(const int form) {
    (void)form;
    return quad_set1(QUAD_FLIP_SIGNED);
}

#if defined(HB_NEON) && !defined(HB_DOTPROD)
#define DOT_TWO_QUADS
HB_INLINE vi16 dot_digit(vi16 sum, quad w0, quad w1, const int8_t *x) { /* two products fit 16 bits */
    const int8x16_t a = hb_spread_4(x), b = hb_spread_4(x + 4);
    HB_UNROLL for (int r = 0; r < 4; r++) {
        int16x8_t low = vmull_s8(vget_low_s8(w0.v[r]), vget_low_s8(a)), high = vmull_high_s8(w0.v[r], a);
        low = vmlal_s8(low, vget_low_s8(w1.v[r]), vget_low_s8(b)), high = vmlal_high_s8(high, w1.v[r], b);
        sum.v[r] = vaddq_s32(sum.v[r], vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
    }
    return sum;
}
/* Adds quads k and k + 1 of 32 columns to the sums of n rows. */
HB_INLINE void dot_quads(const int n, const int form, dot_sum *s, quad w0, quad w1, const int8_t *const *rows,
                         int k) {
    HB_UNROLL
    for (int i = 0; i < n; i++) {
        s[i].high = dot_digit(s[i].high, w0, w1, rows[i] + 4 * k);
        if (form == WIDE) s[i].low = dot_digit(s[i].low, w0, w1, rows[i] + 32 + 4 * k);
    }
}
#else
HB_INLINE vi16 dot_digit(vi16 sum, quad w, const int8_t *x) {
#if defined(HB_DOTPROD)
    const int8x16_t a = hb_spread_4(x);
    HB_UNROLL for (int r = 0; r < 4; r++) sum.v[r] = vdotq_s32(sum.v[r], w.v[r], a);
    return sum;
#else
    return quad_dot(sum, w, x);
#endif
}
HB_INLINE void dot_quad(const int n, const int form, dot_sum *s, quad w, const int8_t *const *rows,
                        const int k) {
    HB_UNROLL
    for (int i = 0; i < n; i++) {
        vi16 *sum = form != WIDE && DOT_BY_TURNS && k & 1 ? &s[i].low : &s[i].high;
        *sum = dot_digit(*sum, w, rows[i] + 4 * k);
        if (form == WIDE) s[i].low = dot_digit(s[i].low, w, rows[i] + 32 + 4 * k);
    }
}
#endif
HB_INLINE vi16 dot_total(const int form, dot_sum s) {
    if (form == WIDE) s.high = vi16_shl(s.high, 7);
    return form == WIDE || DOT_BY_TURNS ? vi16_add(s.high, s.low) : s.high;
}
HB_INLINE void put_wide(const numbers *a, uint32_t i, uint32_t c, vi16 v, dot_sum *sums) {
    int8_t *to = a->data + (size_t)i * 2 * a->cols + c / 32 * 64 + c % 32;
    /* high = floor((v + 64) / 128), by a shift of what is never negative */
    const vi16 high = vi16_sub(vi16_shr(vi16_add(v, vi16_set1((128 << 7) + 64)), 7), vi16_set1(128));
    const vi16 low = vi16_sub(v, vi16_shl(high, 7));
    vi16_store_i8(to, high);
    vi16_store_i8(to + 32, low);
    *sums = (dot_sum){vi16_add(sums->high, high), vi16_add(sums->low, low)};
}
#endif

/* Whether codes are multiplied as they lie for few rows; where products are slow, unpacking them costs little
 * beside those. */
#if defined(HB_NEON) && !defined(HB_DOTPROD)
#define DOT_DIRECT 0
#else
#define DOT_DIRECT QUAD_DIRECT
#endif

/* Rounds x * factor, of a->cols values, to the numbers of row i. */
HB_INLINE void put_numbers(const int form, const numbers *a, uint32_t i, const float *x, float factor) {
    dot_sum sums = {vi16_zero(), vi16_zero()};
    for (uint32_t c = 0; c < a->cols; c += 16) {
        const vi16 v = vi16_round(v16_mul(v16_load(x + c), v16_set1(factor)));
        if (form == WIDE) {
            put_wide(a, i, c, v, &sums);
        } else {
            vi16_store_i8(a->data + (size_t)i * a->cols + c, v);
            if (DOT_OFFSET(form)) sums.high = vi16_add(sums.high, v);
        }
    }
    if (!DOT_OFFSET(form)) return;
    a->sums[form == WIDE ? 2 * i : i] = vi16_sum(sums.high) * DOT_OFFSET(form);
    if (form == WIDE) a->sums[2 * i + 1] = vi16_sum(sums.low) * DOT_OFFSET(form);
}

/* Sixteen bytes for quad_lookup, as they are. */
HB_INLINE quad byte_table(const int8_t bytes[16]) {
    return quad_xor(quad_table(bytes), quad_set1(QUAD_FLIP_SIGNED));
}

/* Looks up the nibble at bit `shift` of bytes whose bits 3 and 7 are clear. */
HB_INLINE quad lookup_nibble(quad table, quad bytes, const int shift) {
#if defined(__AVX2__) /* bits 4 to 6 of an index are ignored, and what a shift of 16 bits brings in is clear \
                       */
    return quad_lookup(table, shift ? quad_field(bytes, shift, 0xff) : bytes);
#else
    return quad_lookup(table, quad_field(bytes, shift, 15));
#endif
}

/* Where the codes of a panel of `cols` columns come from; bits 0 is codes unpacked to bytes. */
typedef struct {
    const uint8_t *low, *high; /* planes; `high` of 1 bit, for 1 and 3 bits */
    quad table;
    quad spread[2]; /* of 3 bits: where bits 0 and 2, or 1 and 3, of a nibble of `high` go beside `low` */
} codes_of;

HB_INLINE codes_of open_codes(const int form, const uint32_t bits, const hb_side *side, const uint8_t *panel,
                              uint32_t cols) {
    static const int8_t even[16] = {0, 4, 0, 4, 64, 68, 64, 68, 0, 4, 0, 4, 64, 68, 64, 68},
                        odd[16] = {0, 0, 4, 4, 0, 0, 4, 4, 64, 64, 68, 68, 64, 64, 68, 68};
    codes_of c = {.low = panel, .high = panel, .table = dot_flip(form)};
    if (bits == 3) {
        c.high += (size_t)4 * cols;
        c.spread[0] = byte_table(even), c.spread[1] = byte_table(odd);
    }
    if (bits && bits < 8) c.table = quad_xor(byte_table(side->levels), c.table);
    return c;
}

/* Quad k of the 8 of columns 32 * g onwards. */
HB_INLINE quad code_quad(const uint32_t bits, const codes_of *c, uint32_t g, const int k) {
    const uint8_t *low = c->low + (size_t)g * (bits == 3 ? 128 : bits ? 64 * bits : 512);
    if (!bits) return quad_load(low + 64 * k);
    if (bits == 8) return quad_xor(quad_load(low + 64 * k), c->table);
    if (bits == 4) return quad_lookup(c->table, quad_field(quad_load(low + k / 2 * 64), 4 * (k & 1), 15));
    if (bits == 1) return quad_lookup(c->table, quad_field(quad_load(c->high + (size_t)g * 64), k, 1));
    const quad pairs = quad_load(low + k / 4 * 64);
    if (bits == 2) return quad_lookup(c->table, quad_field(pairs, 2 * (k & 3), 3));
    /* 3 bits: the codes of quads k and k + 2 in one byte, 4 apart */
    const quad bit = quad_field(quad_load(c->high + (size_t)g * 64), k & 4, 15);
    const quad both = quad_or(quad_field(pairs, 2 * (k & 1), 0x33), quad_lookup(c->spread[k & 1], bit));
    return lookup_nibble(c->table, both, k & 2 ? 4 : 0);
}

/* sums[i] = 16 rows of a panel times the numbers first + i of `n`, without their scales. */
HB_INLINE void multiply(const int n, const int form, const uint32_t bits, const codes_of *codes,
                        const numbers *a, uint32_t first, v16 *sums) {
    dot_sum s[DOTS];
    const int8_t *rows[DOTS];
    HB_UNROLL
    for (int i = 0; i < n; i++) {
        s[i] = (dot_sum){vi16_zero(), vi16_zero()};
        rows[i] = row_of(form, a, first + (uint32_t)i);
    }
    for (uint32_t g = 0; g < a->cols / 32; g++) {
#if defined(DOT_TWO_QUADS)
        for (int k = 0; k < 8; k += 2)
            dot_quads(n, form, s, code_quad(bits, codes, g, k), code_quad(bits, codes, g, k + 1), rows, k);
#else
        HB_UNROLL
        for (int k = 0; k < 8; k++) dot_quad(n, form, s, code_quad(bits, codes, g, k), rows, k);
#endif
        HB_UNROLL
        for (int i = 0; i < n; i++) rows[i] += form == WIDE ? 64 : 32;
    }
    HB_UNROLL
    for (int i = 0; i < n; i++) {
        if (DOT_OFFSET(form)) {
            const int32_t *offset = a->sums + (first + (uint32_t)i) * (form == WIDE ? 2 : 1);
            s[i].high = vi16_add(s[i].high, vi16_set1(offset[0]));
            if (form == WIDE) s[i].low = vi16_add(s[i].low, vi16_set1(offset[1]));
        }
        sums[i] = v16_from_int(dot_total(form, s[i]));
    }
}

/* Codes of `bits` bits as bytes, for many rows. */
HB_INLINE void unpack_panel(const int form, const uint32_t bits, const hb_side *side, const uint8_t *panel,
                            uint32_t cols, uint8_t *out) {
    const codes_of codes = open_codes(form, bits, side, panel, cols);
    for (uint32_t g = 0; g < cols / 32; g++) HB_UNROLL
    for (int k = 0; k < 8; k++) quad_store(out + (size_t)g * 512 + 64 * k, code_quad(bits, &codes, g, k));
}

#endif
