#include "bind.h"

#include <stdio.h>
#include <string.h>

#include "cpu.h"
#include "matrix.h"

#define HB_KERNEL(op, family, isa, function) \
    {#op, #family, HB_ISA_##isa, #function, (void (*)(void))function},
const hb_kernel_row hb_kernel_rows[] = {
#include "kernels/kernels.inc"
};
#undef HB_KERNEL
const int hb_kernel_rows_count = (int)(sizeof hb_kernel_rows / sizeof hb_kernel_rows[0]);

const hb_kernel_row *hb_choose(const char *op, const char *family, int isa) {
    const int limit = hb_cpu_rank(isa);
    for (int i = 0; i < hb_kernel_rows_count; i++) {
        const hb_kernel_row *r = &hb_kernel_rows[i];
        if (hb_cpu_rank(r->isa) <= limit && !strcmp(r->op, op) && !strcmp(r->family, family) &&
            hb_cpu_supports(r->isa))
            return r;
    }
    return NULL;
}

static size_t align_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

static float attr_float(const hb_op *op, int i) {
    float f;
    memcpy(&f, &op->attr[i], 4);
    return f;
}

static uint32_t share_angles(hb_program *p, const float *inv_freq, uint32_t n, float mscale) {
    for (uint32_t i = 0; i < p->angles_count; i++) {
        hb_angles *a = &p->angles[i];
        if (a->inv_freq == inv_freq && a->n == n && a->mscale == mscale) return i;
    }
    p->angles[p->angles_count] = (hb_angles){inv_freq, n, mscale, NULL, false};
    return p->angles_count++;
}

static const char *bind_op(hb_program *p, hb_bound *b, const hb_weight *weights, uint32_t weight_count) {
    const hb_op *op = &b->op;
    for (int i = 0; i < 4; i++) {
        if (op->in[i] != HB_NONE && op->in[i] >= p->slot_count) return "a slot does not exist";
        if (op->w[i] != HB_NONE && op->w[i] >= weight_count) return "a tensor does not exist";
    }
    if (op->out[0] != HB_NONE && op->out[0] >= p->slot_count) return "a slot does not exist";
    const int vectors = op->code == HB_OP_LINEAR ? 1 : 0; /* where vector operands start */
    if (op->code == HB_OP_LINEAR || op->code == HB_OP_EMBED) {
        if (op->w[0] == HB_NONE) return "the matrix is missing";
        const char *why = hb_open_matrix(&weights[op->w[0]], &b->matrix);
        if (why) return why;
    }
    const bool has_vectors =
        op->code == HB_OP_RMSNORM || op->code == HB_OP_LAYERNORM || op->code == HB_OP_ROPE;
    for (int i = 0; i < 2 && (has_vectors || vectors); i++) {
        uint32_t w = op->w[vectors + i];
        if (w == HB_NONE) continue;
        if (weights[w].encoding != HB_ENC_F32 || weights[w].tile != HB_TILE_ROWS)
            return "a vector is not f32";
        b->vector[i] = weights[w].data;
        if (i == 0) b->vector_cols = weights[w].cols;
    }
    switch (op->code) {
        case HB_OP_GATHER: {
            if (op->w[0] == HB_NONE) return "the index is missing";
            const hb_weight *w = &weights[op->w[0]];
            if (w->encoding != HB_ENC_U32 || w->tile != HB_TILE_ROWS ||
                w->cols != p->slots[op->out[0]].width || w->nbytes < (uint64_t)w->cols * 4)
                return "an index is not a u32 vector of the width of the output";
            b->index = w->data;
            for (uint32_t j = 0; j < w->cols; j++)
                if (b->index[j] >= p->slots[op->in[0]].width) return "an index is beyond the input";
            return NULL;
        }
        case HB_OP_HADAMARD: {
            const uint32_t dim = op->attr[HB_ATTR_HADAMARD_DIM];
            if (!dim || dim & (dim - 1) || p->slots[op->out[0]].width % dim)
                return "the dim of a hadamard is wrong";
            return NULL;
        }
        case HB_OP_LINEAR: {
            const char *family = hb_linear_family(b->matrix.e, p->policy);
            const hb_kernel_row *row = hb_choose("linear", family, p->isa);
            if (!row) return "no kernel";
            b->linear = (hb_linear_fn *)row->function;
            b->quantised = strcmp(family, "float") && strcmp(family, "dequantised");
            if (b->quantised) {
                size_t need = hb_strips_layout(NULL, 1, b->matrix.cols, b->matrix.block).strip_bytes;
                p->strip_bytes = need > p->strip_bytes ? need : p->strip_bytes;
            }
            return NULL;
        }
        case HB_OP_ROPE:
            if (!b->vector[0]) return "the frequencies are missing";
            b->angles = share_angles(p, b->vector[0], b->vector_cols, attr_float(op, HB_ATTR_ROPE_MSCALE));
            return NULL;
        case HB_OP_KV_PUT:
        case HB_OP_ATTEND: {
            if (op->attr[0] >= p->cache_count) return "a cache does not exist";
            if (op->code == HB_OP_KV_PUT) return NULL;
            const hb_cache *c = &p->caches[op->attr[HB_ATTR_ATTEND_CACHE]];
            uint32_t share = p->slots[op->in[0]].width / c->k_dim / c->kv_heads;
            size_t need = align_up(hb_attend_scratch(share, c->kv_heads, c->k_dim, c->v_dim), 64);
            p->scratch_bytes = need > p->scratch_bytes ? need : p->scratch_bytes;
            return NULL;
        }
        case HB_OP_EMBED:
            if (b->matrix.rows < p->vocabulary) p->vocabulary = b->matrix.rows;
            return NULL;
        case HB_OP_PICK:
        case HB_OP_RMSNORM:
        case HB_OP_LAYERNORM:
        case HB_OP_ADD:
        case HB_OP_MUL:
        case HB_OP_UNARY:
        case HB_OP_GLU:
            return NULL;
        default:
            return "this library does not know the op";
    }
}

/* The slot whose rows a record works through. */
static uint32_t driving_slot(const hb_bound *b) {
    return b->op.out[0] == HB_NONE || b->op.code == HB_OP_LINEAR ? b->op.in[0] : b->op.out[0];
}

/* Which records can run row by row behind the one before, in one hand-out of rows to the threads. */
static void find_runs(hb_program *p) {
    for (uint32_t i = 0; i < p->op_count; i++) {
        hb_bound *b = &p->ops[i];
        const hb_bound *before = i ? b - 1 : NULL;
        b->by_row = b->op.code != HB_OP_LINEAR && b->op.code != HB_OP_KV_PUT && b->op.code != HB_OP_ATTEND;
        if (!before) continue;
        const hb_slot *mine = &p->slots[driving_slot(b)], *its = &p->slots[driving_slot(before)];
        b->joins = before->by_row && (b->by_row || b->quantised) && b->op.code != HB_OP_PICK &&
                   mine->rows == its->rows;
        b->strips_stand = b->quantised && before->quantised && b->op.in[0] == before->op.in[0] &&
                          b->matrix.block == before->matrix.block &&
                          p->slots[before->op.out[0]].base != mine->base;
    }
}

/* Where the parts of the working memory lie; p itself stays as it is while `b` only measures. */
static void lay_out_working(hb_program *p, hb_block *b, uint32_t tokens) {
    const size_t strips = ((size_t)tokens + HB_STRIP - 1) / HB_STRIP * HB_STRIP;
    uint32_t *spans = hb_take(b, (size_t)tokens + 1, sizeof *spans);
    uint8_t *room = hb_take(b, strips, p->strip_bytes);
    if (b->base) p->spans = spans, p->strips = room;
    for (uint32_t i = 0; i < p->angles_count; i++) {
        float *table = hb_take(b, (size_t)tokens * 2 * p->angles[i].n, sizeof *table);
        if (b->base) p->angles[i].table = table;
    }
}

size_t hb_working_bytes(const hb_program *program, uint32_t tokens) {
    hb_block b = {NULL, 0};
    lay_out_working((hb_program *)program, &b, tokens);
    return b.used;
}

bool hb_program_reserve(hb_program *p, uint32_t tokens) {
    if (tokens <= p->tokens) return true;
    hb_release(&p->allocator, p->working);
    p->tokens = 0;
    p->working = hb_allocate(&p->allocator, hb_working_bytes(p, tokens));
    if (!p->working) return false;
    hb_block b = {p->working, 0};
    lay_out_working(p, &b, tokens);
    p->tokens = tokens;
    return true;
}

float *hb_program_partial(hb_program *p, size_t count) {
    if (count <= p->partial_size) return p->partial;
    hb_release(&p->allocator, p->partial);
    p->partial = hb_allocate(&p->allocator, count * sizeof(float));
    p->partial_size = p->partial ? count : 0;
    return p->partial;
}

size_t hb_partial_values(const hb_program *p, uint32_t threads, uint32_t positions) {
    const size_t segments = ((size_t)positions + HB_PAGE * HB_SEGMENT - 1) / (HB_PAGE * HB_SEGMENT);
    size_t most = 0;
    if (threads < 2 || segments < 2) return 0;
    for (uint32_t i = 0; i < p->op_count; i++) {
        const hb_op *op = &p->ops[i].op;
        if (op->code != HB_OP_ATTEND) continue;
        const hb_cache *c = &p->caches[op->attr[HB_ATTR_ATTEND_CACHE]];
        const size_t share = p->slots[op->in[0]].width / c->k_dim / c->kv_heads;
        const size_t each = share * ((c->v_dim + 15u) / 16u * 16u + 16), count = 8 * (size_t)threads;
        if (each * count * segments > most) most = each * count * segments;
    }
    return most;
}

void hb_free(hb_program *p) {
    if (!p) return;
    const hb_allocator a = p->allocator;
    hb_release(&a, p->scratch), hb_release(&a, p->working), hb_release(&a, p->partial);
    hb_release(&a, p);
}

static void choose_kernels(hb_program *p) {
#define CHOOSE(name) p->kernels.name = (hb_##name##_fn *)hb_choose(#name, "any", p->isa)->function
    CHOOSE(quantize);
    CHOOSE(embed);
    CHOOSE(rmsnorm);
    CHOOSE(layernorm);
    CHOOSE(add);
    CHOOSE(mul);
    CHOOSE(unary);
    CHOOSE(glu);
    CHOOSE(gather);
    CHOOSE(hadamard);
    CHOOSE(rope);
    CHOOSE(kv_put);
    CHOOSE(attend);
    CHOOSE(attend_merge);
#undef CHOOSE
}

/* The program and its tables are one block; of `p` only the counts are read while the block measures. */
static hb_program *lay_out_program(hb_block *b, const hb_program *p) {
    hb_program *to = hb_take(b, 1, sizeof *to);
    hb_program v = *p;
    v.ops = hb_take(b, p->op_count, sizeof *v.ops);
    v.angles = hb_take(b, p->op_count, sizeof *v.angles);
    v.slots = hb_take(b, p->slot_count, sizeof *v.slots);
    v.caches = hb_take(b, p->cache_count, sizeof *v.caches);
    if (to) *to = v;
    return to;
}

size_t hb_program_bytes(const hb_program *program) {
    hb_block b = {NULL, 0};
    lay_out_program(&b, program);
    return b.used;
}

static hb_program *new_program(const hb_program *counts, const hb_op *ops, const hb_slot *slots,
                               const hb_cache *caches) {
    const size_t bytes = hb_program_bytes(counts);
    hb_block b = {hb_allocate(&counts->allocator, bytes), 0};
    if (!b.base) return NULL;
    memset(b.base, 0, bytes);
    hb_program *p = lay_out_program(&b, counts);
    for (uint32_t i = 0; i < p->op_count; i++) p->ops[i].op = ops[i];
    if (p->slot_count) memcpy(p->slots, slots, p->slot_count * sizeof *slots);
    if (p->cache_count) memcpy(p->caches, caches, p->cache_count * sizeof *caches);
    return p;
}

int hb_bind_with(const hb_allocator *allocator, const hb_op *ops, uint32_t op_count, const hb_slot *slots,
                 uint32_t slot_count, const hb_cache *caches, uint32_t cache_count, const hb_weight *weights,
                 uint32_t weight_count, int policy, int isa, hb_pool *pool, hb_program **out) {
    *out = NULL;
    if (isa == HB_ISA_BEST) isa = hb_cpu_best();
    if (!hb_cpu_supports(isa) || (policy != HB_POLICY_F32 && policy != HB_POLICY_I8G32))
        return hb_fail(HB_ERROR_ARGUMENT,
                       "this machine does not have that instruction set, or the policy is unknown");
    const hb_program counts = {.allocator = *allocator,
                               .op_count = op_count,
                               .slot_count = slot_count,
                               .cache_count = cache_count,
                               .policy = policy,
                               .isa = isa,
                               .pool = pool,
                               .vocabulary = UINT32_MAX,
                               .scratch_bytes = HB_LINEAR_SCRATCH};
    hb_program *p = new_program(&counts, ops, slots, caches);
    if (!p) return hb_fail(HB_ERROR_MEMORY, "no memory for a program of %u records", op_count);
    choose_kernels(p);
    for (uint32_t at = 0; at < op_count; at++) {
        const char *why = bind_op(p, &p->ops[at], weights, weight_count);
        if (!why) continue;
        hb_free(p);
        return hb_fail(HB_ERROR_FORMAT, "record %u: %s", at, why);
    }
    find_runs(p);
    if (pool && !(p->scratch = hb_allocate(allocator, p->scratch_bytes * (size_t)hb_pool_threads(pool)))) {
        hb_free(p);
        return hb_fail(HB_ERROR_MEMORY, "no memory for the scratch of %d threads", hb_pool_threads(pool));
    }
    *out = p;
    return HB_OK;
}

hb_program *hb_bind(const hb_op *ops, uint32_t op_count, const hb_slot *slots, uint32_t slot_count,
                    const hb_cache *caches, uint32_t cache_count, const hb_weight *weights,
                    uint32_t weight_count, int policy, int isa, hb_pool *pool, char *error,
                    size_t error_size) {
    const hb_allocator heap = hb_allocator_of(NULL);
    hb_program *p = NULL;
    if (pool)
        hb_bind_with(&heap, ops, op_count, slots, slot_count, caches, cache_count, weights, weight_count,
                     policy, isa, pool, &p);
    if (!p) snprintf(error, error_size, "%s", pool ? hb_last_error() : "there is no pool");
    return p;
}
