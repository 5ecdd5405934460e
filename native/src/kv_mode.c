/* Names of kv modes (SPEC.md section 10.5), and the choice of one by what was measured (section 13.2). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "json.h"
#include "session.h"

static const hb_mode_rule modes[] = HB_MODE_TABLE;
static const char *const side_names[] = HB_SIDE_NAME_TABLE;

static int find_side(const char *name, size_t bytes) {
    for (int i = 0; i < HB_SIDE_COUNT; i++)
        if (strlen(side_names[i]) == bytes && !memcmp(side_names[i], name, bytes) && hb_sides[i].rule)
            return i;
    return -1;
}

/* The word of a mode's name of `bytes` characters, or 0xffffffff. */
static uint32_t mode_word(const char *name, size_t bytes) {
    int k = -1, v = -1;
    for (size_t i = 0; i < sizeof modes / sizeof modes[0]; i++)
        if (strlen(modes[i].name) == bytes && !memcmp(modes[i].name, name, bytes))
            k = modes[i].k, v = modes[i].v;
    const char *at = bytes && *name == 'k' ? memchr(name + 1, 'v', bytes - 1) : NULL;
    if (k < 0 && at)
        k = find_side(name + 1, (size_t)(at - name) - 1),
        v = find_side(at + 1, bytes - (size_t)(at - name) - 1);
    if (k < 0 || v < 0 || hb_sides[v].rest > 0) return UINT32_MAX;
    const uint32_t sides = (uint32_t)k | (uint32_t)v << 8;
    const uint32_t first = hb_sides[k].rule ? HB_SIDE_8 | HB_SIDE_8 << 8 : sides;
    return sides | first << 16;
}

int hb_parse_kv(const char *name, uint32_t count, uint32_t *words) {
    size_t part = strcspn(name, ",");
    const uint32_t all = mode_word(name, part);
    if (all == UINT32_MAX) return hb_fail(HB_ERROR_ARGUMENT, "unknown kv mode %s", name);
    for (uint32_t i = 0; i < count; i++) words[i] = all;
    for (const char *p = name + part; *p; p += part) {
        char *end;
        const long layer = strtol(++p, &end, 10);
        part = strcspn(p, ",");
        if (end == p || *end != '=' || layer >= (long)count || layer < -(long)count)
            return hb_fail(HB_ERROR_ARGUMENT, "kv mode %s: write tq3,0=k8v8,-1=k8v8, for %u layers", name,
                           count);
        const uint32_t word = mode_word(end + 1, part - (size_t)(end + 1 - p));
        if (word == UINT32_MAX) return hb_fail(HB_ERROR_ARGUMENT, "unknown kv mode in %s", name);
        words[layer < 0 ? (long)count + layer : layer] = word;
    }
    for (uint32_t i = 1; i < count; i++)
        if (!hb_sides[words[i] & 255].rule != !hb_sides[words[0] & 255].rule)
            return hb_fail(HB_ERROR_ARGUMENT, "kv mode %s: floats and packed modes cannot be mixed", name);
    return HB_OK;
}

/* Bytes of 4096 positions in a mode, by which modes are compared; 0 for one that is unknown. */
static uint64_t mode_bytes(const hb_file *f, const char *name, uint32_t *words) {
    uint64_t total = 0;
    if (hb_parse_kv(name, f->cache_count, words)) return 0;
    for (uint32_t c = 0; c < f->cache_count; c++)
        total += hb_page_bytes(&f->caches[c], words[c], 0) +
                 (4096 / HB_PAGE - 1) * (uint64_t)hb_page_bytes(&f->caches[c], words[c], 1);
    return total;
}

typedef struct choice {
    const hb_file *f;
    uint32_t *words;
    uint64_t bytes;
    char *name;
    size_t size;
    int known; /* modes that were measured */
} choice;

static void consider(choice *c, const char *name) {
    const uint64_t bytes = mode_bytes(c->f, name, c->words);
    if (!bytes || bytes >= c->bytes) return;
    c->bytes = bytes;
    snprintf(c->name, c->size, "%s", name);
}

/* {"modes": {name: {"kld": [numbers]}}}: those whose largest number is at most 0.01. */
static void read_measured(choice *c, hb_json modes_at) {
    char name[128];
    hb_json key, value, kld, item;
    for (hb_json at = hb_json_first(modes_at); hb_json_pair(&at, &key, &value);) {
        double worst = 0;
        if (!hb_json_text(key, name, sizeof name) || !hb_json_get(value, "kld", &kld)) continue;
        for (hb_json n = hb_json_first(kld); hb_json_item(&n, &item);) {
            const double v = hb_json_number(item);
            worst = v > worst ? v : worst;
        }
        c->known++;
        if (worst <= 0.01) consider(c, name);
    }
}

int hb_automatic_kv(const hb_file *f, int policy, char *name, size_t size) {
    bool floats = policy == HB_POLICY_F32, matrices = false;
    for (uint32_t i = 0; i < f->tensor_count; i++)
        matrices |= f->tensors[i].tile == HB_TILE_P16 && f->tensors[i].encoding != HB_ENC_F32;
    floats |= !matrices;
    snprintf(name, size, "%s", floats ? "f32" : "f16");
    if (floats || !f->cache_count) return HB_OK;
    uint32_t *words = hb_allocate(&f->allocator, f->cache_count * sizeof *words);
    if (!words) return hb_fail(HB_ERROR_MEMORY, "no memory to choose a kv mode");
    choice c = {f, words, UINT64_MAX, name, size, 0};
    hb_span text;
    hb_json modes_at;
    int status = hb_read_section(f, "KVMD", &text);
    const hb_json all = {(const char *)text.data, (const char *)text.data + text.bytes};
    if (!status && text.bytes && text.bytes <= HB_MAX_ANNOTATION && hb_json_get(all, "modes", &modes_at))
        read_measured(&c, modes_at);
    if (!c.known) consider(&c, "k8v8");
    consider(&c, "f16");
    hb_release(&f->allocator, words);
    return status;
}
