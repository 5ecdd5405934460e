/* Where a panel's codes and factors come from: the planes of a p16 matrix, opened for one kernel. A quad of
 * codes is compiled for each width of code; scales, minima and zero points are told apart as they are read,
 * once a group. */
#ifndef HB_SOURCE_H
#define HB_SOURCE_H

#include <stdbool.h>

#include "kernels/linear/quad.h"

/* Bits of a code. */
typedef enum { UNPACKED = 0, BITS2 = 2, BITS3, BITS4, BITS5, BITS6, BITS8 = 8 } family;

typedef struct {
    const hb_matrix *m;
    uint32_t panel;
    const uint8_t *codes, *high, *scales;
    v16 row;    /* sub7: the scales of the rows */
    vi16 shift; /* sub7: what the shift bit of a group adds to its levels */
    bool sub7;
    bool plain;     /* a binary16 scale a group and nothing else */
    quad flip;      /* 8 bits: what makes a stored code a quad's byte */
    quad tables[3]; /* fewer bits: m->tables */
    quad shifts;    /* what a kernel adds to all codes of a row and group, where it does */
    int32_t offset; /* what the quads lack */
} source;

/* Everything of a block of columns but its codes. */
typedef struct {
    v16 scale, min;
    vi16 offset;
} factors;

/* The source of a panel but what only quads need. */
HB_INLINE source source_open(const hb_matrix *m, uint32_t panel) {
    const bool is_unsigned = m->e->bits == 8 && !m->e->is_signed;
    source s = {.m = m, .panel = panel};
    s.codes = m->codes + panel * m->panel_codes;
    s.high = m->high ? m->high + panel * m->panel_high : NULL;
    s.scales = m->scales + panel * m->panel_scales;
    s.row = m->row ? v16_load_e6m2(m->row + panel * 16u) : v16_zero();
    s.shift = vi16_set1(m->e->shift);
    s.sub7 = m->row;
    s.plain = m->scale_type == HB_SCALE_TYPE_F16 && !m->mins && !m->zeros;
    s.offset = is_unsigned ? QUAD_OFFSET_UNSIGNED : QUAD_OFFSET_SIGNED;
    return s;
}

/* What quads need of it. */
HB_INLINE void source_tables(const family f, source *s) {
    const hb_matrix *m = s->m;
    if (f == BITS8) {
        s->flip = quad_set1(m->e->is_signed ? QUAD_FLIP_SIGNED : QUAD_FLIP_UNSIGNED);
        return;
    }
    s->tables[0] = quad_table(m->tables[0]);
    if (f == BITS2 || f == BITS5) s->tables[1] = quad_table(m->tables[1]);
    if (f == BITS6) { /* of the parts that are added, the first has what QUAD_OFFSET_SIGNED is */
        s->tables[1] = quad_xor(quad_table(m->tables[1]), quad_set1(QUAD_FLIP_SIGNED));
        s->tables[2] = quad_xor(quad_table(m->tables[2]), quad_set1(QUAD_FLIP_SIGNED));
    }
}

/* Bytes of the low plane of 32 columns. */
HB_INLINE size_t source_bytes(const family f) {
    return f == BITS3 ? 128 : f == BITS5 || f == BITS6 ? 256 : f * 64;
}

/* Asks for codes that a kernel comes to some microseconds later; after a panel comes the next. The
 * processor's own prefetching stops at pages and is late when several tokens share the codes. */
HB_INLINE void source_fetch(const family f, const source *s, uint32_t i) {
    enum { AHEAD = 6144 }; /* bytes of the low plane: 4096 to 16384 are as good, 1024 is not enough */
    const size_t bytes = source_bytes(f), high = f == BITS6 ? 128 : f == BITS3 || f == BITS5 ? 64 : 0;
    HB_UNROLL
    for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(s->codes + i * bytes + AHEAD + at, 0, 3);
    HB_UNROLL
    for (size_t at = 0; at < high; at += 64)
        __builtin_prefetch(s->high + i * high + AHEAD * high / bytes + at, 0, 3);
}

/* Quad k of the 8 of columns 32 * i onwards: the planes of SPEC.md section 6. */
HB_INLINE quad source_quad(const family f, const source *s, uint32_t i, const int k) {
    const uint8_t *p = s->codes + i * source_bytes(f);
    if (f == BITS8) return quad_xor(quad_load(p + 64 * k), s->flip);
    if (f == BITS2) {
        /* the nibble of two codes is the index; a table for each of them */
        return quad_lookup(s->tables[k & 1], quad_field(quad_load(p + k / 4 * 64), 2 * (k & 2), 15));
    }
    if (f == BITS3) {
        quad low = quad_field(quad_load(p + k / 4 * 64), 2 * (k & 3), 3);
        quad high = quad_field(quad_load(s->high + (size_t)i * 64), k - 2, 4);
        return quad_lookup(s->tables[0], quad_or(low, high));
    }
    quad low = quad_field(quad_load(p + k / 2 * 64), 4 * (k & 1), 15);
    if (f == BITS5) return quad_lookup_32(s->tables, low, quad_load(s->high + (size_t)i * 64), k);
    quad w = quad_lookup(s->tables[0], low);
    if (f == BITS6) { /* linear, so the levels of both parts add up */
        quad high = quad_load(s->high + (size_t)i * 128 + k / 4 * 64);
        w = quad_add(w, quad_lookup(s->tables[1 + (k & 1)], quad_field(high, 2 * (k & 2), 15)));
    }
    return w;
}

/* Group g of any scale type and offset; a call, because there are many combinations, each little used. */
static __attribute__((noinline)) void load_factors(const hb_matrix *m, uint32_t panel, uint32_t g,
                                                   int32_t offset, factors *out) {
    const uint8_t *scales = m->scales + panel * m->panel_scales;
    const uint8_t *mins = m->mins ? m->mins + panel * m->panel_scales : NULL;
    const size_t at = (size_t)g * 16;
    if (m->super) {
        const uint32_t above = g / m->groups_per_super;
        const vi16 sign = vi16_set1(mins ? 0 : 128); /* bytes are signed where there is no minimum */
        vi16 k = vi16_and(vi16_add(vi16_load_u8(scales + at), sign), vi16_set1(255));
        v16 super = v16_load_scale(m->super + panel * m->panel_super, above, HB_ENC_F16);
        out->scale = v16_mul(super, v16_from_int(vi16_sub(k, sign)));
        if (mins) {
            super = v16_load_scale(m->supermin + panel * m->panel_super, above, HB_ENC_F16);
            out->min = v16_mul(v16_mul(v16_set1(-1.0f), super), v16_from_int(vi16_load_u8(mins + at)));
        }
    } else {
        out->scale = v16_load_scale(scales, g, m->scale_type);
        if (mins) out->min = v16_load_scale(mins, g, m->scale_type);
    }
    out->offset = vi16_set1(offset);
    if (m->zeros) out->offset = vi16_sub(out->offset, vi16_load_u8(m->zeros + panel * m->panel_zeros + at));
}

HB_INLINE factors source_factors(const source *s, uint32_t g) {
    factors out;
    out.min = v16_zero();
    out.offset = vi16_set1(s->offset);
    if (s->sub7) {
        vi16 b = vi16_load_u8(s->scales + (size_t)g * 16);
        vi16 k = vi16_sub(vi16_and(b, vi16_set1(254)), vi16_set1(127));
        vi16 bit = vi16_sub(vi16_zero(), vi16_and(b, vi16_set1(1)));
        out.scale = v16_mul(s->row, v16_from_int(k));
        out.offset = vi16_add(out.offset, vi16_and(bit, s->shift));
    } else if (s->plain) {
        out.scale = v16_load_scale(s->scales, g, HB_ENC_F16);
    } else {
        factors loaded;
        loaded.min = out.min;
        load_factors(s->m, s->panel, g, s->offset, &loaded);
        out = loaded;
    }
    return out;
}

/* The 8 quads of columns 32 * i onwards, `shift` added to the levels of each row; where `zip`, as the
 * multiplication of unpacked codes wants them. */
HB_INLINE void store_quads(const family f, const source *of, uint32_t i, vi16 shift, bool zip, uint8_t *out) {
    source s = *of;
    source_tables(f, &s);
    HB_UNROLL
    for (int k = 0; k < 8; k += 2) {
        quad w[2];
        w[0] = quad_add_rows(source_quad(f, &s, i, k), shift);
        w[1] = quad_add_rows(source_quad(f, &s, i, k + 1), shift);
#if defined(QUAD_BY_TWO)
        if (zip) quad_zip(w);
#else
        (void)zip;
#endif
        quad_store(out + 64 * k, w[0]);
        quad_store(out + 64 * k + 64, w[1]);
    }
}

static __attribute__((noinline)) void source_store(const source *s, uint32_t i, vi16 shift, bool zip,
                                                   uint8_t *out) {
    switch (s->m->e->bits) {
        case 2:
            store_quads(BITS2, s, i, shift, zip, out);
            return;
        case 3:
            store_quads(BITS3, s, i, shift, zip, out);
            return;
        case 4:
            store_quads(BITS4, s, i, shift, zip, out);
            return;
        case 5:
            store_quads(BITS5, s, i, shift, zip, out);
            return;
        case 6:
            store_quads(BITS6, s, i, shift, zip, out);
            return;
        default:
            store_quads(BITS8, s, i, shift, zip, out);
            return;
    }
}

/* A run of unpacked columns of up to QUAD_PANELS panels, one after the other: 64 bytes a quad, then per block
 * its scale, minimum and offset. */
enum {
    PANEL_COLS = HB_CHUNK_COLS / QUAD_PANELS,
    PANEL_CODES = PANEL_COLS * 16,
    PANEL_BLOCKS = PANEL_COLS / 4
};

typedef struct {
    uint8_t *codes;
    float *scale, *min;
    int32_t *offset;
    float *y;       /* [tokens][panels][16] */
    uint32_t panel; /* the first */
} unpacked;

HB_INLINE unpacked scratch_layout(void *scratch) {
    unpacked u;
    u.codes = scratch;
    u.scale = (float *)(void *)(u.codes + HB_CHUNK_COLS * 16);
    u.min = u.scale + HB_CHUNK_COLS / 4 * 16;
    u.offset = (int32_t *)(void *)(u.min + HB_CHUNK_COLS / 4 * 16);
    u.y = (float *)(void *)(u.offset + HB_CHUNK_COLS / 4 * 16);
    u.panel = 0;
    return u;
}

HB_INLINE unpacked scratch_panel(unpacked u, uint32_t p) {
    u.codes += (size_t)p * PANEL_CODES;
    u.scale += (size_t)p * PANEL_BLOCKS * 16;
    u.min += (size_t)p * PANEL_BLOCKS * 16;
    u.offset += (size_t)p * PANEL_BLOCKS * 16;
    return u;
}

/* Unpacks blocks b0 <= b < b1. The shifts of sub7 go into the codes, so that offsets stay uniform. */
static void unpack(const source *s, uint32_t b0, uint32_t b1, const unpacked *u) {
    const hb_matrix *m = s->m;
    const uint32_t per32 = 32 / m->block;
    for (uint32_t b = b0; b < b1; b++) {
        size_t at = (size_t)(b - b0) * 16;
        factors a = source_factors(s, b / m->blocks_per_group);
        v16_store(u->scale + at, a.scale);
        if (m->mins) v16_store(u->min + at, a.min);
        if (m->zeros || m->block < 32 || s->offset != QUAD_OFFSET_SIGNED)
            vi16_store(u->offset + at, m->zeros ? a.offset : vi16_set1(s->offset));
        if (b % per32) continue;
        vi16 shift = m->row ? vi16_sub(a.offset, vi16_set1(s->offset)) : vi16_zero();
        source_store(s, b / per32, shift, m->block > 4, u->codes + (size_t)(b - b0) / per32 * 512);
    }
}

#endif
