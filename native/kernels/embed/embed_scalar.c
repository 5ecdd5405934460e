/* EMBED: one row of a p16 matrix as floats, by the formulas of the encoding table. */
#include "kernels/half.h"
#include "kernels/kernels.h"

static const int8_t q4_levels[16] = HB_Q4_LEVELS;

static float scale_at(const uint8_t *plane, size_t index, uint32_t type) {
    if (type == HB_ENC_F32) {
        float f;
        memcpy(&f, plane + index * 4, 4);
        return f;
    }
    uint16_t h;
    memcpy(&h, plane + index * 2, 2);
    return type == HB_ENC_F16 ? hb_from_f16(h) : hb_from_bf16(h);
}

/* The scale of row r of group g of a panel (q4: row scale times sub-scale). */
static float group_scale(const hb_matrix *m, uint32_t panel, uint32_t g, uint32_t r) {
    const uint8_t *scales = m->scales + panel * m->panel_scales;
    size_t at = (size_t)g * 16 + r;
    if (m->encoding != HB_ENC_Q4) return scale_at(scales, at, m->scale_type);
    uint32_t e = m->row[(size_t)panel * 16 + r];
    float row = e ? hb_from_bits((e << 21) + ((uint32_t)(127 - 60) << 23)) : 0.0f;
    return row * (float)((scales[at] & 254) - 127);
}

static float group_min(const hb_matrix *m, uint32_t panel, uint32_t g, uint32_t r) {
    return scale_at(m->mins + panel * m->panel_scales, (size_t)g * 16 + r, m->scale_type);
}

/* The integer level of row r, column c, zero point and shift included. */
static int32_t level_at(const hb_matrix *m, uint32_t panel, uint32_t g, uint32_t r, uint32_t c) {
    const uint8_t *codes = m->codes + panel * m->panel_codes;
    size_t at = (size_t)g * 16 + r;
    switch (m->encoding) {
        case HB_ENC_Q8:
        case HB_ENC_I8:
            return (int8_t)codes[(size_t)(c / 4) * 64 + r * 4 + c % 4];
        case HB_ENC_A8:
            return codes[(size_t)(c / 4) * 64 + r * 4 + c % 4];
        case HB_ENC_Z8:
            return codes[(size_t)(c / 4) * 64 + r * 4 + c % 4] - m->zeros[panel * m->panel_zeros + at];
        default:
            break;
    }
    int32_t code = codes[(size_t)(c / 8) * 64 + r * 4 + c % 4] >> (c & 4) & 15;
    switch (m->encoding) {
        case HB_ENC_Q4:
            return q4_levels[code] + HB_Q4_SHIFT * (m->scales[panel * m->panel_scales + at] & 1);
        case HB_ENC_I4:
            return code - 8;
        case HB_ENC_Z4:
            return code - m->zeros[panel * m->panel_zeros + at];
        default:
            return code;
    }
}

static uint32_t group_of(const hb_matrix *m, uint32_t c) { return m->group ? c / m->group : 0; }

void hb_embed_scalar(const hb_matrix *m, uint32_t row, float *y) {
    const uint32_t panel = row / 16, r = row % 16;
    const uint8_t *values = m->codes + panel * m->panel_codes;
    switch (m->encoding) {
        case HB_ENC_F32:
            for (uint32_t c = 0; c < m->cols; c++) memcpy(y + c, values + ((size_t)c * 16 + r) * 4, 4);
            return;
        case HB_ENC_F16:
        case HB_ENC_BF16:
            for (uint32_t c = 0; c < m->cols; c++) y[c] = scale_at(values, (size_t)c * 16 + r, m->encoding);
            return;
        default:
            break;
    }
    float scale = 0, min = 0;
    uint32_t group = HB_NONE;
    for (uint32_t c = 0; c < m->cols; c++) {
        uint32_t g = group_of(m, c);
        if (g != group) {
            group = g;
            scale = group_scale(m, panel, g, r);
            min = m->mins ? group_min(m, panel, g, r) : 0.0f;
        }
        float w = scale * (float)level_at(m, panel, g, r, c);
        y[c] = m->mins ? w + min : w;
    }
}
