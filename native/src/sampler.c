/* Sampling: the steps, their order and the draws of runtime/sampler.py. */
#include <math.h>
#include <string.h>

#include "memory.h"

struct hb_sampler {
    hb_allocator allocator;
    hb_sampling how;
    uint32_t vocab_size;
    uint64_t state[2], increment[2]; /* 128 bits each, the low half first */
    double *values, *weights;
    uint32_t *order;
};

/* ---- PCG64 (O'Neill 2014) as NumPy seeds it ---- */

static void multiply(uint64_t a, uint64_t b, uint64_t *low, uint64_t *high) {
    const uint64_t al = (uint32_t)a, ah = a >> 32, bl = (uint32_t)b, bh = b >> 32;
    const uint64_t mid = ah * bl + (al * bl >> 32), other = al * bh + (uint32_t)mid;
    *low = a * b;
    *high = ah * bh + (mid >> 32) + (other >> 32);
}

static void step(hb_sampler *s) {
    static const uint64_t factor[2] = {0x4385df649fccf645u, 0x2360ed051fc65da4u};
    uint64_t low, high;
    multiply(s->state[0], factor[0], &low, &high);
    high += s->state[0] * factor[1] + s->state[1] * factor[0];
    s->state[0] = low + s->increment[0];
    s->state[1] = high + s->increment[1] + (s->state[0] < low);
}

static uint64_t next(hb_sampler *s) {
    step(s);
    const uint64_t x = s->state[0] ^ s->state[1];
    const unsigned by = (unsigned)(s->state[1] >> 58);
    return x >> by | x << ((64 - by) & 63);
}

static uint32_t hash(uint32_t value, uint32_t *constant, uint32_t factor) {
    value ^= *constant;
    *constant *= factor;
    value *= *constant;
    return value ^ value >> 16;
}

/* NumPy's SeedSequence of one integer (after O'Neill, "Developing a seed_seq alternative", 2015). */
static void seed(hb_sampler *s, uint64_t number) {
    uint32_t pool[4], constant = 0x43b0d7e5, words[8];
    for (int i = 0; i < 4; i++)
        pool[i] = hash(i < 2 ? (uint32_t)(number >> 32 * i) : 0, &constant, 0x931e8875);
    for (int from = 0; from < 4; from++)
        for (int to = 0; to < 4; to++) {
            if (from == to) continue;
            const uint32_t mixed =
                0xca01f9ddu * pool[to] - 0x4973f715u * hash(pool[from], &constant, 0x931e8875);
            pool[to] = mixed ^ mixed >> 16;
        }
    constant = 0x8b51f9dd;
    for (int i = 0; i < 8; i++) words[i] = hash(pool[i % 4], &constant, 0x58f38ded);
    uint64_t v[4];
    for (int i = 0; i < 4; i++) v[i] = words[2 * i] | (uint64_t)words[2 * i + 1] << 32;
    /* v: start high, start low, sequence high, sequence low */
    s->increment[0] = v[3] << 1 | 1, s->increment[1] = v[2] << 1 | v[3] >> 63;
    s->state[0] = s->state[1] = 0;
    step(s);
    const uint64_t low = s->state[0] + v[1];
    s->state[1] += v[0] + (low < v[1]);
    s->state[0] = low;
    step(s);
}

/* ---- choosing ---- */

static int check_sampling(const hb_sampling *h) {
    const struct {
        const char *name;
        double value, low, high;
    } rows[] = {{"temperature", h->temperature, 0, 1e6},
                {"top_p", h->top_p, 0, 1},
                {"min_p", h->min_p, 0, 1},
                {"repetition_penalty", h->repetition_penalty, 1e-3, 1e3},
                {"presence_penalty", h->presence_penalty, -1e3, 1e3},
                {"frequency_penalty", h->frequency_penalty, -1e3, 1e3}};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        if (!(rows[i].value >= rows[i].low && rows[i].value <= rows[i].high))
            return hb_fail(HB_ERROR_ARGUMENT, "%s must lie between %g and %g, not %g", rows[i].name,
                           rows[i].low, rows[i].high, rows[i].value);
    return HB_OK;
}

int hb_sampler_create(const hb_sampling *given, uint32_t vocab_size, const hb_allocator *allocator,
                      hb_sampler **out) {
    HB_OPTIONS(hb_sampling, given);
    const hb_allocator a = hb_allocator_of(allocator);
    hb_block b = {NULL, 0};
    *out = NULL;
    if (options.repetition_penalty == 0) options.repetition_penalty = 1;
    if (options.top_p == 0) options.top_p = 1;
    const int status = check_sampling(&options);
    if (status) return status;
    if (!vocab_size || vocab_size > INT32_MAX)
        return hb_fail(HB_ERROR_ARGUMENT, "a vocabulary of %u", vocab_size);
    for (int pass = 0; pass < 2; pass++) {
        b.used = 0;
        hb_sampler *s = hb_take(&b, 1, sizeof *s);
        double *values = hb_take(&b, vocab_size, sizeof *values),
               *weights = hb_take(&b, vocab_size, sizeof *weights);
        uint32_t *order = hb_take(&b, vocab_size, sizeof *order);
        if (!pass) {
            if (!(b.base = hb_allocate(&a, b.used)))
                return hb_fail(HB_ERROR_MEMORY, "no memory for a sampler");
            continue;
        }
        *s = (hb_sampler){a, options, vocab_size, {0}, {0}, values, weights, order};
        seed(s, options.seed);
        *out = s;
    }
    return HB_OK;
}

void hb_sampler_free(hb_sampler *s) {
    if (!s) return;
    const hb_allocator a = s->allocator;
    hb_release(&a, s);
}

static void penalise(hb_sampler *s, const int32_t *history, uint32_t count) {
    const hb_sampling *h = &s->how;
    const uint32_t window = h->penalty_window && h->penalty_window < count ? h->penalty_window : count;
    uint32_t *seen = s->order; /* occurrences */
    memset(seen, 0, s->vocab_size * sizeof *seen);
    for (uint32_t i = count - window; i < count; i++)
        if ((uint32_t)history[i] < s->vocab_size) seen[history[i]]++;
    for (uint32_t i = 0; i < s->vocab_size; i++) {
        if (!seen[i]) continue;
        double v = s->values[i];
        v = v > 0 ? v / h->repetition_penalty : v * h->repetition_penalty;
        s->values[i] = v - h->presence_penalty - h->frequency_penalty * seen[i];
    }
}

/* Whether id a ranks before id b: by falling value, then by rising id. */
static int ranks_before(const hb_sampler *s, uint32_t a, uint32_t b) {
    return s->values[a] > s->values[b] || (s->values[a] == s->values[b] && a < b);
}

static void sift(const hb_sampler *s, uint32_t *heap, uint32_t at, uint32_t count) {
    const uint32_t moved = heap[at];
    for (uint32_t child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && ranks_before(s, heap[child + 1], heap[child])) child++;
        if (!ranks_before(s, heap[child], moved)) break;
        heap[at] = heap[child];
    }
    heap[at] = moved;
}

/* Moves the best of a heap behind its end. */
static uint32_t pop(const hb_sampler *s, uint32_t *heap, uint32_t *count) {
    const uint32_t best = heap[0];
    heap[0] = heap[--*count];
    heap[*count] = best;
    if (*count) sift(s, heap, 0, *count);
    return best;
}

static int32_t draw(hb_sampler *s, double top) {
    const hb_sampling *h = &s->how;
    const uint32_t n = s->vocab_size;
    uint32_t kept = n, left = n;
    const int ranked = (h->top_k && h->top_k < n) || h->top_p < 1;
    double total = 0, sum = 0;
    for (uint32_t i = 0; i < n; i++)
        s->order[i] = i, s->weights[i] = exp((s->values[i] - top) / h->temperature);
    if (ranked)
        for (uint32_t i = n / 2; i-- > 0;) sift(s, s->order, i, n);
    if (h->top_k && h->top_k < n) { /* the k best lie behind the heap; what is left is out */
        while (n - left < h->top_k) pop(s, s->order, &left);
        for (uint32_t i = 0; i < left; i++) s->weights[s->order[i]] = 0;
        kept = h->top_k;
    }
    if (h->top_p < 1) {
        for (uint32_t i = 0; i < n; i++) total += s->weights[i];
        const double target = h->top_p * total;
        uint32_t taken = 0;
        if (kept < n) { /* in rank order already: the best is last */
            for (; taken < kept && (taken == 0 || sum < target); taken++)
                sum += s->weights[s->order[n - 1 - taken]];
            for (uint32_t i = taken; i < kept; i++) s->weights[s->order[n - 1 - i]] = 0;
        } else {
            while (left && (!taken++ || sum < target)) sum += s->weights[pop(s, s->order, &left)];
            for (uint32_t i = 0; i < left; i++) s->weights[s->order[i]] = 0;
        }
    }
    total = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (s->weights[i] < h->min_p) s->weights[i] = 0;
        total += s->weights[i];
    }
    const double at = (double)(next(s) >> 11) * 0x1p-53 * total;
    int32_t last = -1;
    sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (s->weights[i] == 0) continue;
        last = (int32_t)i;
        if ((sum += s->weights[i]) > at) break;
    }
    return last;
}

int hb_sample(hb_sampler *s, const float *logits, const int32_t *history, uint32_t count, int32_t *id) {
    const hb_sampling *h = &s->how;
    double top = -INFINITY;
    uint32_t best = 0;
    for (uint32_t i = 0; i < s->vocab_size; i++) {
        s->values[i] = logits[i];
        if (isnan(logits[i]) || logits[i] == INFINITY)
            return hb_fail(HB_ERROR_ARGUMENT, "the logits hold %s", isnan(logits[i]) ? "NaN" : "infinity");
    }
    if (count && (h->repetition_penalty != 1 || h->presence_penalty != 0 || h->frequency_penalty != 0))
        penalise(s, history, count);
    for (uint32_t i = 0; i < s->vocab_size; i++)
        if (s->values[i] > top) top = s->values[i], best = i;
    if (top == -INFINITY) return hb_fail(HB_ERROR_ARGUMENT, "no token is possible");
    *id = h->temperature == 0 ? (int32_t)best : draw(s, top);
    return HB_OK;
}
