/* EMBED: one row of a p16 matrix as floats, by the formulas of the encoding table. */
#include "kernels/half.h"
#include "kernels/kernels.h"

static float float_at(const uint8_t *plane, size_t index, uint32_t type) {
    if (type == HB_ENC_F32) {
        float f;
        memcpy(&f, plane + index * 4, 4);
        return f;
    }
    uint16_t h;
    memcpy(&h, plane + index * 2, 2);
    return type == HB_ENC_F16 ? hb_from_f16(h) : hb_from_bf16(h);
}

/* Row r of group g of a panel: what multiplies levels, what is added to them before and after that. */
typedef struct {
    float scale, min;
    int32_t offset;
} terms;

static terms terms_at(const hb_matrix *m, uint32_t panel, uint32_t g, uint32_t r) {
    const uint8_t *scales = m->scales + panel * m->panel_scales;
    const size_t at = (size_t)g * 16 + r, super = (size_t)(g / m->groups_per_super) * 16 + r;
    terms t = {0, 0, m->zeros ? -(int32_t)m->zeros[panel * m->panel_zeros + at] : 0};
    if (m->row) {
        const uint32_t e = m->row[(size_t)panel * 16 + r];
        const float row = e ? hb_from_bits((e << 21) + ((uint32_t)(127 - 60) << 23)) : 0.0f;
        t.scale = row * (float)((scales[at] & 254) - 127);
        t.offset = m->e->shift * (scales[at] & 1);
    } else if (m->super) {
        const float scale = float_at(m->super + panel * m->panel_super, super, HB_ENC_F16);
        t.scale = scale * (float)(m->mins ? scales[at] : (int8_t)scales[at]);
        if (m->mins)
            t.min = -(float_at(m->supermin + panel * m->panel_super, super, HB_ENC_F16) *
                      (float)m->mins[panel * m->panel_scales + at]);
    } else {
        t.scale = float_at(scales, at, m->scale_type);
        if (m->mins) t.min = float_at(m->mins + panel * m->panel_scales, at, m->scale_type);
    }
    return t;
}

/* The codes of columns 32 * i onwards of one row: fields of `bits` bits, `shift` higher, added to what is
 * there. */
static void add_fields(const uint8_t *plane, uint32_t i, uint32_t r, int bits, int shift, uint8_t codes[32]) {
    const int mask = (1 << bits) - 1, fields = 8 / bits;
    plane += (size_t)i * 64 * (size_t)bits + r * 4;
    for (int k = 0; k < 8; k++)
        for (int j = 0; j < 4; j++)
            codes[4 * k + j] |=
                (uint8_t)((plane[k / fields * 64 + j] >> (k % fields * bits) & mask) << shift);
}

static void embed_codes(const hb_matrix *m, uint32_t panel, uint32_t r, float *y) {
    const hb_encoding *e = m->e;
    const uint8_t *low = m->codes + panel * m->panel_codes,
                  *high = e->high_bits ? m->high + panel * m->panel_high : NULL;
    terms t = {0};
    uint32_t block = HB_NONE;
    for (uint32_t c = 0; c < m->cols; c += 32) {
        uint8_t codes[32] = {0};
        add_fields(low, c / 32, r, e->low_bits, 0, codes);
        if (e->high_bits) add_fields(high, c / 32, r, e->high_bits, e->low_bits, codes);
        for (uint32_t k = 0; k < 32 && c + k < m->cols; k += 4) {
            if ((c + k) / m->block != block) {
                block = (c + k) / m->block;
                t = terms_at(m, panel, block / m->blocks_per_group, r);
            }
            for (uint32_t j = k; j < k + 4 && c + j < m->cols; j++) {
                const uint8_t code = codes[j];
                float w;
                if (m->values) {
                    w = hb_from_f16(m->values[code]);
                } else {
                    const int32_t level = e->bits < 8 ? e->levels[code] : e->is_signed ? (int8_t)code : code;
                    w = (float)(level + t.offset);
                }
                w *= t.scale;
                y[c + j] = m->mins ? w + t.min : w;
            }
        }
    }
}

void hb_embed_scalar(const hb_matrix *m, uint32_t row, float *y) {
    const uint32_t panel = row / 16, r = row % 16;
    if (m->e->kind != HB_KIND_FLOAT) {
        embed_codes(m, panel, r, y);
        return;
    }
    const uint8_t *values = m->codes + panel * m->panel_codes;
    for (uint32_t c = 0; c < m->cols; c++) y[c] = float_at(values, (size_t)c * 16 + r, m->encoding);
}
