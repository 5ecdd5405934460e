#include <math.h>
#include <string.h>

#include "file.h"

static const hb_op_rule rules[] = HB_OP_TABLE;

/* Columns of a base slot that some record has written: disjoint, not adjacent, in order. */
typedef struct interval {
    uint32_t start, end;
    uint32_t next; /* index + 1; 0 ends the list */
} interval;

typedef struct checker {
    const hb_file *f;
    interval *intervals;
    uint32_t *written; /* of each slot that is a base: its first interval, index + 1 */
    uint8_t *filled;   /* caches */
    uint32_t interval_count, record;
    const hb_op_rule *rule;
} checker;

static int refuse(const checker *c, const char *why) {
    return hb_fail(HB_ERROR_FORMAT, "program record %u (%s): %s", c->record, c->rule ? c->rule->name : "?",
                   why);
}

static int check_slots(const hb_file *f) {
    uint64_t total = 0;
    if (f->slot_count > HB_MAX_SLOTS) return hb_fail(HB_ERROR_FORMAT, "%u slots are too many", f->slot_count);
    for (uint32_t i = 0; i < f->slot_count; i++) {
        const hb_slot *s = &f->slots[i];
        const char *why = NULL;
        if (!s->width || s->width > HB_MAX_WIDTH)
            why = "its width is out of range";
        else if (s->rows != HB_ROWS_TOKENS && s->rows != HB_ROWS_PICKS)
            why = "unknown kind of rows";
        else if (s->base == i)
            why = s->offset                              ? "a base slot has an offset"
                  : (total += s->width) > HB_MAX_COLUMNS ? "too wide"
                                                         : NULL;
        else if (s->base >= f->slot_count || f->slots[s->base].base != s->base)
            why = "its base is not a base slot";
        else if (s->rows != f->slots[s->base].rows ||
                 (uint64_t)s->offset + s->width > f->slots[s->base].width)
            why = "it does not lie inside its base";
        if (why) return hb_fail(HB_ERROR_FORMAT, "slot %u: %s", i, why);
    }
    return HB_OK;
}

static int check_caches(const hb_file *f) {
    if (f->cache_count > HB_MAX_CACHES)
        return hb_fail(HB_ERROR_FORMAT, "%u caches are too many", f->cache_count);
    for (uint32_t i = 0; i < f->cache_count; i++) {
        const hb_cache *c = &f->caches[i];
        if (c->kv_heads - 1 >= HB_MAX_HEAD_DIM || c->k_dim - 1 >= HB_MAX_HEAD_DIM ||
            c->v_dim - 1 >= HB_MAX_HEAD_DIM)
            return hb_fail(HB_ERROR_FORMAT, "cache %u: a size is out of range", i);
    }
    return HB_OK;
}

static bool is_written(const checker *c, uint32_t slot) {
    const hb_slot *s = &c->f->slots[slot];
    for (uint32_t i = c->written[s->base]; i; i = c->intervals[i - 1].next)
        if (c->intervals[i - 1].end >= s->offset + s->width) return c->intervals[i - 1].start <= s->offset;
    return false;
}

static void mark_written(checker *c, uint32_t slot) {
    const hb_slot *s = &c->f->slots[slot];
    uint32_t start = s->offset, end = s->offset + s->width, *link = &c->written[s->base];
    while (*link && c->intervals[*link - 1].end < start) link = &c->intervals[*link - 1].next;
    uint32_t rest = *link;
    while (rest && c->intervals[rest - 1].start <= end) { /* joined with the new one */
        const interval *v = &c->intervals[rest - 1];
        start = v->start < start ? v->start : start, end = v->end > end ? v->end : end;
        rest = v->next;
    }
    c->intervals[c->interval_count] = (interval){start, end, rest};
    *link = ++c->interval_count;
}

static bool overlap(const hb_slot *a, const hb_slot *b) {
    return a->base == b->base && a->offset < b->offset + b->width && b->offset < a->offset + a->width;
}

static float attr_float(const hb_op *op, int i) {
    float value;
    memcpy(&value, &op->attr[i], 4);
    return value;
}

static const char *check_operands(const checker *c, const hb_op *op) {
    const hb_op_rule *r = c->rule;
    for (uint32_t i = 0; i < 2; i++)
        if (i < r->outs ? op->out[i] >= c->f->slot_count : op->out[i] != HB_NONE) return "a wrong output";
    for (uint32_t i = 0; i < 4; i++) {
        if (i < r->ins ? op->in[i] >= c->f->slot_count : op->in[i] != HB_NONE) return "a wrong input";
        if (op->w[i] == HB_NONE ? r->weights >> i & 1
                                : !(r->optional_weights >> i & 1) || op->w[i] >= c->f->tensor_count)
            return "a wrong tensor";
        if (i >= r->attr_count) {
            if (op->attr[i]) return "an unused attribute is not zero";
        } else if (r->attr_kinds[i] == 1) {
            if (!isfinite(attr_float(op, (int)i))) return "an attribute is not finite";
        } else if (r->attr_kinds[i] == 2 && (op->attr[i] < HB_FN_SCALE || op->attr[i] > HB_FN_TANH)) {
            return "unknown function";
        }
    }
    for (uint32_t i = 0; i < r->ins; i++) {
        const hb_slot *in = &c->f->slots[op->in[i]];
        if (!is_written(c, op->in[i])) return "a slot is read before it is written";
        for (uint32_t o = 0; o < r->outs; o++) {
            const hb_slot *out = &c->f->slots[op->out[o]];
            if (overlap(in, out) && !(r->in_place && in->offset == out->offset && in->width == out->width))
                return "an output overlaps an input";
        }
    }
    return NULL;
}

static bool is_vector(const checker *c, uint32_t w, uint32_t n) {
    if (w == HB_NONE) return true;
    const hb_tensor *t = &c->f->tensors[w];
    return t->tile == HB_TILE_ROWS && t->encoding == HB_ENC_F32 && t->shape[0] == n;
}

static const char *check_rows(const checker *c, const hb_op *op) {
    const hb_slot *slots = c->f->slots;
    const uint32_t kind = c->rule->outs ? slots[op->out[0]].rows : slots[op->in[0]].rows;
    if (op->code == HB_OP_PICK)
        return slots[op->in[0]].rows == HB_ROWS_TOKENS && kind == HB_ROWS_PICKS
                   ? NULL
                   : "must take token rows to picked rows";
    for (uint32_t i = 0; i < c->rule->ins; i++)
        if (slots[op->in[i]].rows != kind) return "operands disagree on what a row is";
    const bool tokens_only = op->code == HB_OP_EMBED || op->code == HB_OP_ROPE || op->code == HB_OP_KV_PUT ||
                             op->code == HB_OP_ATTEND;
    return tokens_only && kind != HB_ROWS_TOKENS ? "works on token rows only" : NULL;
}

/* The largest element of a u32 vector is below n. */
static bool reaches(const checker *c, uint32_t w, uint32_t count, uint32_t n) {
    const hb_tensor *t = &c->f->tensors[w];
    if (t->encoding != HB_ENC_U32 || t->shape[0] != count) return false;
    const uint32_t *v = (const uint32_t *)(c->f->data.data + t->offset);
    for (uint32_t i = 0; i < count; i++)
        if (v[i] >= n) return false;
    return true;
}

static const char *check_cache_use(checker *c, const hb_op *op, const uint32_t *width, uint32_t out) {
    if (op->attr[0] >= c->f->cache_count) return "the cache does not exist";
    const hb_cache *k = &c->f->caches[op->attr[0]];
    if (op->code == HB_OP_KV_PUT) {
        if (width[0] != k->kv_heads * k->k_dim || width[1] != k->kv_heads * k->v_dim)
            return "the widths do not fit the cache";
        if (c->filled[op->attr[0]]) return "the cache is filled twice";
        c->filled[op->attr[0]] = 1;
        return NULL;
    }
    const uint32_t heads = width[0] / k->k_dim;
    if (width[0] % k->k_dim || heads % k->kv_heads || out != (uint64_t)heads * k->v_dim)
        return "the widths do not fit the cache";
    if (!c->filled[op->attr[0]]) return "the cache is read before it is filled";
    return attr_float(op, HB_ATTR_ATTEND_SOFTCAP) < 0 ? "softcap is negative" : NULL;
}

static const char *check_shapes(checker *c, const hb_op *op) {
    const hb_file *f = c->f;
    uint32_t width[4] = {0};
    const uint32_t out = c->rule->outs ? f->slots[op->out[0]].width : 0, w = op->w[0];
    for (uint32_t i = 0; i < c->rule->ins; i++) width[i] = f->slots[op->in[i]].width;
    switch (op->code) {
        case HB_OP_EMBED:
            return f->tensors[w].tile == HB_TILE_P16 && f->tensors[w].shape[1] == out &&
                           f->tensors[w].shape[0] >= f->vocab_size
                       ? NULL
                       : "the table does not fit";
        case HB_OP_LINEAR:
            return f->tensors[w].tile == HB_TILE_P16 && f->tensors[w].shape[1] == width[0] &&
                           f->tensors[w].shape[0] == out && is_vector(c, op->w[1], out)
                       ? NULL
                       : "the matrix or the bias does not fit";
        case HB_OP_GLU:
            if (op->attr[0] == HB_FN_SCALE || op->attr[0] == HB_FN_SOFTCAP)
                return "the function takes a parameter";
            return width[0] == 2 * (uint64_t)out ? NULL : "the input is not twice as wide";
        case HB_OP_KV_PUT:
        case HB_OP_ATTEND:
            return check_cache_use(c, op, width, out);
        case HB_OP_GATHER:
            return reaches(c, w, out, width[0]) ? NULL : "the index does not fit";
        default:
            break;
    }
    for (uint32_t i = 0; i < c->rule->ins; i++)
        if (width[i] != out) return "the widths differ";
    if (op->code == HB_OP_RMSNORM || op->code == HB_OP_LAYERNORM) {
        const uint32_t dim = op->attr[HB_ATTR_RMSNORM_DIM];
        if (!dim || out % dim || !(attr_float(op, HB_ATTR_RMSNORM_EPS) >= 0))
            return "dim or eps is out of range";
        return is_vector(c, op->w[0], dim) && is_vector(c, op->w[1], dim) ? NULL : "a weight does not fit";
    }
    if (op->code == HB_OP_UNARY && op->attr[0] == HB_FN_SOFTCAP && !(attr_float(op, HB_ATTR_UNARY_P) > 0))
        return "softcap needs p > 0";
    if (op->code == HB_OP_ROPE) {
        const uint32_t head = op->attr[HB_ATTR_ROPE_HEAD_DIM], n = f->tensors[w].shape[0];
        if (!head || head > HB_MAX_HEAD_DIM || out % head) return "head_dim is out of range";
        return is_vector(c, w, n) && 2 * (uint64_t)n <= head ? NULL : "inv_freq does not fit";
    }
    if (op->code == HB_OP_HADAMARD) {
        const uint32_t dim = op->attr[HB_ATTR_HADAMARD_DIM];
        if (!dim || dim & (dim - 1) || out % dim) return "dim is not a power of two that divides the width";
    }
    return NULL;
}

static int check_records(checker *c) {
    const hb_file *f = c->f;
    for (c->record = 0; c->record < f->op_count; c->record++) {
        const hb_op *op = &f->ops[c->record];
        c->rule = NULL;
        for (size_t i = 0; i < sizeof rules / sizeof rules[0]; i++)
            if (rules[i].code == op->code) c->rule = &rules[i];
        if (!c->rule) return refuse(c, "unknown op");
        const char *why = op->flags ? "unknown flags" : check_operands(c, op);
        if (!why) why = check_rows(c, op);
        if (!why) why = check_shapes(c, op);
        if (why) return refuse(c, why);
        for (uint32_t o = 0; o < c->rule->outs; o++) mark_written(c, op->out[o]);
    }
    const hb_slot *last = c->rule->outs ? &f->slots[f->ops[f->op_count - 1].out[0]] : NULL;
    if (!last || last->width != f->vocab_size || last->rows != HB_ROWS_PICKS)
        return hb_fail(HB_ERROR_FORMAT,
                       "the last record does not produce logits of %u columns for picked rows",
                       f->vocab_size);
    return HB_OK;
}

int hb_check_program(const hb_file *f) {
    if (!f->op_count || f->op_count > HB_MAX_RECORDS)
        return hb_fail(HB_ERROR_FORMAT, "a program of %u records is out of range", f->op_count);
    int status = check_caches(f);
    if (!status) status = check_slots(f);
    if (status) return status;
    hb_block block = {NULL, 0};
    checker c = {.f = f};
    for (int pass = 0; pass < 2; pass++) {
        block.used = 0;
        c.intervals = hb_take(&block, 2 * f->op_count, sizeof *c.intervals);
        c.written = hb_take(&block, f->slot_count, sizeof *c.written);
        c.filled = hb_take(&block, f->cache_count, 1);
        if (!pass && !(block.base = hb_allocate(&f->allocator, block.used)))
            return hb_fail(HB_ERROR_MEMORY, "no memory to open the file");
    }
    memset(block.base, 0, block.used);
    status = check_records(&c);
    hb_release(&f->allocator, block.base);
    return status;
}
