#include "exec.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

/* Work below which waking other threads costs more than it saves: values touched, or multiplications. */
enum { SMALL_VALUES = 1 << 15, SMALL_PRODUCTS = 1 << 17 };
enum { LONGEST_RUN = 64 }; /* records: the bits of job.fills */

typedef struct {
    hb_program *program;
    const hb_step *step;
    const hb_bound *bound;
    const hb_bound *first, *last; /* a run of records by row */
    const hb_bound *quantise;     /* LINEAR whose input the run quantises, or NULL */
    uint64_t fills;               /* of the first 64 of the run, the ROPE that compute their angles */
    hb_linear linear;
    hb_attend attend;
    uint32_t span_count;
    uint32_t heads; /* ATTEND by segments: heads of one task */
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

static void fill_angles(const hb_angles *a, int32_t position, float *table) {
    for (uint32_t i = 0; i < a->n; i++) {
        double angle = (double)position * (double)a->inv_freq[i];
        table[i] = (float)(cos(angle) * (double)a->mscale);
        table[a->n + i] = (float)(sin(angle) * (double)a->mscale);
    }
}

/* One row of an op that treats rows alike. */
static void run_row(const job *j, const hb_bound *b, uint32_t t) {
    const hb_op *op = &b->op;
    const hb_kernels *k = &j->program->kernels;
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
            float *table = a->table + (size_t)t * 2 * a->n;
            if (j->fills >> (b - j->first) & 1) fill_angles(a, j->step->positions[t], table);
            const uint32_t head = op->attr[HB_ATTR_ROPE_HEAD_DIM];
            k->rope(x, width / head, head, a->n, table, table + a->n, y);
            return;
        }
        default:
            return;
    }
}

/* Makes a LINEAR the one that j->linear is about. */
static void open_linear(job *j, const hb_bound *b) {
    const view x = slot(j, b->op.in[0]), y = slot(j, b->op.out[0]);
    const hb_matrix *m = &b->matrix;
    j->linear =
        (hb_linear){.matrix = m, .bias = b->vector[0], .x = x.p, .ldx = x.stride, .y = y.p, .ldy = y.stride};
    if (b->quantised)
        j->linear.strips = hb_strips_layout(j->program->strips, slot_rows(j, b->op.in[0]), m->cols, m->block);
}

static void quantise_row(const job *j, uint32_t t) {
    const hb_linear *l = &j->linear;
    hb_strips strip = l->strips;
    strip.data += t / strip.width * strip.strip_bytes;
    j->program->kernels.quantize(l->x + t * l->ldx, l->matrix->cols, &strip, t % strip.width);
}

/* One row of every record of a run. */
static void run_task(void *context, uint32_t t, uint32_t worker) {
    (void)worker;
    const job *j = context;
    for (const hb_bound *b = j->first; b < j->last; b++) run_row(j, b, t);
    if (j->quantise) quantise_row(j, t);
}

/* Records first <= b < last by row, then the quantising of the input of `quantise`, if any. */
static void run_rows(job *j, const hb_bound *first, const hb_bound *last, const hb_bound *quantise) {
    uint32_t rows = 0;
    size_t width = 0;
    j->first = first, j->last = last, j->quantise = quantise, j->fills = 0;
    for (const hb_bound *b = first; b < last; b++) {
        rows = slot_rows(j, b->op.out[0]), width += j->program->slots[b->op.out[0]].width;
        if (b->op.code != HB_OP_ROPE) continue;
        hb_angles *a = &j->program->angles[b->angles];
        if (!a->ready) j->fills |= (uint64_t)1 << (b - first), width += 64 * a->n;
        a->ready = true;
    }
    if (quantise) {
        open_linear(j, quantise);
        rows = slot_rows(j, quantise->op.in[0]), width += quantise->matrix.cols;
    }
    const uint32_t all = rows ? rows : 1, share = (all + 15) / 16;
    hb_pool_run(j->program->pool, run_task, j, rows, (size_t)rows * width < SMALL_VALUES ? all : share);
}

/* Panels of one task. A few tokens are bound by memory, and divide best panel by panel; for many, panels of a
 * task share the activations in the cache, as long as there are tasks enough for every thread. */
static uint32_t linear_panels(const job *j, uint32_t rows) {
    const uint32_t panels = (j->bound->matrix.rows + 15) / 16;
    const uint32_t share = panels / ((uint32_t)hb_pool_threads(j->program->pool) * 4);
    if (rows <= 4) return 1;
    return share >= HB_PANELS ? HB_PANELS : share >= 4 ? 4 : 2;
}

static void linear_task(void *context, uint32_t index, uint32_t worker) {
    const job *j = context;
    const hb_bound *b = j->bound;
    const uint32_t panels = (b->matrix.rows + 15) / 16, rows = slot_rows(j, b->op.out[0]);
    const uint32_t each = linear_panels(j, rows), spans = (panels + each - 1) / each;
    const uint32_t t0 = index / spans * HB_TOKEN_TILE, panel = index % spans * each;
    const uint32_t t1 = rows - t0 < HB_TOKEN_TILE ? rows : t0 + HB_TOKEN_TILE;
    b->linear(&j->linear, panel, panels - panel < each ? panels : panel + each, t0, t1,
              j->program->scratch + worker * j->program->scratch_bytes);
}

static void run_linear(job *j) {
    hb_program *p = j->program;
    const hb_matrix *m = &j->bound->matrix;
    const uint32_t rows = slot_rows(j, j->bound->op.out[0]);
    if (!rows) return;
    open_linear(j, j->bound);
    const uint32_t each = linear_panels(j, rows) * 16, spans = (m->rows + each - 1) / each;
    const uint32_t count = spans * ((rows + HB_TOKEN_TILE - 1) / HB_TOKEN_TILE);
    const uint32_t share = count / ((uint32_t)hb_pool_threads(p->pool) * 8);
    const bool small = (uint64_t)rows * m->rows * m->cols < SMALL_PRODUCTS;
    hb_pool_run(p->pool, linear_task, j, count, small ? count : share > 32 ? 32 : share);
}

/* All rows of one head: positions of a page share bytes. */
static void put_task(void *context, uint32_t head, uint32_t worker) {
    (void)worker;
    const job *j = context;
    const hb_op *op = &j->bound->op;
    const uint32_t cache = op->attr[HB_ATTR_KV_PUT_CACHE];
    const hb_cache *c = &j->program->caches[cache];
    const view keys = slot(j, op->in[0]), values = slot(j, op->in[1]);
    for (uint32_t t = 0; t < j->step->rows; t++) {
        const hb_kv *kv = &j->step->kv[j->step->sessions[t]];
        const uint32_t position = (uint32_t)j->step->positions[t], page = position / HB_PAGE;
        const hb_page kind = hb_page_of(kv->types[cache], page, c->k_dim, c->v_dim);
        char *to = (char *)kv->pages[(size_t)cache * kv->page_count + page] + head * kind.head_bytes;
        j->program->kernels.kv_put(&kind, keys.p + t * keys.stride + (size_t)head * c->k_dim,
                                   values.p + t * values.stride + (size_t)head * c->v_dim, c->k_dim, c->v_dim,
                                   position % HB_PAGE, to);
    }
}

static void run_kv_put(job *j) {
    const hb_cache *c = &j->program->caches[j->bound->op.attr[HB_ATTR_KV_PUT_CACHE]];
    const size_t values = (size_t)j->step->rows * c->kv_heads * (c->k_dim + c->v_dim);
    hb_pool_run(j->program->pool, put_task, j, c->kv_heads, values < SMALL_VALUES ? c->kv_heads : 1);
}

/* The last row of those that follow row t at consecutive positions of its session, at most `most` rows. */
static uint32_t span_end(const hb_step *s, uint32_t t, uint32_t most) {
    uint32_t end = t + 1;
    while (end < s->rows && end - t < most && s->sessions[end] == s->sessions[t] &&
           s->positions[end] == s->positions[end - 1] + 1)
        end++;
    return end;
}

static void attend_task(void *context, uint32_t index, uint32_t worker) {
    const job *j = context;
    const hb_attend *a = &j->attend;
    /* the longest rows first, so that the last to finish is short */
    const uint32_t i = j->span_count - 1 - index / a->kv_heads, t = j->program->spans[i];
    j->program->kernels.attend(a, t, j->program->spans[i + 1] - t, index % a->kv_heads, 1, HB_ALL_SEGMENTS,
                               j->program->scratch + worker * j->program->scratch_bytes);
}

static void segment_task(void *context, uint32_t index, uint32_t worker) {
    const job *j = context;
    const hb_attend *a = &j->attend;
    const uint32_t parts = (a->kv_heads + j->heads - 1) / j->heads, rest = index / a->segments;
    const uint32_t head = rest % parts * j->heads, left = a->kv_heads - head;
    j->program->kernels.attend(a, rest / parts, 1, head, left < j->heads ? left : j->heads,
                               index % a->segments, j->program->scratch + worker * j->program->scratch_bytes);
}

static void merge_task(void *context, uint32_t index, uint32_t worker) {
    const job *j = context;
    const uint32_t heads = j->attend.kv_heads;
    j->program->kernels.attend_merge(&j->attend, index / heads, index % heads,
                                     j->program->scratch + worker * j->program->scratch_bytes);
}

static void run_attend(job *j) {
    hb_program *p = j->program;
    const hb_op *op = &j->bound->op;
    const hb_cache *c = &p->caches[op->attr[HB_ATTR_ATTEND_CACHE]];
    const view q = slot(j, op->in[0]), y = slot(j, op->out[0]);
    const hb_step *s = j->step;
    const uint32_t width = p->slots[op->in[0]].width;
    j->attend = (hb_attend){.q = q.p,
                            .y = y.p,
                            .ldq = q.stride,
                            .ldy = y.stride,
                            .kv_heads = c->kv_heads,
                            .share = width / c->k_dim / c->kv_heads,
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
    uint32_t pages = 1;
    for (uint32_t t = 0; t < s->rows; t++) {
        const uint32_t length = (uint32_t)s->positions[t] + 1;
        products += (uint64_t)(c->window && length > c->window ? c->window : length) * width;
        if ((length - 1) / HB_PAGE + 1 > pages) pages = (length - 1) / HB_PAGE + 1;
    }
    const bool small = products < SMALL_PRODUCTS / 4;
    const uint32_t segments = (pages + HB_SEGMENT - 1) / HB_SEGMENT,
                   few = 8 * (uint32_t)hb_pool_threads(p->pool);
    uint32_t count = s->rows * c->kv_heads;
    if (segments > 1 && count < few && hb_pool_threads(p->pool) > 1) {
        j->attend.segments = segments;
        const size_t each = (size_t)j->attend.share * ((c->v_dim + 15u) / 16u * 16u + 16);
        j->attend.partial = hb_program_partial(p, count * segments * each);
    }
    if (j->attend.partial) { /* too few rows to share out: their segments are */
        /* several heads together read whole pages, as long as there are tasks enough for every thread */
        const uint32_t tasks = s->rows * segments, parts = (few / 2 + tasks - 1) / tasks;
        j->heads = parts < c->kv_heads ? (c->kv_heads + parts - 1) / parts : 1;
        hb_pool_run(p->pool, segment_task, j, tasks * ((c->kv_heads + j->heads - 1) / j->heads), 1);
        hb_pool_run(p->pool, merge_task, j, count, count);
        return;
    }
    j->span_count = 0;
    for (uint32_t t = 0; t < s->rows; t = span_end(s, t, hb_attend_rows(j->attend.share)))
        p->spans[j->span_count++] = t;
    p->spans[j->span_count] = s->rows;
    count = j->span_count * c->kv_heads;
    hb_pool_run(p->pool, attend_task, j, count, small ? count : 1);
}

/* Whether the pages that row t writes and sees are there. */
static bool has_pages(const hb_program *p, const hb_step *s, uint32_t t, bool only_own) {
    const hb_kv *kv = &s->kv[s->sessions[t]];
    const uint32_t position = (uint32_t)s->positions[t], last = position / HB_PAGE;
    if (last >= kv->page_count) return false;
    for (uint32_t c = 0; c < p->cache_count; c++) {
        const uint32_t window = p->caches[c].window;
        const uint32_t first = only_own                          ? last
                               : window && position + 1 > window ? (position + 1 - window) / HB_PAGE
                                                                 : 0;
        for (uint32_t i = first; i <= last; i++)
            if (!kv->pages[(size_t)c * kv->page_count + i]) return false;
    }
    return true;
}

/* What cannot be known before the step: ids, sessions, positions and picks in range. */
static int check_step(const hb_program *p, const hb_step *s) {
    for (uint32_t i = 0; i < s->kv_count; i++)
        for (uint32_t c = 0; c < p->cache_count; c++)
            if (!hb_page_word_is_valid(s->kv[i].types[c])) return HB_ERROR_ARGUMENT;
    for (uint32_t t = 0; t < s->rows; t++) {
        if (s->ids[t] < 0 || (uint32_t)s->ids[t] >= p->vocabulary) return HB_ERROR_ID;
        if (p->cache_count) {
            if (s->sessions[t] < 0 || (uint32_t)s->sessions[t] >= s->kv_count) return HB_ERROR_SESSION;
            const bool follows =
                t && s->sessions[t] == s->sessions[t - 1] && s->positions[t] == s->positions[t - 1] + 1;
            if (s->positions[t] < 0 || !has_pages(p, s, t, follows)) return HB_ERROR_POSITION;
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
    const hb_bound *b = p->ops + first, *const end = p->ops + last;
    while (b < end) {
        const hb_bound *const start = b;
        if (p->cancelled && atomic_load_explicit(p->cancelled, memory_order_relaxed))
            return HB_ERROR_CANCELLED;
        if (b->by_row) do
                b++;
            while (b < end && b->by_row && b->joins && b - start < LONGEST_RUN);
        const bool here =
            b < end && b->quantised && (b > start ? b->joins : b == p->ops + first || !b->strips_stand);
        if (b > start || here) run_rows(&j, start, b, here ? b : NULL);
        if (b == end || (b > start && !here)) continue;
        j.bound = b++;
        if (j.bound->op.code == HB_OP_LINEAR)
            run_linear(&j);
        else if (j.bound->op.code == HB_OP_KV_PUT)
            run_kv_put(&j);
        else
            run_attend(&j);
    }
    return HB_OK;
}
