/* quad by four NEON registers of 4 rows by 4 columns each; included by quad.h. Sums run over two quads (8
 * columns) at a time, in a quad_sum of the shape that the multiply instruction of the file wants. */
#ifndef HB_QUAD_ARM_H
#define HB_QUAD_ARM_H

#include <stdbool.h>

#include "kernels/v16.h"

typedef struct {
    int8x16_t v[4];
} quad;
#define QUAD_BYTES_ARE_SIGNED 1
#define QUAD_FLIP_SIGNED 0
#define QUAD_OFFSET_SIGNED 0
#define QUAD_FLIP_UNSIGNED 0x80
#define QUAD_OFFSET_UNSIGNED 128
#define QUAD_BY_TWO 1
#if defined(HB_DOTPROD)
#define QUAD_WIDE 4
#else
#define QUAD_WIDE 2
#endif
#define QUAD_DIRECT 2
#define QUAD_FEW 2

/* Sums of half a panel at a time fit the registers; those of all 16 rows do not. */
#define QUAD_PARTS 2
HB_INLINE void quad_store_part(float *p, v16 a) { /* the first half */
    vst1q_f32(p, a.v[0]);
    vst1q_f32(p + 4, a.v[1]);
}

HB_INLINE quad quad_load(const uint8_t *p) {
    const int8_t *s = (const int8_t *)p;
    return (quad){{vld1q_s8(s), vld1q_s8(s + 16), vld1q_s8(s + 32), vld1q_s8(s + 48)}};
}
HB_INLINE void quad_store(uint8_t *p, quad a) {
    int8_t *s = (int8_t *)p;
    vst1q_s8(s, a.v[0]);
    vst1q_s8(s + 16, a.v[1]);
    vst1q_s8(s + 32, a.v[2]);
    vst1q_s8(s + 48, a.v[3]);
}
HB_INLINE quad quad_set1(int byte) {
    int8x16_t b = vdupq_n_s8((int8_t)byte);
    return (quad){{b, b, b, b}};
}
HB_INLINE quad quad_xor(quad a, quad b) { return HB_BY4_2(quad, veorq_s8, a, b); }
HB_INLINE int8x16_t hb_add_rows_4(int8x16_t a, int32x4_t rows) {
    return vaddq_s8(a, vreinterpretq_s8_s32(vmulq_n_s32(rows, 0x01010101)));
}
HB_INLINE quad quad_add_rows(quad a, vi16 rows) { /* adds rows[r] (0..127) to the 4 bytes of row r */
    return HB_BY4_2(quad, hb_add_rows_4, a, rows);
}
HB_INLINE quad quad_table(const int8_t levels[16]) {
    int8x16_t t = vld1q_s8(levels);
    return (quad){{t, t, t, t}};
}
HB_INLINE quad quad_or(quad a, quad b) { return HB_BY4_2(quad, vorrq_s8, a, b); }
HB_INLINE quad quad_add(quad a, quad b) { return HB_BY4_2(quad, vaddq_s8, a, b); }
/* Of every byte the bits of `mask` after a shift to the right (to the left if negative). */
HB_INLINE int8x16_t hb_field_16(int8x16_t raw, const int shift, const int mask) {
    uint8x16_t u = vreinterpretq_u8_s8(raw);
    u = shift < 0 ? u << -shift : u >> shift;
    return vreinterpretq_s8_u8(shift > 0 && mask == 255 >> shift ? u
                                                                 : vandq_u8(u, vdupq_n_u8((uint8_t)mask)));
}
HB_INLINE quad quad_field(quad a, const int shift, const int mask) {
    return (quad){{hb_field_16(a.v[0], shift, mask), hb_field_16(a.v[1], shift, mask),
                   hb_field_16(a.v[2], shift, mask), hb_field_16(a.v[3], shift, mask)}};
}
HB_INLINE int8x16_t hb_lookup_16(int8x16_t table, int8x16_t index) {
    return vqtbl1q_s8(table, vreinterpretq_u8_s8(index));
}
HB_INLINE quad quad_lookup(quad table, quad index) { return HB_BY4_2(quad, hb_lookup_16, table, index); }
/* The same of 32 entries: bit `bit` of `high` says which table. */
HB_INLINE quad quad_lookup_32(const quad table[2], quad index, quad high, const int bit) {
    const int8x16x2_t both = {{table[0].v[0], table[1].v[0]}};
    quad i = quad_or(index, quad_field(high, bit - 4, 16));
    HB_UNROLL for (int r = 0; r < 4; r++) i.v[r] = vqtbl2q_s8(both, vreinterpretq_u8_s8(i.v[r]));
    return i;
}

/* How unpacked codes lie, 128 bytes for two quads. i8mm multiplies 2 rows by 8 columns with 8 columns of 2
 * tokens: rows r and r + 1 of both quads go side by side. Blocks of 4 columns stay as they are. */
#if defined(HB_I8MM)
enum { QUAD_ZIPPED = 1 };
HB_INLINE int8x16_t hb_zip_low_4(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s32(vzip1q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}
HB_INLINE int8x16_t hb_zip_high_4(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s32(vzip2q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}
HB_INLINE int8x16_t hb_even_4(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s32(vuzp1q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}
HB_INLINE int8x16_t hb_odd_4(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s32(vuzp2q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}
HB_INLINE void quad_zip(quad c[2]) {
    quad a = c[0], b = c[1];
    c[0] = HB_BY4_2(quad, hb_zip_low_4, a, b);
    c[1] = HB_BY4_2(quad, hb_zip_high_4, a, b);
}
HB_INLINE void quad_unzip(quad c[2]) {
    quad a = c[0], b = c[1];
    c[0] = HB_BY4_2(quad, hb_even_4, a, b);
    c[1] = HB_BY4_2(quad, hb_odd_4, a, b);
}
#else
enum { QUAD_ZIPPED = 0 };
HB_INLINE void quad_zip(quad c[2]) { (void)c; }
HB_INLINE void quad_unzip(quad c[2]) { (void)c; }
#endif

HB_INLINE int8x16_t hb_spread_4(const int8_t *x) { /* the same 4 bytes for each of 4 rows */
    int32_t x4;
    memcpy(&x4, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(x4));
}

#if defined(HB_DOTPROD)
typedef vi16 quad_sum;

HB_INLINE quad_sum quad_sum_zero(void) { return vi16_zero(); }
HB_INLINE vi16 quad_sum_add(vi16 dot, quad_sum sum) { return vi16_add(dot, sum); }

HB_INLINE int32x4_t hb_dot_lane_4(int32x4_t sum, int8x16_t w, int8x16_t x, const int lane) {
    switch (lane) { /* the instruction holds the lane */
        case 0:
            return vdotq_laneq_s32(sum, w, x, 0);
        case 1:
            return vdotq_laneq_s32(sum, w, x, 1);
        case 2:
            return vdotq_laneq_s32(sum, w, x, 2);
        default:
            return vdotq_laneq_s32(sum, w, x, 3);
    }
}

/* Adds columns 4 * k onwards of one token: two quads, or the only one of a block of 4 columns. */
HB_INLINE quad_sum quad_dot(quad_sum sum, const int quads, const int k, const quad c[2], const int8_t *x) {
    if (quads < 4) {
        int8x16_t a = hb_spread_4(x), b = hb_spread_4(x + 4 * (quads - 1));
        HB_UNROLL for (int r = 0; r < 4; r++) {
            sum.v[r] = vdotq_s32(sum.v[r], c[0].v[r], a);
            if (quads > 1) sum.v[r] = vdotq_s32(sum.v[r], c[1].v[r], b);
        }
        return sum;
    }
    int8x16_t a = vld1q_s8(x + (k & 4) * 4);
    HB_UNROLL for (int r = 0; r < 4; r++) {
        sum.v[r] = hb_dot_lane_4(sum.v[r], c[0].v[r], a, k & 3);
        sum.v[r] = hb_dot_lane_4(sum.v[r], c[1].v[r], a, (k & 3) + 1);
    }
    return sum;
}
#else
/* Products of bytes are at most 128 * 127, so two quads fit 16 bits; pairs of them are summed into 32: of
 * each row columns 0, 1 and 2, 3 apart, rows 0 and 1 of a register in `low`, 2 and 3 in `high`. */
typedef struct {
    vi16 low, high;
} quad_sum;

HB_INLINE quad_sum quad_sum_zero(void) { return (quad_sum){vi16_zero(), vi16_zero()}; }
HB_INLINE vi16 quad_sum_add(vi16 dot, quad_sum sum) {
    return vi16_add(dot, HB_BY4_2(vi16, vpaddq_s32, sum.low, sum.high));
}
HB_INLINE quad_sum quad_dot(quad_sum sum, const int quads, const int k, const quad c[2], const int8_t *x) {
    int8x16_t a = hb_spread_4(x + 4 * k), b = hb_spread_4(x + 4 * (quads > 1 ? k + 1 : k));
    HB_UNROLL for (int r = 0; r < 4; r++) {
        int16x8_t low = vmull_s8(vget_low_s8(c[0].v[r]), vget_low_s8(a));
        int16x8_t high = vmull_high_s8(c[0].v[r], a);
        if (quads > 1) {
            low = vmlal_s8(low, vget_low_s8(c[1].v[r]), vget_low_s8(b));
            high = vmlal_high_s8(high, c[1].v[r], b);
        }
        sum.low.v[r] = vpadalq_s16(sum.low.v[r], low);
        sum.high.v[r] = vpadalq_s16(sum.high.v[r], high);
    }
    return sum;
}
#endif

#if defined(HB_I8MM)
/* Two tokens, 32 bytes apart, over 8 columns of zipped codes: lanes of sum[0] are (row 0, token 0), (row 0,
 * token 1), (row 1, token 0), (row 1, token 1), those of sum[1] rows 2 and 3. */
HB_INLINE void quad_dot_pair(quad_sum sum[2], const int k, const quad c[2], const int8_t *x) {
    int8x16_t a = vcombine_s8(vld1_s8(x + 4 * k), vld1_s8(x + 32 + 4 * k));
    HB_UNROLL for (int r = 0; r < 4; r++) {
        sum[0].v[r] = vmmlaq_s32(sum[0].v[r], c[0].v[r], a);
        sum[1].v[r] = vmmlaq_s32(sum[1].v[r], c[1].v[r], a);
    }
}
HB_INLINE void quad_sum_add_pair(vi16 dot[2], const quad_sum sum[2]) {
    HB_UNROLL for (int r = 0; r < 4; r++) {
        dot[0].v[r] = vaddq_s32(dot[0].v[r], vuzp1q_s32(sum[0].v[r], sum[1].v[r]));
        dot[1].v[r] = vaddq_s32(dot[1].v[r], vuzp2q_s32(sum[0].v[r], sum[1].v[r]));
    }
}
#endif

/* Sums of `n` tokens, 32 bytes apart, over columns 4 * k onwards. */
HB_INLINE void quad_dots(quad_sum *sum, const int n, const int quads, const bool zipped, const int k,
                         quad c[2], const int8_t *x) {
#if defined(HB_I8MM)
    if (zipped && n % 2 == 0) {
        HB_UNROLL for (int i = 0; i < n; i += 2) quad_dot_pair(sum + i, k, c, x + 32 * i);
        return;
    }
#endif
    if (zipped) quad_unzip(c);
    HB_UNROLL for (int i = 0; i < n; i++) sum[i] = quad_dot(sum[i], quads, k, c, x + 32 * i);
}
HB_INLINE void quad_sums_add(vi16 *dot, const int n, const bool zipped, const quad_sum *sum) {
#if defined(HB_I8MM)
    if (zipped && n % 2 == 0) {
        HB_UNROLL for (int i = 0; i < n; i += 2) quad_sum_add_pair(dot + i, sum + i);
        return;
    }
#endif
    (void)zipped;
    HB_UNROLL for (int i = 0; i < n; i++) dot[i] = quad_sum_add(dot[i], sum[i]);
}

#endif
