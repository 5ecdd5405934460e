#include "exec.h"

#include <math.h>
#include <string.h>

/* Work below which waking other threads costs more than it saves: values touched, or multiplications. */
enum { SMALL_VALUES = 1 << 15, SMALL_PRODUCTS = 1 << 17 };

typedef struct {
    hb_program *program;
    const hb_step *step;
    const hb_bound *bound;
    hb_linear linear;
    hb_attend attend;
} job;

typedef struct {
    float *p;
    size_t stride; /* values from row to row */
} view;

static view slot(const job *j, uint32_t i) {
    const hb_slot *s = &j->program->slots[i];
    return (view){j->step->slot_base[s->base] + s->offset, j->program->slots[s->base].width};
}

static uint32_t slot_rows(const job *j, uint32_t i) {
    return j->program->slots[i].rows == HB_ROWS_PICKS ? j->step->picks : j->step->rows;
}

static float attr_float(const hb_op *op, int i) {
    float f;
    memcpy(&f, &op->attr[i], 4);
    return f;
}

/* One row of an op that treats rows alike. */
static void row_task(void *context, uint32_t t, uint32_t worker) {
    (void)worker;
    const job *j = context;
    const hb_bound *b = j->bound;
    const hb_op *op = &b->op;
    const hb_kernels *k = &j->program->kernels;
    if (op->code == HB_OP_KV_PUT) {
        const hb_cache *c = &j->program->caches[op->attr[HB_ATTR_KV_PUT_CACHE]];
        const hb_kv *kv = &j->step->kv[j->step->sessions[t]];
        const uint32_t cache = op->attr[HB_ATTR_KV_PUT_CACHE], size = kv->type == HB_ENC_F32 ? 4 : 2;
        const size_t position = (size_t)j->step->positions[t];
        for (int i = 0; i < 2; i++) {
            view x = slot(j, op->in[i]);
            const uint32_t dim = i ? c->v_dim : c->k_dim;
            char *to = i ? kv->v[cache] : kv->k[cache];
            for (uint32_t h = 0; h < c->kv_heads; h++)
                k->kv_put(x.p + t * x.stride + (size_t)h * dim, dim, kv->type,
                          to + ((size_t)h * kv->capacity + position) * dim * size);
        }
        return;
    }
    const uint32_t width = j->program->slots[op->out[0]].width;
    view out = slot(j, op->out[0]);
    float *y = out.p + t * out.stride;
    if (op->code == HB_OP_EMBED) {
        k->embed(&b->matrix, (uint32_t)j->step->ids[t], y);
        return;
    }
    view in = slot(j, op->in[0]);
    const float *x = in.p + t * in.stride;
    switch (op->code) {
        case HB_OP_PICK:
            memcpy(y, in.p + (size_t)j->step->pick_rows[t] * in.stride, width * sizeof(float));
            return;
        case HB_OP_RMSNORM:
            k->rmsnorm(x, b->vector[0], attr_float(op, HB_ATTR_RMSNORM_EPS), width,
                       op->attr[HB_ATTR_RMSNORM_DIM], y);
            return;
        case HB_OP_LAYERNORM:
            k->layernorm(x, b->vector[0], b->vector[1], attr_float(op, HB_ATTR_LAYERNORM_EPS), width,
                         op->attr[HB_ATTR_LAYERNORM_DIM], y);
            return;
        case HB_OP_ADD:
        case HB_OP_MUL: {
            view second = slot(j, op->in[1]);
            const float *z = second.p + t * second.stride;
            if (op->code == HB_OP_ADD)
                k->add(x, z, attr_float(op, HB_ATTR_ADD_SCALE), width, y);
            else
                k->mul(x, z, width, y);
            return;
        }
        case HB_OP_UNARY:
            k->unary(x, width, op->attr[HB_ATTR_UNARY_FUNCTION], attr_float(op, HB_ATTR_UNARY_P), y);
            return;
        case HB_OP_GLU:
            k->glu(x, x + width, width, op->attr[HB_ATTR_GLU_FUNCTION], y);
            return;
        case HB_OP_GATHER:
            k->gather(x, b->index, width, y);
            return;
        case HB_OP_HADAMARD:
            k->hadamard(x, width, op->attr[HB_ATTR_HADAMARD_DIM], y);
            return;
        case HB_OP_ROPE: {
            const hb_angles *a = &j->program->angles[b->angles];
            const float *table = a->table + (size_t)t * 2 * a->n;
            const uint32_t head = op->attr[HB_ATTR_ROPE_HEAD_DIM];
            k->rope(x, width / head, head, a->n, table, table + a->n, y);
            return;
        }
        default:
            return;
    }
}

static void run_rows(job *j) {
    const hb_op *op = &j->bound->op;
    const uint32_t i = op->code == HB_OP_KV_PUT ? op->in[0] : op->out[0];
    const uint32_t rows = slot_rows(j, i), width = j->program->slots[i].width;
    const uint32_t all = rows ? rows : 1;
    hb_pool_run(j->program->pool, row_task, j, rows,
                (size_t)rows * width < SMALL_VALUES ? all : (all + 15) / 16);
}

static void quantize_task(void *context, uint32_t t, uint32_t worker) {
    (void)worker;
    const job *j = context;
    const hb_linear *l = &j->linear;
    hb_strips strip = l->strips;
    strip.data += t / strip.width * strip.strip_bytes;
    j->program->kernels.quantize(l->x + t * l->ldx, l->matrix->cols, &strip, t % strip.width);
}

static void linear_task(void *context, uint32_t index, uint32_t worker) {
    const job *j = context;
    const hb_bound *b = j->bound;
    const uint32_t panels = (b->matrix.rows + 15) / 16, tile = index / panels;
    const uint32_t rows = slot_rows(j, b->op.out[0]), t0 = tile * HB_TOKEN_TILE;
    const uint32_t t1 = rows - t0 < HB_TOKEN_TILE ? rows : t0 + HB_TOKEN_TILE;
    b->linear(&j->linear, index % panels, t0, t1, j->program->scratch + worker * j->program->scratch_bytes);
}

static void run_linear(job *j) {
    hb_program *p = j->program;
    const hb_bound *b = j->bound;
    const hb_matrix *m = &b->matrix;
    const uint32_t rows = slot_rows(j, b->op.out[0]);
    const view x = slot(j, b->op.in[0]), y = slot(j, b->op.out[0]);
    if (!rows) return;
    j->linear =
        (hb_linear){.matrix = m, .bias = b->vector[0], .x = x.p, .ldx = x.stride, .y = y.p, .ldy = y.stride};
    if (b->quantised) {
        j->linear.strips = hb_strips_layout(p->strips, rows, m->cols, m->block);
        hb_pool_run(p->pool, quantize_task, j, rows,
                    (size_t)rows * m->cols < SMALL_VALUES ? rows : (rows + 15) / 16);
    }
    const uint32_t panels = (m->rows + 15) / 16, tiles = (rows + HB_TOKEN_TILE - 1) / HB_TOKEN_TILE;
    const uint32_t count = panels * tiles, share = count / ((uint32_t)hb_pool_threads(p->pool) * 8);
    const bool small = (uint64_t)rows * m->rows * m->cols < SMALL_PRODUCTS;
    hb_pool_run(p->pool, linear_task, j, count, small ? count : share > 32 ? 32 : share);
}

static void attend_task(void *context, uint32_t index, uint32_t worker) {
    const job *j = context;
    const hb_attend *a = &j->attend;
    /* the longest rows first, so that the last to finish is short */
    const uint32_t t = j->step->rows - 1 - index / a->kv_heads;
    j->program->kernels.attend(a, t, index % a->kv_heads,
                               j->program->scratch + worker * j->program->scratch_bytes);
}

static void run_attend(job *j) {
    const hb_op *op = &j->bound->op;
    const hb_cache *c = &j->program->caches[op->attr[HB_ATTR_ATTEND_CACHE]];
    const view q = slot(j, op->in[0]), y = slot(j, op->out[0]);
    const hb_step *s = j->step;
    j->attend = (hb_attend){.q = q.p,
                            .y = y.p,
                            .ldq = q.stride,
                            .ldy = y.stride,
                            .kv_heads = c->kv_heads,
                            .share = j->program->slots[op->in[0]].width / c->k_dim / c->kv_heads,
                            .k_dim = c->k_dim,
                            .v_dim = c->v_dim,
                            .window = c->window,
                            .cache = op->attr[HB_ATTR_ATTEND_CACHE],
                            .scale = attr_float(op, HB_ATTR_ATTEND_SCALE),
                            .softcap = attr_float(op, HB_ATTR_ATTEND_SOFTCAP),
                            .positions = s->positions,
                            .sessions = s->sessions,
                            .kv = s->kv};
    uint64_t products = 0;
    for (uint32_t t = 0; t < s->rows; t++) {
        uint64_t length = (uint64_t)s->positions[t] + 1;
        if (c->window && length > c->window) length = c->window;
        products += length * j->program->slots[op->in[0]].width;
    }
    const uint32_t count = s->rows * c->kv_heads;
    hb_pool_run(j->program->pool, attend_task, j, count, products < SMALL_PRODUCTS / 4 ? count : 1);
}

static void angles_task(void *context, uint32_t t, uint32_t worker) {
    (void)worker;
    const job *j = context;
    const hb_angles *a = &j->program->angles[j->bound->angles];
    float *table = a->table + (size_t)t * 2 * a->n;
    for (uint32_t i = 0; i < a->n; i++) {
        double angle = (double)j->step->positions[t] * (double)a->inv_freq[i];
        table[i] = (float)(cos(angle) * (double)a->mscale);
        table[a->n + i] = (float)(sin(angle) * (double)a->mscale);
    }
}

static void run_rope(job *j) {
    hb_angles *a = &j->program->angles[j->bound->angles];
    if (!a->ready) {
        const uint32_t rows = j->step->rows;
        hb_pool_run(j->program->pool, angles_task, j, rows,
                    (size_t)rows * a->n < 512 ? rows : (rows + 15) / 16);
        a->ready = true;
    }
    run_rows(j);
}

/* What cannot be known before the step: ids, sessions, positions and picks in range. */
static int check_step(const hb_program *p, const hb_step *s) {
    uint32_t vocabulary = UINT32_MAX;
    for (uint32_t i = 0; i < p->op_count; i++)
        if (p->ops[i].op.code == HB_OP_EMBED && p->ops[i].matrix.rows < vocabulary)
            vocabulary = p->ops[i].matrix.rows;
    for (uint32_t i = 0; i < s->kv_count; i++)
        if (s->kv[i].type != HB_ENC_F32 && s->kv[i].type != HB_ENC_F16) return HB_ERROR_ARGUMENT;
    for (uint32_t t = 0; t < s->rows; t++) {
        if (s->ids[t] < 0 || (uint32_t)s->ids[t] >= vocabulary) return HB_ERROR_ID;
        if (p->cache_count) {
            if (s->sessions[t] < 0 || (uint32_t)s->sessions[t] >= s->kv_count) return HB_ERROR_SESSION;
            if (s->positions[t] < 0 || (uint32_t)s->positions[t] >= s->kv[s->sessions[t]].capacity)
                return HB_ERROR_POSITION;
        }
    }
    for (uint32_t i = 0; i < s->picks; i++)
        if (s->pick_rows[i] < 0 || (uint32_t)s->pick_rows[i] >= s->rows) return HB_ERROR_PICK;
    return HB_OK;
}

int hb_execute(hb_program *p, const hb_step *step, uint32_t first, uint32_t last) {
    if (first > last || last > p->op_count) return HB_ERROR_RANGE;
    int status = check_step(p, step);
    if (status != HB_OK) return status;
    if (!hb_program_reserve(p, step->rows > step->picks ? step->rows : step->picks)) return HB_ERROR_MEMORY;
    for (uint32_t i = 0; i < p->angles_count; i++) p->angles[i].ready = false;
    job j = {.program = p, .step = step};
    for (uint32_t i = first; i < last; i++) {
        j.bound = &p->ops[i];
        switch (j.bound->op.code) {
            case HB_OP_LINEAR:
                run_linear(&j);
                break;
            case HB_OP_ATTEND:
                run_attend(&j);
                break;
            case HB_OP_ROPE:
                run_rope(&j);
                break;
            default:
                run_rows(&j);
                break;
        }
    }
    return HB_OK;
}
