/* What a kernel is given, and the declarations of all of them. A kernel never allocates, never makes threads
 * and never prints; its scratch memory comes from the program. */
#ifndef HB_KERNELS_H
#define HB_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "halfbyte_ops.h"

enum { HB_QUANT_GROUP = 32 };     /* columns that share an activation scale */
enum { HB_TOKEN_TILE = 24 * 12 }; /* most tokens of one call of a linear kernel */
enum { HB_PANELS = 8 };           /* most panels of one call of a linear kernel */
enum { HB_CHUNK_COLS = 1024 };    /* columns that are unpacked at a time, of all panels of a task */
enum { HB_FLOAT_CHUNK_COLS = 256 };
enum { HB_PAGE = HB_PAGE_POSITIONS };
enum { HB_MAX_HEAD = 4096 };      /* the widest head, a limit of files */
enum { HB_SEGMENT = 16 };         /* pages of one running softmax */
enum { HB_ATTEND_QUERIES = 128 }; /* rows times heads of one task, unless one row has more heads */
enum { HB_ALL_SEGMENTS = 0xffffffffu };
enum { /* unpacked codes, then scale, minimum and offset of every 4 columns, and sums */
       HB_LINEAR_SCRATCH = HB_CHUNK_COLS * 16 + 3 * (HB_CHUNK_COLS / 4) * 64 + HB_TOKEN_TILE * HB_PANELS * 64
};

/* A p16 matrix, taken apart into planes. `panel_*` are the bytes of one panel of 16 rows of a plane. */
typedef struct hb_matrix {
    const hb_encoding *e; /* its row of the encoding table */
    const uint8_t *codes; /* or the values of a float encoding */
    /* Upper bits of codes of 3, 5 and 6 bits. Of this plane and those that follow, absent ones are NULL. */
    const uint8_t *high;
    const uint8_t *scales;
    const uint8_t *mins;
    const uint8_t *zeros;
    const uint8_t *row;
    const uint8_t *super, *supermin;
    uint32_t encoding, rows, cols, group, scale_type;
    uint32_t groups;           /* scales in a row */
    uint32_t block;            /* columns of one integer dot: min(32, group) */
    uint32_t blocks;           /* of a row */
    uint32_t blocks_per_group; /* blocks that share a scale */
    uint32_t groups_per_super; /* scales that share a super scale */
    size_t panel_codes, panel_high, panel_scales, panel_zeros, panel_super;
    uint64_t nbytes; /* of all planes, padding between them included */
    /* The levels by what a kernel looks up: 2 bits, those of the first and of the second code of a nibble;
     * 3 to 5 bits, the levels in order; 6 bits, those of the lower four and, for either code of a nibble,
     * what the upper two add. */
    int8_t tables[3][16];
    const uint16_t *values; /* of 8-bit floats: those of the 256 codes, as binary16 */
} hb_matrix;

/* Quantised activations lie in strips of up to HB_STRIP tokens, so that a kernel reads them with one pointer:
 * per 32 columns a record of `width` tokens, q int8[width][32], d float[width], then for every block of
 * columns bias int32[width] = -128 * sum of q, and again for every block sums int32[width]. */
enum { HB_STRIP = 12 };

typedef struct hb_strips {
    uint8_t *data;
    uint32_t width;      /* tokens of a strip: HB_STRIP, or all of a shorter step */
    uint32_t block;      /* columns of a block */
    size_t record_bytes; /* of 32 columns */
    size_t strip_bytes;
} hb_strips;

static inline hb_strips hb_strips_layout(uint8_t *data, uint32_t tokens, uint32_t cols, uint32_t block) {
    hb_strips s = {data, tokens < HB_STRIP ? tokens : HB_STRIP, block, 0, 0};
    s.record_bytes = (size_t)s.width * (32 + 4 + 2 * 4 * (32 / block));
    s.strip_bytes = s.record_bytes * ((cols + 31u) / 32u);
    return s;
}

/* y[t, :] = x[t, :] @ matrix^T + bias. Strides (ld*) are in elements. */
typedef struct hb_linear {
    const hb_matrix *matrix;
    const float *bias;
    const float *x; /* float kernels */
    size_t ldx;
    hb_strips strips; /* integer kernels: x, quantised */
    float *y;
    size_t ldy;
} hb_linear;

/* Where the parts of a head of keys and values lie in a page (formats/kv_modes.py). `packed`: codes, each
 * part with a scale byte a position; otherwise floats of one type. `signs` only where k->rest. */
typedef struct hb_page {
    const hb_side *k, *v;
    bool packed;
    size_t k_scales, values, v_scales, signs, sign_scales, head_bytes;
} hb_page;

static const hb_side hb_sides[HB_SIDE_COUNT] = HB_SIDE_TABLE;

/* Whether a word of an hb_kv is one: packed forms, or the same float twice; signs only of keys after the
 * first page. */
static inline bool hb_page_word_is_valid(uint32_t word) {
    for (uint32_t w = word, i = 0; i < 4; i++, w >>= 8)
        if ((w & 255) >= HB_SIDE_COUNT || !hb_sides[w & 255].rule != !hb_sides[word & 255].rule ||
            (i && hb_sides[w & 255].rest > 0))
            return false;
    return hb_sides[word & 255].rule || word == (word & 255) * 0x01010101u;
}

static inline hb_page hb_page_of(uint32_t word, uint32_t index, uint32_t k_dim, uint32_t v_dim) {
    if (index == 0) word >>= 16;
    hb_page p = {.k = &hb_sides[word & 255], .v = &hb_sides[word >> 8 & 255]};
    p.packed = p.k->rule;
    const uint32_t k_cols = p.packed ? (k_dim + 31) / 32 * 32 : k_dim;
    const uint32_t v_cols = p.packed ? (v_dim + 15) / 16 * 16 : v_dim;
    p.k_scales = (size_t)HB_PAGE * k_cols * p.k->bits / 8;
    p.values = p.k_scales + (p.packed ? HB_PAGE : 0);
    p.v_scales = p.values + (size_t)HB_PAGE * v_cols * p.v->bits / 8;
    p.signs = p.v_scales + (p.packed ? HB_PAGE : 0);
    p.sign_scales = p.signs + (p.k->rest > 0 ? (size_t)HB_PAGE * k_cols / 8 : 0);
    p.head_bytes = p.sign_scales + (p.k->rest > 0 ? HB_PAGE : 0);
    return p;
}

/* Rows of queries against their sessions' caches. */
typedef struct hb_attend {
    const float *q;
    float *y;
    size_t ldq, ldy;
    uint32_t kv_heads, share, k_dim, v_dim, window, cache;
    float scale, softcap;
    const int32_t *positions;
    const int32_t *sessions;
    const struct hb_kv *kv;
    uint32_t segments; /* of the longest row, and room for the sums of each, when they are computed apart */
    float *partial;
} hb_attend;

/* Where the sums of a segment lie: for each head the maximum, the total, 14 unused values and the columns. */
static inline float *hb_attend_partial(const hb_attend *op, uint32_t t, uint32_t kv_head, uint32_t segment) {
    const size_t each = (size_t)op->share * ((op->v_dim + 15u) / 16u * 16u + 16);
    return op->partial + (((size_t)t * op->kv_heads + kv_head) * op->segments + segment) * each;
}

/* Quantises one row of x as token `lane` of the strip that starts at s->data. */
typedef void hb_quantize_fn(const float *x, uint32_t cols, const hb_strips *s, uint32_t lane);
/* Panels panel <= p < end, at most HB_PANELS, of the output of tokens t0 <= t < t1, at most HB_TOKEN_TILE. */
typedef void hb_linear_fn(const hb_linear *op, uint32_t panel, uint32_t end, uint32_t t0, uint32_t t1,
                          void *scratch);
typedef void hb_embed_fn(const hb_matrix *table, uint32_t row, float *y);
typedef void hb_rmsnorm_fn(const float *x, const float *weight, float eps, uint32_t width, uint32_t dim,
                           float *y);
typedef void hb_layernorm_fn(const float *x, const float *weight, const float *bias, float eps,
                             uint32_t width, uint32_t dim, float *y);
typedef void hb_add_fn(const float *a, const float *b, float scale, uint32_t n, float *y);
typedef void hb_mul_fn(const float *a, const float *b, uint32_t n, float *y);
typedef void hb_unary_fn(const float *x, uint32_t n, uint32_t function, float p, float *y);
typedef void hb_glu_fn(const float *gate, const float *up, uint32_t n, uint32_t function, float *y);
typedef void hb_gather_fn(const float *x, const uint32_t *index, uint32_t n, float *y);
typedef void hb_hadamard_fn(const float *x, uint32_t width, uint32_t dim, float *y);
typedef void hb_rope_fn(const float *x, uint32_t heads, uint32_t head_dim, uint32_t n, const float *cosine,
                        const float *sine, float *y);
/* Position `at` of a page, whose part of this head of keys and values starts at `head`. */
typedef void hb_kv_put_fn(const hb_page *page, const float *k, const float *v, uint32_t k_dim, uint32_t v_dim,
                          uint32_t at, char *head);
/* Rows t and on, of one session at consecutive positions, and `heads` heads of keys and values: one segment
 * into op->partial, or HB_ALL_SEGMENTS. Either `rows` is at most hb_attend_rows and `heads` is 1, or the
 * reverse. */
typedef void hb_attend_fn(const hb_attend *op, uint32_t t, uint32_t rows, uint32_t head, uint32_t heads,
                          uint32_t segment, void *scratch);
typedef void hb_attend_merge_fn(const hb_attend *op, uint32_t t, uint32_t kv_head, void *scratch);

#define HB_KERNEL(op, family, isa, function) hb_##op##_fn function;
#include "kernels/kernels.inc"
#undef HB_KERNEL

/* Rows of one task of ATTEND, and the bytes of scratch that its kernel needs. */
static inline uint32_t hb_attend_rows(uint32_t share) {
    return share < HB_ATTEND_QUERIES ? HB_ATTEND_QUERIES / share : 1;
}
static inline size_t hb_attend_scratch(uint32_t share, uint32_t kv_heads, uint32_t k_dim, uint32_t v_dim) {
    const uint32_t most = hb_attend_rows(share);
    const size_t n = (size_t)share * (most > kv_heads ? most : kv_heads), stride = (v_dim + 15u) / 16u * 16u;
    const size_t k_cols = (k_dim + 31u) / 32u * 32u;
    const size_t floats = n * (HB_PAGE + 2 * stride + k_dim) + 4 * (n + 16) + HB_PAGE * (stride + k_dim);
    const size_t packed =
        2 * n * (2 * k_cols + HB_PAGE) + 12 * n * sizeof(float) + HB_PAGE * (k_cols + stride);
    return floats * sizeof(float) + packed + 128; /* two parts start on a cache line */
}

#endif
