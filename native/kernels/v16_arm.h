/* v16 and vi16 by four NEON registers; included by v16.h. Every AArch64 machine has these instructions. */
#ifndef HB_V16_ARM_H
#define HB_V16_ARM_H

#include <arm_neon.h>

#include "kernels/half.h"

typedef struct {
    float32x4_t v[4];
} v16;
typedef struct {
    int32x4_t v[4];
} vi16;

#define HB_BY4_1(type, f, a) ((type){{f((a).v[0]), f((a).v[1]), f((a).v[2]), f((a).v[3])}})
#define HB_BY4_2(type, f, a, b) \
    ((type){{f((a).v[0], (b).v[0]), f((a).v[1], (b).v[1]), f((a).v[2], (b).v[2]), f((a).v[3], (b).v[3])}})

HB_INLINE v16 v16_set1(float x) {
    float32x4_t f = vdupq_n_f32(x);
    return (v16){{f, f, f, f}};
}
HB_INLINE v16 v16_zero(void) { return v16_set1(0.0f); }
HB_INLINE v16 v16_load(const float *p) {
    return (v16){{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
}
HB_INLINE void v16_store(float *p, v16 a) {
    vst1q_f32(p, a.v[0]);
    vst1q_f32(p + 4, a.v[1]);
    vst1q_f32(p + 8, a.v[2]);
    vst1q_f32(p + 12, a.v[3]);
}
HB_OUTLINE v16 v16_load_n(const float *p, uint32_t n) {
    float t[16] = {0};
    for (uint32_t i = 0; i < 16 && i < n; i++) t[i] = p[i];
    return v16_load(t);
}
HB_OUTLINE void v16_store_n(float *p, v16 a, uint32_t n) {
    float t[16];
    v16_store(t, a);
    for (uint32_t i = 0; i < 16 && i < n; i++) p[i] = t[i];
}
HB_INLINE v16 v16_add(v16 a, v16 b) { return HB_BY4_2(v16, vaddq_f32, a, b); }
HB_INLINE v16 v16_sub(v16 a, v16 b) { return HB_BY4_2(v16, vsubq_f32, a, b); }
HB_INLINE v16 v16_mul(v16 a, v16 b) { return HB_BY4_2(v16, vmulq_f32, a, b); }
HB_INLINE v16 v16_div(v16 a, v16 b) { return HB_BY4_2(v16, vdivq_f32, a, b); }
HB_INLINE v16 v16_fma(v16 a, v16 b, v16 c) {
    return (v16){{vfmaq_f32(c.v[0], a.v[0], b.v[0]), vfmaq_f32(c.v[1], a.v[1], b.v[1]),
                  vfmaq_f32(c.v[2], a.v[2], b.v[2]), vfmaq_f32(c.v[3], a.v[3], b.v[3])}};
}
/* fmax and fmin would return the NaN, whichever side it is on; x86 returns b. */
HB_INLINE float32x4_t hb_max_4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
HB_INLINE float32x4_t hb_min_4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
HB_INLINE v16 v16_max(v16 a, v16 b) { return HB_BY4_2(v16, hb_max_4, a, b); }
HB_INLINE v16 v16_min(v16 a, v16 b) { return HB_BY4_2(v16, hb_min_4, a, b); }
HB_INLINE v16 v16_abs(v16 a) { return HB_BY4_1(v16, vabsq_f32, a); }
HB_INLINE float32x4_t hb_copysign_4(float32x4_t a, float32x4_t sign) {
    return vbslq_f32(vdupq_n_u32(0x80000000u), sign, a);
}
HB_INLINE v16 v16_copysign(v16 a, v16 sign) { return HB_BY4_2(v16, hb_copysign_4, a, sign); }
HB_INLINE v16 v16_select_lt(v16 a, v16 b, v16 yes, v16 no) {
    return (v16){{vbslq_f32(vcltq_f32(a.v[0], b.v[0]), yes.v[0], no.v[0]),
                  vbslq_f32(vcltq_f32(a.v[1], b.v[1]), yes.v[1], no.v[1]),
                  vbslq_f32(vcltq_f32(a.v[2], b.v[2]), yes.v[2], no.v[2]),
                  vbslq_f32(vcltq_f32(a.v[3], b.v[3]), yes.v[3], no.v[3])}};
}
HB_INLINE v16 v16_rint(v16 a) { return HB_BY4_1(v16, vrndnq_f32, a); }
HB_INLINE float32x4_t hb_pow2_4(float32x4_t n) { /* 2^n of integers -126..127 */
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}
HB_INLINE v16 v16_pow2(v16 n) { return HB_BY4_1(v16, hb_pow2_4, n); }
HB_INLINE float32x4_t hb_f16_4(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
HB_INLINE v16 v16_load_f16(const uint16_t *p) {
    return (v16){{hb_f16_4(p), hb_f16_4(p + 4), hb_f16_4(p + 8), hb_f16_4(p + 12)}};
}
HB_INLINE void v16_store_f16(uint16_t *p, v16 a) { /* to nearest even, the mode that every thread starts in */
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a.v[0])));
    vst1_u16(p + 4, vreinterpret_u16_f16(vcvt_f16_f32(a.v[1])));
    vst1_u16(p + 8, vreinterpret_u16_f16(vcvt_f16_f32(a.v[2])));
    vst1_u16(p + 12, vreinterpret_u16_f16(vcvt_f16_f32(a.v[3])));
}
HB_INLINE float32x4_t hb_bf16_4(const uint16_t *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
HB_INLINE v16 v16_load_bf16(const uint16_t *p) {
    return (v16){{hb_bf16_4(p), hb_bf16_4(p + 4), hb_bf16_4(p + 8), hb_bf16_4(p + 12)}};
}
/* To four partial sums, lane i of a[i], a[i + 4], a[i + 8], a[i + 12]. */
HB_INLINE float32x4_t hb_fold_4(v16 a) {
    return vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
}
HB_INLINE float v16_sum(v16 a) {
    float32x4_t c = hb_fold_4(a);
    float32x2_t d = vadd_f32(vget_low_f32(c), vget_high_f32(c));
    return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}
HB_INLINE float v16_top(v16 a) { /* the largest lane */
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
}

HB_INLINE vi16 vi16_set1(int32_t x) {
    int32x4_t i = vdupq_n_s32(x);
    return (vi16){{i, i, i, i}};
}
HB_INLINE vi16 vi16_zero(void) { return vi16_set1(0); }
HB_INLINE vi16 vi16_load(const int32_t *p) {
    return (vi16){{vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}};
}
HB_INLINE void vi16_store(int32_t *p, vi16 a) {
    vst1q_s32(p, a.v[0]);
    vst1q_s32(p + 4, a.v[1]);
    vst1q_s32(p + 8, a.v[2]);
    vst1q_s32(p + 12, a.v[3]);
}
HB_INLINE vi16 vi16_load_u8(const uint8_t *p) {
    uint8x16_t b = vld1q_u8(p);
    uint16x8_t l = vmovl_u8(vget_low_u8(b)), h = vmovl_high_u8(b);
    return (vi16){
        {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(l))), vreinterpretq_s32_u32(vmovl_high_u16(l)),
         vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(h))), vreinterpretq_s32_u32(vmovl_high_u16(h))}};
}
HB_INLINE vi16 vi16_add(vi16 a, vi16 b) { return HB_BY4_2(vi16, vaddq_s32, a, b); }
HB_INLINE vi16 vi16_sub(vi16 a, vi16 b) { return HB_BY4_2(vi16, vsubq_s32, a, b); }
HB_INLINE vi16 vi16_mul(vi16 a, vi16 b) { return HB_BY4_2(vi16, vmulq_s32, a, b); }
HB_INLINE vi16 vi16_and(vi16 a, vi16 b) { return HB_BY4_2(vi16, vandq_s32, a, b); }
HB_INLINE int32x4_t hb_shift_4(int32x4_t a, int n) { /* left by n, right and logical where n is negative */
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(n)));
}
HB_INLINE vi16 vi16_shl(vi16 a, int n) {
    return (vi16){
        {hb_shift_4(a.v[0], n), hb_shift_4(a.v[1], n), hb_shift_4(a.v[2], n), hb_shift_4(a.v[3], n)}};
}
HB_INLINE vi16 vi16_shr(vi16 a, int n) { return vi16_shl(a, -n); }
HB_INLINE int32_t vi16_sum(vi16 a) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
}
HB_INLINE void vi16_store_i8(int8_t *p, vi16 a) {
    int16x8_t l = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    int16x8_t h = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(l), vmovn_s16(h)));
}
HB_INLINE vi16 vi16_round(v16 a) { return HB_BY4_1(vi16, vcvtnq_s32_f32, a); }
HB_INLINE v16 v16_from_int(vi16 a) { return HB_BY4_1(v16, vcvtq_f32_s32, a); }
HB_INLINE v16 v16_as_float(vi16 a) { return HB_BY4_1(v16, vreinterpretq_f32_s32, a); }
HB_INLINE vi16 v16_bits(v16 a) { return HB_BY4_1(vi16, vreinterpretq_s32_f32, a); }
HB_INLINE float32x4_t hb_keep_4(int32x4_t test, float32x4_t a) {
    return vreinterpretq_f32_u32(vandq_u32(vtstq_s32(test, test), vreinterpretq_u32_f32(a)));
}
HB_INLINE v16 v16_keep_nonzero(vi16 test, v16 a) { /* 0 where test is 0 */
    return HB_BY4_2(v16, hb_keep_4, test, a);
}

#endif
