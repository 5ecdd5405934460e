/* EMBED: one row of a p16 matrix as floats. */
#include "kernels/linear/dequantise.h"

void hb_embed_scalar(const hb_matrix *m, uint32_t row, float *y) {
    const uint32_t panel = row / 16, r = row % 16;
    const uint8_t *values = m->codes + panel * m->panel_codes;
    switch (m->encoding) {
        case HB_ENC_F32:
            for (uint32_t c = 0; c < m->cols; c++) memcpy(y + c, values + ((size_t)c * 16 + r) * 4, 4);
            return;
        case HB_ENC_F16:
        case HB_ENC_BF16:
            for (uint32_t c = 0; c < m->cols; c++)
                y[c] = hb_scale_at(values, (size_t)c * 16 + r, m->encoding);
            return;
        default:
            break;
    }
    float scale = 0, min = 0;
    uint32_t group = HB_NONE;
    for (uint32_t c = 0; c < m->cols; c++) {
        uint32_t g = hb_group_of(m, c);
        if (g != group) {
            group = g;
            scale = hb_group_scale(m, panel, g, r);
            min = m->mins ? hb_group_min(m, panel, g, r) : 0.0f;
        }
        float w = scale * (float)hb_level(m, panel, g, r, c);
        y[c] = m->mins ? w + min : w;
    }
}
