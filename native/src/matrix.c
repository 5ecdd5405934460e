#include "matrix.h"

#include <stdbool.h>
#include <string.h>

static const hb_encoding encodings[] = HB_ENCODING_TABLE;
static const uint16_t e4m3[256] = HB_F8E4M3_F16, e5m2[256] = HB_F8E5M2_F16;

const hb_encoding *hb_find_encoding(uint32_t number) {
    for (size_t i = 0; i < sizeof encodings / sizeof encodings[0]; i++)
        if (encodings[i].number == number) return &encodings[i];
    return NULL;
}

const char *hb_linear_family(const hb_encoding *e, int policy) {
    static const char *const by_bits[] = {"", "", "bits2", "bits3", "bits4", "bits5", "bits6", "", "bits8"};
    if (e->kind == HB_KIND_FLOAT) return "float";
    return e->kind == HB_KIND_FLOAT8 || policy == HB_POLICY_F32 ? "dequantised" : by_bits[e->bits];
}

static uint64_t align_up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

static uint64_t ceil_div(uint64_t n, uint64_t by) { return (n + by - 1) / by; }

/* The next plane of a matrix of `panels`: where it starts; *need is then where it ends. Sizes are of 64 bits
 * here, so that none wraps where addresses are of 32; they are used only once they are known to fit what is
 * there. */
static const uint8_t *take_plane(const hb_matrix *m, uint64_t panels, uint64_t panel_bytes, uint64_t *need) {
    const uint64_t at = align_up(*need, HB_ALIGNMENT);
    *need = at + panels * panel_bytes;
    return m->codes + (size_t)at;
}

bool hb_parameters_are_valid(const hb_encoding *e, uint32_t group, uint32_t scale_type) {
    if (e->scaling != HB_SCALING_ANY)
        return group == e->group &&
               scale_type == (e->scaling == HB_SCALING_F16 ? HB_SCALE_TYPE_F16 : HB_SCALE_TYPE_NONE);
    if (scale_type == HB_SCALE_TYPE_K256)
        return e->kind == HB_KIND_CODES && e->offset != HB_OFFSET_ZERO && (group == 16 || group == 32);
    if (group % 32 && group != 4 && group != 8 && group != 16) return false;
    return scale_type >= HB_SCALE_TYPE_F32 && scale_type <= HB_SCALE_TYPE_BF16;
}

static void fill_tables(const hb_encoding *e, hb_matrix *m) {
    const int8_t *level = e->levels;
    for (int i = 0; i < 16; i++) {
        switch (e->bits) {
            case 2:
                m->tables[0][i] = level[i & 3], m->tables[1][i] = level[i >> 2];
                break;
            case 6: /* modulo 256, as the sum is */
                m->tables[0][i] = level[i];
                m->tables[1][i] = (int8_t)(level[(i & 3) * 16] - level[0]);
                m->tables[2][i] = (int8_t)(level[(i >> 2) * 16] - level[0]);
                break;
            default:
                m->tables[0][i] = level[e->bits == 3 ? i & 7 : i];
                m->tables[1][i] = level[16 + i];
        }
    }
}

const char *hb_open_matrix(const hb_weight *w, hb_matrix *m) {
    memset(m, 0, sizeof *m);
    if (w->tile != HB_TILE_P16 || !w->rows || !w->cols || !w->data) return "a matrix is not in p16 tiles";
    const hb_encoding *e = hb_find_encoding(w->encoding);
    if (!e || e->kind == HB_KIND_INDEX) return "a matrix has an encoding that this library does not know";
    m->e = e, m->encoding = w->encoding, m->rows = w->rows, m->cols = w->cols, m->group = w->group;
    m->scale_type = e->scaling == HB_SCALING_F16 ? HB_SCALE_TYPE_F16 : w->scale_type, m->codes = w->data;
    const uint64_t panels = ceil_div(w->rows, 16), padded = align_up(w->cols, HB_COLUMN_PAD);
    if (e->kind == HB_KIND_FLOAT) {
        const uint64_t panel = (uint64_t)w->cols * 16 * e->bits / 8;
        m->panel_codes = (size_t)panel, m->nbytes = panels * panel;
        return w->nbytes < m->nbytes ? "a matrix has too few bytes" : NULL;
    }
    if (!hb_parameters_are_valid(e, w->group, w->scale_type))
        return "a matrix has a group or scales that this library does not know";
    fill_tables(e, m);
    if (e->kind == HB_KIND_FLOAT8) m->values = w->encoding == HB_ENC_F8E4M3 ? e4m3 : e5m2;
    const bool sub7 = e->scaling == HB_SCALING_SUB7, two_level = !sub7 && w->scale_type == HB_SCALE_TYPE_K256;
    const uint64_t scale = sub7 || two_level ? 1 : m->scale_type == HB_SCALE_TYPE_F32 ? 4 : 2;
    m->groups = w->group ? (uint32_t)ceil_div(w->cols, w->group) : 1;
    m->block = w->group && w->group < 32 ? w->group : 32;
    m->blocks = (uint32_t)ceil_div(w->cols, m->block);
    m->blocks_per_group = w->group ? w->group / m->block : m->blocks;
    m->groups_per_super = two_level ? HB_SUPER / w->group : 1;
    const uint64_t codes = padded * 16 * e->low_bits / 8, high = padded * 16 * e->high_bits / 8;
    const uint64_t scales = m->groups * 16 * scale, super = ceil_div(w->cols, HB_SUPER) * 16 * 2;
    const uint64_t zeros = (uint64_t)m->groups * 16;
    m->panel_codes = (size_t)codes, m->panel_high = (size_t)high, m->panel_scales = (size_t)scales;
    m->panel_super = (size_t)super, m->panel_zeros = (size_t)zeros;
    uint64_t need = panels * codes;
    if (high) m->high = take_plane(m, panels, high, &need);
    m->scales = take_plane(m, panels, scales, &need);
    if (two_level) m->super = take_plane(m, panels, super, &need);
    if (e->offset == HB_OFFSET_MIN) {
        m->mins = take_plane(m, panels, scales, &need);
        if (two_level) m->supermin = take_plane(m, panels, super, &need);
    }
    if (e->offset == HB_OFFSET_ZERO) m->zeros = take_plane(m, panels, zeros, &need);
    if (sub7) m->row = take_plane(m, panels, 16, &need);
    m->nbytes = need;
    return w->nbytes < need ? "a matrix has too few bytes" : NULL;
}
