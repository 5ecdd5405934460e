#include <stdio.h>
#include <string.h>

#include "cpu.h"
#include "exec.h"
#include "session.h"

enum { DEFAULT_ROWS = 288, DEFAULT_SESSIONS = 8, LOST_NAME = 160 };

/* Options with the defaults filled in, and the numbers behind their names. */
typedef struct plan {
    hb_model_options o;
    hb_allocator allocator;
    int isa, policy, threads;
    char kv[LOST_NAME];
} plan;

static int make_plan(const hb_file *f, const hb_model_options *given, plan *p) {
    HB_OPTIONS(hb_model_options, given);
    memset(p, 0, sizeof *p);
    p->allocator = options.allocator ? hb_allocator_of(options.allocator) : f->allocator;
    p->isa = hb_cpu_best();
    if (options.isa) {
        for (p->isa = 0; p->isa < HB_ISA_COUNT && strcmp(hb_isa_name(p->isa), options.isa); p->isa++)
            continue;
        if (p->isa == HB_ISA_COUNT || !hb_isa_supported(p->isa))
            return hb_fail(HB_ERROR_ARGUMENT, "instruction set %s is unknown or not of this machine",
                           options.isa);
    }
    p->policy = HB_POLICY_I8G32;
    if (options.policy && !strcmp(options.policy, "f32"))
        p->policy = HB_POLICY_F32;
    else if (options.policy && strcmp(options.policy, "i8g32"))
        return hb_fail(HB_ERROR_ARGUMENT, "unknown policy %s; there are i8g32, f32", options.policy);
    p->threads = options.threads < 0 ? hb_cpu_count() : options.threads < 1 ? 1 : options.threads;
    if (p->threads > 1024) return hb_fail(HB_ERROR_ARGUMENT, "%d threads are too many", p->threads);
    if (!HB_THREADS) p->threads = 1;
    if (!options.rows) options.rows = DEFAULT_ROWS;
    if (!options.sessions) options.sessions = DEFAULT_SESSIONS;
    if (!options.positions || options.positions > f->context_length) options.positions = f->context_length;
    if (options.rows > 1 << 16 || options.sessions > options.rows)
        return hb_fail(HB_ERROR_ARGUMENT,
                       "%u rows and %u sessions of a step: the first is at most 65536, the second "
                       "at most the first",
                       options.rows, options.sessions);
    if (options.kv && strcmp(options.kv, "auto")) {
        if (strlen(options.kv) >= sizeof p->kv) return hb_fail(HB_ERROR_ARGUMENT, "the kv mode is too long");
        snprintf(p->kv, sizeof p->kv, "%s", options.kv);
    } else {
        const int status = hb_automatic_kv(f, p->policy, p->kv, sizeof p->kv);
        if (status) return status;
    }
    options.allocator = NULL, options.isa = options.policy = options.kv = NULL;
    p->o = options;
    return HB_OK;
}

/* The model and its buffers are one block. */
static hb_model *lay_out(const hb_file *f, const plan *p, hb_block *b) {
    hb_model *m = hb_take(b, 1, sizeof *m);
    hb_model v = {.file = f, .allocator = p->allocator, .options = p->o};
    const size_t rows = p->o.rows, sessions = p->o.sessions;
    v.kv = hb_take(b, sizeof p->kv, 1);
    v.words = hb_take(b, f->cache_count, sizeof *v.words);
    v.weights = hb_take(b, f->tensor_count, sizeof *v.weights); /* here, so that nothing is given back */
    v.slots = hb_take(b, f->slot_count, sizeof *v.slots);
    v.ids = hb_take(b, rows, sizeof *v.ids);
    v.positions = hb_take(b, rows, sizeof *v.positions);
    v.session_of = hb_take(b, rows, sizeof *v.session_of);
    v.picks = hb_take(b, sessions, sizeof *v.picks);
    v.kvs = hb_take(b, sessions, sizeof *v.kvs);
    v.fed = hb_take(b, sessions, sizeof *v.fed);
    v.pending = hb_take(b, sessions, sizeof *v.pending);
    for (uint32_t i = 0; i < f->slot_count; i++) {
        const hb_slot *s = &f->slots[i];
        if (s->base != i) continue;
        float *at = hb_take(b, (s->rows == HB_ROWS_PICKS ? sessions : rows) * s->width, sizeof *at);
        if (b->base) v.slots[i] = at;
    }
    if (!b->base) return NULL;
    const hb_slot *last = &f->slots[f->ops[f->op_count - 1].out[0]];
    v.logits = v.slots[last->base] + last->offset;
    memcpy(v.kv, p->kv, sizeof p->kv);
    *m = v;
    return m;
}

static int bind(const hb_file *f, const plan *p, hb_weight *weights, hb_pool *pool, hb_program **out) {
    for (uint32_t i = 0; i < f->tensor_count; i++) weights[i] = hb_weight_of(f, i);
    return hb_bind_with(&p->allocator, f->ops, f->op_count, f->slots, f->slot_count, f->caches,
                        f->cache_count, weights, f->tensor_count, p->policy, p->isa, pool, out);
}

void hb_model_free(hb_model *m) {
    if (!m) return;
    const hb_allocator a = m->allocator;
    hb_release_free_pages(m);
    hb_free(m->program);
    hb_pool_free(m->pool);
    hb_lock_end(&m->lock);
    hb_release(&a, m);
}

int hb_model_create(const hb_file *f, const hb_model_options *given, hb_model **out) {
    plan p;
    hb_block b = {NULL, 0};
    *out = NULL;
    int status = make_plan(f, given, &p);
    if (status) return status;
    lay_out(f, &p, &b);
    b = (hb_block){hb_allocate(&p.allocator, b.used), 0};
    if (!b.base) return hb_fail(HB_ERROR_MEMORY, "no memory for the activations of %u tokens", p.o.rows);
    hb_model *m = lay_out(f, &p, &b);
    hb_lock_start(&m->lock);
    status = hb_parse_kv(p.kv, f->cache_count, m->words);
    if (!status && !(m->pool = hb_pool_create_with(&p.allocator, p.threads)))
        status = hb_fail(HB_ERROR_MEMORY, "no memory for %d threads", p.threads);
    if (!status) status = bind(f, &p, m->weights, m->pool, &m->program);
    const size_t partial =
        status ? 0 : hb_partial_values(m->program, (uint32_t)hb_pool_threads(m->pool), p.o.positions);
    if (!status &&
        (!hb_program_reserve(m->program, p.o.rows) || (partial && !hb_program_partial(m->program, partial))))
        status = hb_fail(HB_ERROR_MEMORY, "no memory for steps of %u tokens", p.o.rows);
    if (status) {
        hb_model_free(m);
        return status;
    }
    m->program->cancelled = &m->cancelled;
    *out = m;
    return HB_OK;
}

const char *hb_model_kv(const hb_model *m) { return m->kv; }
int hb_model_isa(const hb_model *m) { return m->program->isa; }
int hb_model_threads(const hb_model *m) { return hb_pool_threads(m->pool); }
void hb_cancel(hb_model *m, int on) { atomic_store(&m->cancelled, on != 0); }

/* Bytes of a session's tables and of all its pages when it holds `positions`. */
static uint64_t session_cost(const hb_file *f, const uint32_t *words, uint32_t capacity, uint32_t positions) {
    const uint32_t count = (capacity + HB_PAGE - 1) / HB_PAGE, pages = (positions + HB_PAGE - 1) / HB_PAGE;
    hb_block b = {NULL, 0};
    hb_take(&b, 1, sizeof(hb_session));
    hb_take(&b, capacity, sizeof(int32_t));
    hb_take(&b, (size_t)count * f->cache_count, sizeof(void *));
    uint64_t total = hb_allocation_cost(b.used);
    for (uint32_t c = 0; c < f->cache_count; c++) {
        const hb_cache *k = &f->caches[c];
        /* a window's pages go round: those that it spans, one more, and the first */
        const uint64_t spans = k->window ? (k->window + (uint64_t)HB_PAGE - 2) / HB_PAGE + 2 : pages;
        for (uint32_t i = 0; i < pages && i < spans; i++)
            total += hb_allocation_cost(64 + hb_page_bytes(k, words[c], i));
    }
    return total;
}

int hb_fit(const hb_file *f, const hb_model_options *given, uint32_t positions, hb_needs *out) {
    plan p;
    hb_program *program = NULL;
    hb_block b = {NULL, 0};
    hb_needs needs = {.size = sizeof needs};
    int status = make_plan(f, given, &p);
    if (status) return status;
    if (positions > p.o.positions)
        return hb_fail(HB_ERROR_ARGUMENT, "the model holds %u positions, not %u", p.o.positions, positions);
    p.allocator = f->allocator;
    hb_weight *weights = hb_allocate(&f->allocator, (f->tensor_count + 1) * sizeof *weights);
    uint32_t *words = hb_allocate(&f->allocator, (f->cache_count + 1) * sizeof *words);
    if (!words || !weights) status = hb_fail(HB_ERROR_MEMORY, "no memory to ask for a fit");
    if (!status) status = hb_parse_kv(p.kv, f->cache_count, words);
    if (!status) status = bind(f, &p, weights, NULL, &program);
    if (!status) {
        const size_t partial = hb_partial_values(program, (uint32_t)p.threads, p.o.positions) * sizeof(float);
        lay_out(f, &p, &b);
        needs.mapped = f->map.bytes;
        needs.model = hb_allocation_cost(b.used) + hb_allocation_cost(hb_pool_bytes(p.threads)) +
                      hb_allocation_cost(hb_program_bytes(program)) +
                      hb_allocation_cost(program->scratch_bytes * (size_t)p.threads) +
                      hb_allocation_cost(hb_working_bytes(program, p.o.rows)) +
                      (partial ? hb_allocation_cost(partial) : 0) + 128; /* an arena's own lines */
        needs.session = session_cost(f, words, p.o.positions, positions);
        memcpy(out, &needs, out->size < sizeof needs ? out->size : sizeof needs);
    }
    hb_free(program);
    hb_release(&f->allocator, weights), hb_release(&f->allocator, words);
    return status;
}
