/* Runs recorded programs on every instruction set of this machine and compares what they give.
 *
 *     parity VECTORS [ISA ...]
 *
 * tests/native/test_native_arm.py writes the vectors: a file header, then cases, every array on a multiple of
 * 64 bytes. A case is a program with its inputs, the output of the reference, which is to be met within a
 * bound, and that of the library on the machine that wrote the file, which is to be met bit by bit where only
 * the operations that the kernels share decide it. Prints a line for each kernel; exits 1 on a mismatch or
 * when a kernel was not tried, 2 when the file is unusable. */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "halfbyte_program.h"
#if defined(_WIN32) /* everything here comes from zeros() */
#include <malloc.h>
#define posix_memalign(p, alignment, bytes) (!(*(p) = _aligned_malloc(bytes, alignment)))
#define free _aligned_free
#endif

enum { MAX_ROWS = 256, MAX_ITEMS = 64, PAGE = 64 /* positions of a page of a cache */ };

typedef struct {
    char magic[8];
    uint32_t version, cases;
} file_header;

typedef struct {
    char name[64], family[16]; /* family of the LINEAR records */
    uint32_t policy, ops, slots, caches, weights, inputs, rows, picks, sessions, capacity, kv_type, output;
    uint32_t exact;
    float reference_bound, host_bound;
} case_header;

typedef struct {
    const case_header *head;
    const hb_op *ops;
    const hb_slot *slots;
    const hb_cache *caches;
    hb_weight *weights; /* pointers filled in */
    const int32_t *ids, *positions, *session_of, *picks;
    const uint32_t *input_slots;
    const float *inputs[MAX_ITEMS], *reference, *host;
} test_case;

typedef struct {
    unsigned cases, failures;
} tally;

static const char *const op_names[] = {"",       "embed",  "pick",   "rmsnorm", "layernorm",
                                       "linear", "add",    "mul",    "unary",   "glu",
                                       "rope",   "kv_put", "attend", "gather",  "hadamard"};
static uint8_t *file_bytes;
static size_t file_size, file_at;

static void die(const char *why) {
    fprintf(stderr, "parity: %s\n", why);
    exit(2);
}

static void *need(void *p) {
    if (!p) die("out of memory");
    return p;
}

/* The next array of the file. */
static void *take(size_t count, size_t size) {
    file_at = (file_at + 63) / 64 * 64;
    if (file_at > file_size || count > (file_size - file_at) / size) die("the file is too short");
    void *p = file_bytes + file_at;
    file_at += count * size;
    return p;
}

static void *zeros(size_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 64, bytes ? bytes : 1)) die("out of memory");
    return memset(p, 0, bytes);
}

static void read_file(const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f || fseek(f, 0, SEEK_END)) die("cannot open the vectors");
    const long size = ftell(f);
    if (size < 0) die("cannot read the vectors");
    rewind(f);
    file_size = (size_t)size;
    file_bytes = zeros(file_size);
    if (fread(file_bytes, 1, file_size, f) != file_size) die("cannot read the vectors");
    fclose(f);
}

static uint32_t slot_rows(const test_case *c, uint32_t slot) {
    return c->slots[slot].rows == HB_ROWS_PICKS ? c->head->picks : c->head->rows;
}

static test_case next_case(void) {
    test_case c = {.head = take(1, sizeof(case_header))};
    const case_header *h = c.head;
    if (h->weights > MAX_ITEMS || h->inputs > MAX_ITEMS || h->slots > MAX_ITEMS || h->caches > MAX_ITEMS)
        die("a case is too large");
    c.ops = take(h->ops, sizeof *c.ops);
    c.slots = take(h->slots, sizeof *c.slots);
    c.caches = take(h->caches, sizeof *c.caches);
    c.weights = take(h->weights, sizeof *c.weights);
    c.ids = take(h->rows, 4), c.positions = take(h->rows, 4), c.session_of = take(h->rows, 4);
    c.picks = take(h->picks, 4);
    c.input_slots = take(h->inputs, 4);
    for (uint32_t i = 0; i < h->weights; i++) c.weights[i].data = take((size_t)c.weights[i].nbytes, 1);
    for (uint32_t i = 0; i < h->inputs; i++) {
        if (c.input_slots[i] >= h->slots) die("an input has no slot");
        c.inputs[i] = take((size_t)slot_rows(&c, c.input_slots[i]) * c.slots[c.input_slots[i]].width, 4);
    }
    if (h->output >= h->slots) die("the output has no slot");
    const size_t values = (size_t)slot_rows(&c, h->output) * c.slots[h->output].width;
    c.reference = take(values, 4);
    c.host = take(values, 4);
    return c;
}

/* Keys and values of every session, all zero. */
static hb_kv *make_caches(const test_case *c) {
    const case_header *h = c->head;
    hb_kv *kv = zeros(h->sessions * sizeof *kv);
    for (uint32_t s = 0; s < h->sessions; s++) {
        const uint32_t count = h->capacity / PAGE;
        void **pages = zeros((size_t)h->caches * count * sizeof *pages);
        for (uint32_t i = 0; i < h->caches * count; i++) {
            const hb_cache *cache = &c->caches[i / count];
            /* floats, or codes padded to 32 columns and 16 with a byte of scale: never more than this */
            pages[i] = zeros((size_t)cache->kv_heads * PAGE * (cache->k_dim + cache->v_dim + 48) * 4);
        }
        uint32_t *types = zeros(h->caches * sizeof *types);
        for (uint32_t i = 0; i < h->caches; i++) types[i] = h->kv_type;
        kv[s] = (hb_kv){.pages = pages, .types = types, .page_count = count};
    }
    return kv;
}

static void free_caches(const test_case *c, hb_kv *kv) {
    for (uint32_t s = 0; s < c->head->sessions; s++) {
        for (uint32_t i = 0; i < c->head->caches * kv[s].page_count; i++) free(kv[s].pages[i]);
        free((void *)kv[s].pages);
        free((void *)kv[s].types);
    }
    free(kv);
}

static bool agrees(const test_case *c, const float *out, size_t stride) {
    const case_header *h = c->head;
    const uint32_t width = c->slots[h->output].width;
    bool all = true;
    for (size_t row = 0, i = 0; row < slot_rows(c, h->output); row++)
        for (size_t col = 0; col < width; col++, i++) {
            const float y = out[row * stride + col];
            all = all && fabs((double)y - c->reference[i]) <= h->reference_bound;
            if (h->exact)
                all = all && !memcmp(&y, &c->host[i], 4);
            else
                all = all && fabs((double)y - c->host[i]) <= h->host_bound;
        }
    return all;
}

static bool run_case(const test_case *c, int isa, hb_pool *pool) {
    const case_header *h = c->head;
    char error[256];
    hb_program *program = hb_bind(c->ops, h->ops, c->slots, h->slots, c->caches, h->caches, c->weights,
                                  h->weights, (int)h->policy, isa, pool, error, sizeof error);
    if (!program) die(error);
    float *base[MAX_ITEMS];
    for (uint32_t i = 0; i < h->slots; i++) base[i] = zeros((size_t)slot_rows(c, i) * c->slots[i].width * 4);
    for (uint32_t i = 0; i < h->inputs; i++) {
        const hb_slot *s = &c->slots[c->input_slots[i]];
        for (size_t row = 0; row < slot_rows(c, c->input_slots[i]); row++)
            memcpy(base[s->base] + row * c->slots[s->base].width + s->offset, c->inputs[i] + row * s->width,
                   s->width * sizeof(float));
    }
    hb_kv *kv = make_caches(c);
    const hb_step step = {.rows = h->rows,
                          .picks = h->picks,
                          .ids = c->ids,
                          .positions = c->positions,
                          .sessions = c->session_of,
                          .pick_rows = c->picks,
                          .slot_base = base,
                          .kv = kv,
                          .kv_count = h->sessions};
    const int status = hb_run(program, &step, 0, h->ops);
    if (status != HB_OK) die(hb_status_text(status));
    const hb_slot *out = &c->slots[h->output];
    const bool right = agrees(c, base[out->base] + out->offset, c->slots[out->base].width);
    hb_free(program);
    free_caches(c, kv);
    for (uint32_t i = 0; i < h->slots; i++) free(base[i]);
    return right;
}

/* Whether a program uses a kernel: activations are quantised for the integer families. */
static bool uses(const test_case *c, const hb_kernel_info *k) {
    for (uint32_t i = 0; i < c->head->ops; i++) {
        const uint32_t code = c->ops[i].code;
        const char *op = code < sizeof op_names / sizeof *op_names ? op_names[code] : "";
        if (strcmp(op, "linear")) {
            /* a long context and few rows: its segments are summed apart and merged */
            if (!strcmp(k->op, "attend_merge") && !strcmp(op, "attend"))
                return c->head->capacity > 1024 && c->head->rows <= 4;
            if (!strcmp(op, k->op)) return true;
        } else if (!strcmp(k->op, "linear")
                       ? !strcmp(k->family, c->head->family)
                       : !strcmp(k->op, "quantize") && strcmp(c->head->family, "float") &&
                             strcmp(c->head->family, "dequantised")) {
            return true;
        }
    }
    return false;
}

/* Every case on one instruction set; the number of kernels that are wrong or untried. */
static unsigned run_isa(const test_case *cases, uint32_t count, int isa, hb_pool *pool) {
    tally tallies[MAX_ROWS] = {{0}};
    unsigned bad = 0;
    for (uint32_t i = 0; i < count; i++) {
        const bool right = run_case(&cases[i], isa, pool);
        if (!right) printf("%s: %s differs\n", hb_isa_name(isa), cases[i].head->name);
        for (int row = 0; row < hb_kernel_count(); row++) {
            hb_kernel_info k;
            hb_kernel_info_at(row, isa, &k);
            if (!k.chosen || !uses(&cases[i], &k)) continue;
            tallies[row].cases++;
            tallies[row].failures += !right;
        }
    }
    for (int row = 0; row < hb_kernel_count(); row++) {
        hb_kernel_info k;
        hb_kernel_info_at(row, isa, &k);
        if (!k.chosen) continue;
        const bool ok = tallies[row].cases && !tallies[row].failures;
        printf("%-12s %-34s %4u cases %s\n", hb_isa_name(isa), k.name, tallies[row].cases,
               ok                   ? "ok"
               : tallies[row].cases ? "WRONG"
                                    : "UNTRIED");
        bad += !ok;
    }
    return bad;
}

int main(int argc, char **argv) {
    if (argc < 2) die("usage: parity VECTORS [ISA ...]");
    read_file(argv[1]);
    const file_header *head = take(1, sizeof *head);
    if (memcmp(head->magic, "HBPARITY", 8) || head->version != 1) die("not a file of vectors");
    if (hb_kernel_count() > MAX_ROWS) die("the kernel table is too large");
    test_case *cases = zeros(head->cases * sizeof *cases);
    for (uint32_t i = 0; i < head->cases; i++) cases[i] = next_case();
    hb_pool *pool = need(hb_pool_create(2));
    unsigned bad = 0;
    int tried = 0;
    for (int isa = 0; isa < HB_ISA_COUNT; isa++) {
        bool wanted = argc == 2;
        for (int i = 2; i < argc; i++) wanted = wanted || !strcmp(argv[i], hb_isa_name(isa));
        if (!wanted || !hb_isa_supported(isa)) continue;
        tried++;
        bad += run_isa(cases, head->cases, isa, pool);
    }
    hb_pool_free(pool);
    free(cases), free(file_bytes);
    if (!tried) die("this machine has none of these instruction sets");
    return bad ? 1 : 0;
}
