#include "bind.h"

#include <stdio.h>
#include <stdlib.h>
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

static void *copy(const void *from, size_t count, size_t size) {
    void *to = calloc(count ? count : 1, size);
    if (to && count) memcpy(to, from, count * size);
    return to;
}

bool hb_program_reserve(hb_program *p, uint32_t tokens) {
    if (tokens <= p->tokens) return true;
    free(p->strips), free(p->spans);
    p->strips = NULL, p->tokens = 0;
    p->spans = malloc(((size_t)tokens + 1) * sizeof *p->spans);
    bool ok = p->spans;
    if (p->strip_bytes) {
        const size_t whole = ((size_t)tokens + HB_STRIP - 1) / HB_STRIP * HB_STRIP;
        ok = ok && !posix_memalign((void **)&p->strips, 64, whole * p->strip_bytes);
    }
    for (uint32_t i = 0; i < p->angles_count; i++) {
        free(p->angles[i].table);
        p->angles[i].table = malloc((size_t)tokens * 2 * p->angles[i].n * sizeof(float));
        ok = ok && p->angles[i].table;
    }
    if (ok) p->tokens = tokens;
    return ok;
}

float *hb_program_partial(hb_program *p, size_t count) {
    if (count <= p->partial_size) return p->partial;
    free(p->partial);
    p->partial = malloc(count * sizeof(float));
    p->partial_size = p->partial ? count : 0;
    return p->partial;
}

void hb_free(hb_program *p) {
    if (!p) return;
    for (uint32_t i = 0; p->angles && i < p->angles_count; i++) free(p->angles[i].table);
    free(p->ops), free(p->slots), free(p->caches), free(p->angles);
    free(p->scratch), free(p->strips), free(p->spans), free(p->partial);
    free(p);
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

hb_program *hb_bind(const hb_op *ops, uint32_t op_count, const hb_slot *slots, uint32_t slot_count,
                    const hb_cache *caches, uint32_t cache_count, const hb_weight *weights,
                    uint32_t weight_count, int policy, int isa, hb_pool *pool, char *error,
                    size_t error_size) {
    hb_program *p = calloc(1, sizeof *p);
    if (!p) {
        snprintf(error, error_size, "out of memory");
        return NULL;
    }
    if (isa == HB_ISA_BEST) isa = hb_cpu_best();
    p->policy = policy, p->isa = isa, p->pool = pool;
    p->vocabulary = UINT32_MAX;
    p->op_count = op_count, p->slot_count = slot_count, p->cache_count = cache_count;
    p->ops = calloc(op_count ? op_count : 1, sizeof *p->ops);
    p->angles = calloc(op_count ? op_count : 1, sizeof *p->angles);
    p->slots = copy(slots, slot_count, sizeof *slots);
    p->caches = copy(caches, cache_count, sizeof *caches);
    p->scratch_bytes = HB_LINEAR_SCRATCH;
    const char *why = NULL;
    uint32_t at = 0;
    if (!p->ops || !p->angles || !p->slots || !p->caches)
        why = "out of memory";
    else if (!hb_cpu_supports(isa) || (policy != HB_POLICY_F32 && policy != HB_POLICY_I8G32) || !pool)
        why = "this machine does not have that instruction set, or the arguments are wrong";
    else
        choose_kernels(p);
    for (; !why && at < op_count; at++) {
        p->ops[at].op = ops[at];
        why = bind_op(p, &p->ops[at], weights, weight_count);
        if (why) break;
    }
    if (!why && posix_memalign((void **)&p->scratch, 64, p->scratch_bytes * (size_t)hb_pool_threads(pool)))
        why = "out of memory";
    if (!why) {
        find_runs(p);
        return p;
    }
    snprintf(error, error_size, "record %u: %s", at, why);
    hb_free(p);
    return NULL;
}
