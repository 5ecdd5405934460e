#include "vocab.h"

enum { HEAD = 96, STEP = 24, TOKEN_BUCKET = 16 };

static int damaged(const char *what) {
    return hb_fail(HB_ERROR_FORMAT, "the section VOCB is damaged: %s", what);
}

static bool slice(hb_bytes from, uint32_t at, uint32_t n, hb_bytes *out) {
    if (at > from.n || n > from.n - at) return false;
    *out = (hb_bytes){from.p + at, n};
    return true;
}

static bool open_trie(hb_bytes b, hb_trie *t) {
    if (!b.n) return true;
    if (b.n < 4) return false;
    t->nodes = hb_u32(b.p);
    if (!t->nodes || (b.n - 4) / 9 < t->nodes || b.n != 8 + 9 * (uint64_t)t->nodes) return false;
    t->child = b.p + 4;
    t->value = t->child + 4 * ((size_t)t->nodes + 1);
    t->label = t->value + 4 * (size_t)t->nodes;
    const uint32_t lo = hb_u32(t->child), hi = hb_u32(t->child + 4);
    if (lo != 1 || hi < lo || hi > t->nodes) return false;
    for (uint32_t i = lo; i < hi; i++) t->first[t->label[i] >> 3] |= (uint8_t)(1 << (t->label[i] & 7));
    return true;
}

static bool open_pages(const uint8_t *index, uint32_t pages) {
    for (uint32_t i = 0; i < HB_PAGES; i++)
        if (hb_u16(index + 2 * i) >= pages) return false;
    return pages > 0 && pages <= HB_PAGES;
}

static bool open_automaton(hb_bytes b, hb_automaton *a) {
    if (b.n < 20 + 2 * HB_PAGES) return false;
    const uint32_t states = hb_u32(b.p), columns = hb_u32(b.p + 4), pages = hb_u32(b.p + 16);
    if (!states || states > 4096 || columns < 2 || columns > 256 || !open_pages(b.p + 20, pages))
        return false;
    if (b.n != 20 + 2 * HB_PAGES + 256 * (size_t)pages + 2 * (size_t)states * columns) return false;
    *a =
        (hb_automaton){columns, {hb_u32(b.p + 8), hb_u32(b.p + 12)}, b.p + 20, b.p + 20 + 2 * HB_PAGES, 0, 0};
    a->transitions = a->classes + 256 * pages;
    a->ascii = a->classes + 256 * hb_u16(a->index);
    if (a->start[0] >= states || a->start[1] >= states) return false;
    for (size_t i = 0; i < 256 * (size_t)pages; i++)
        if (a->classes[i] >= columns - 1) return false;
    for (size_t i = 0; i < (size_t)states * columns; i++) {
        const uint32_t to = hb_u16(a->transitions + 2 * i);
        if ((to & (HB_MATCH - 1)) >= states || (i < columns && to)) return false;
    }
    return true;
}

static bool check_map(hb_bytes b) {
    if (b.n < 8 + 2 * HB_PAGES) return false;
    const uint32_t entries = hb_u32(b.p), pages = hb_u32(b.p + 4);
    if (!open_pages(b.p + 8, pages) || entries > 0xFFFE) return false;
    const size_t at = 8 + 2 * HB_PAGES + 512 * (size_t)pages, texts = at + 4 * ((size_t)entries + 1);
    if (b.n < texts) return false;
    for (size_t i = 0; i < 256 * (size_t)pages; i++)
        if (hb_u16(b.p + 8 + 2 * HB_PAGES + 2 * i) > entries) return false;
    for (uint32_t i = 0, last = 0; i <= entries; i++) {
        const uint32_t to = hb_u32(b.p + at + 4 * i);
        if (to < last || to - last > HB_MAX_TOKEN || to > b.n - texts) return false;
        last = to;
    }
    return true;
}

static bool check_normal(hb_bytes b) {
    if (b.n < 20 + 2 * HB_PAGES) return false;
    const uint32_t records = hb_u32(b.p + 4), characters = hb_u32(b.p + 8), pairs = hb_u32(b.p + 12);
    const uint32_t pages = hb_u32(b.p + 16);
    if (!open_pages(b.p + 20, pages) || records > 1 << 20 || characters > 1 << 20 || pairs > 1 << 20)
        return false;
    const size_t at = 20 + 2 * HB_PAGES + 512 * (size_t)pages;
    if (b.n != at + 4 * (3 * (size_t)records + characters + 3 * (size_t)pairs)) return false;
    for (size_t i = 0; i < 256 * (size_t)pages; i++)
        if (hb_u16(b.p + 20 + 2 * HB_PAGES + 2 * i) > records) return false;
    for (uint32_t i = 0; i < records; i++) {
        const uint8_t *r = b.p + at + 12 * (size_t)i;
        if (hb_u32(r) > 511 || hb_u32(r + 8) > 32 || hb_u32(r + 4) > characters ||
            hb_u32(r + 8) > characters - hb_u32(r + 4))
            return false;
    }
    for (size_t i = 0; i < characters + 3 * (size_t)pairs; i++)
        if (hb_u32(b.p + at + 12 * (size_t)records + 4 * i) >= 0x110000) return false;
    return true;
}

static bool open_step(const hb_tokenizer *t, uint32_t i, hb_tokenizer_step *s) {
    const uint8_t *r = t->tables[HB_T_STEPS].p + STEP * i;
    const hb_bytes pool = t->tables[HB_T_POOL];
    s->kind = hb_u32(r), s->flags = hb_u32(r + 4);
    if (!slice(pool, hb_u32(r + 8), hb_u32(r + 12), &s->pattern)) return false;
    if (!slice(pool, hb_u32(r + 16), hb_u32(r + 20), &s->text) || s->text.n > HB_MAX_TOKEN) return false;
    switch (s->kind) {
        case HB_STEP_NORMAL:
            return check_normal(s->pattern);
        case HB_STEP_MAP:
            return check_map(s->pattern);
        case HB_STEP_SPLIT:
            if (i < t->normalizers || (s->flags & 7) > HB_WITH_NEXT || s->flags > 15) return false;
            return open_automaton(s->pattern, &s->automaton);
        case HB_STEP_REPLACE:
            return open_automaton(s->pattern, &s->automaton);
        case HB_STEP_LITERAL:
            return s->pattern.n > 0 && s->pattern.n <= HB_MAX_TOKEN;
        case HB_STEP_PREPEND:
            return s->flags <= 3;
        default:
            return false;
    }
}

static bool check_tables(const hb_tokenizer *t) {
    const hb_bytes *b = t->tables;
    const size_t offsets = 4 * ((size_t)t->count + 1);
    if (b[HB_T_TOKEN_OFFSETS].n != offsets || b[HB_T_KINDS].n != t->count) return false;
    if (b[HB_T_TEXT_OFFSETS].n && b[HB_T_TEXT_OFFSETS].n != offsets) return false;
    if (b[HB_T_TOKEN_HASH].n % 64 || b[HB_T_MERGES].n % 64 || b[HB_T_MERGED].n % 4) return false;
    if (b[HB_T_BYTE_IDS].n && b[HB_T_BYTE_IDS].n != 1024) return false;
    if (t->flags & (HB_BYTE_LEVEL | HB_BYTE_FALLBACK) && !b[HB_T_BYTE_IDS].n) return false;
    if (b[HB_T_ADDED].n % 8 || b[HB_T_STEPS].n != STEP * (size_t)t->steps) return false;
    if (t->model == HB_BPE) return b[HB_T_TOKEN_HASH].n > 0;
    if (t->unknown == HB_NONE || !b[HB_T_TRIE].n) return false;
    return t->model == HB_WORDPIECE || (b[HB_T_TOKEN_HASH].n && b[HB_T_SCORES].n == 8 * (size_t)t->count);
}

static int open_tables(hb_bytes all, hb_tokenizer *t) {
    const uint8_t *h = all.p;
    size_t end = HEAD + 8 * HB_T_COUNT;
    if (all.n < end) return damaged("it is cut off");
    if (hb_u32(h) != 1)
        return hb_fail(HB_ERROR_FORMAT, "the section VOCB has version %u; a newer halfbyte may know it",
                       hb_u32(h));
    t->model = hb_u32(h + 4), t->flags = hb_u32(h + 8), t->count = hb_u32(h + 12);
    t->unknown = hb_u32(h + 16), t->bos = hb_u32(h + 20);
    t->normalizers = hb_u32(h + 24), t->steps = hb_u32(h + 28);
    t->first = hb_u32(h + 32), t->first_count = hb_u32(h + 36);
    memcpy(&t->unknown_score, h + 56, 8);
    t->max_characters = hb_u32(h + 64);
    if (t->model < HB_BPE || t->model > HB_WORDPIECE || t->flags >= 32 || t->first > HB_FIRST_SPELLED)
        return damaged("the header has an unknown model or flag");
    if (!t->count || t->count > 1 << 20 || t->steps > HB_MAX_STEPS || t->normalizers > t->steps ||
        t->first_count > 255 || (t->unknown != HB_NONE && t->unknown >= t->count) ||
        (t->bos != HB_NONE && t->bos >= t->count))
        return damaged("a number of the header is out of range");
    for (int i = 0; i < HB_T_COUNT; i++) {
        const uint32_t at = hb_u32(h + HEAD + 8 * i), n = hb_u32(h + HEAD + 8 * i + 4);
        if (!at && !n) continue;
        if (!n || at < end || !slice(all, at, n, &t->tables[i])) return damaged("a table is out of place");
        end = (size_t)at + n;
    }
    if (!check_tables(t)) return damaged("a table has another size than it must");
    const hb_bytes pool = t->tables[HB_T_POOL];
    if (!slice(pool, hb_u32(h + 40), hb_u32(h + 44), &t->first_text) ||
        !slice(pool, hb_u32(h + 48), hb_u32(h + 52), &t->prefix) || t->first_text.n > HB_MAX_TOKEN ||
        t->prefix.n > HB_MAX_TOKEN || (t->flags & HB_WORD_STARTS && !t->prefix.n))
        return damaged("a text is outside the pool");
    if (!open_trie(t->tables[HB_T_TRIE], &t->trie) || !open_trie(t->tables[HB_T_RAW_ADDED], &t->raw_added) ||
        !open_trie(t->tables[HB_T_NORMALIZED_ADDED], &t->normalized_added))
        return damaged("a trie has another size than it says");
    for (uint32_t i = 0; i < t->steps; i++)
        if (!open_step(t, i, &t->step[i])) return damaged("a step is out of range");
    if (t->tables[HB_T_WORD_CHARACTERS].n &&
        !open_automaton(t->tables[HB_T_WORD_CHARACTERS], &t->word_characters))
        return damaged("an automaton is out of range");
    return HB_OK;
}

int hb_tokenizer_open(const void *vocb, size_t bytes, const hb_allocator *allocator, hb_tokenizer **out) {
    if (!vocb || !out)
        return hb_fail(HB_ERROR_ARGUMENT, "a tokenizer needs a section and a place for its handle");
    *out = NULL;
    const hb_allocator a = hb_allocator_of(allocator);
    hb_tokenizer *t = hb_allocate(&a, sizeof *t);
    if (!t) return hb_fail(HB_ERROR_MEMORY, "no memory for a tokenizer");
    memset(t, 0, sizeof *t);
    t->allocator = a;
    const int status = open_tables((hb_bytes){vocb, bytes}, t);
    if (status) {
        hb_release(&a, t);
        return status;
    }
    *out = t;
    return HB_OK;
}

void hb_tokenizer_free(hb_tokenizer *t) {
    if (!t) return;
    const hb_allocator a = t->allocator;
    hb_release(&a, t);
}

static hb_bytes text_of(hb_bytes offsets, hb_bytes bytes, uint32_t id) {
    const uint32_t from = hb_entry(offsets, id), to = hb_entry(offsets, (size_t)id + 1);
    if (from > to || to > bytes.n || to - from > HB_MAX_TOKEN) return (hb_bytes){bytes.p, 0};
    return (hb_bytes){bytes.p + from, to - from};
}

hb_bytes hb_token_spelled(const hb_tokenizer *t, uint32_t id) {
    return text_of(t->tables[HB_T_TOKEN_OFFSETS], t->tables[HB_T_TOKEN_BYTES], id);
}

hb_bytes hb_token_shown(const hb_tokenizer *t, uint32_t id) {
    if (!t->tables[HB_T_TEXT_OFFSETS].n) return hb_token_spelled(t, id);
    return text_of(t->tables[HB_T_TEXT_OFFSETS], t->tables[HB_T_TEXT_BYTES], id);
}

static uint64_t mixed(uint64_t h, uint64_t x) {
    h = (h ^ x) * 0x9E3779B97F4A7C15u;
    return h ^ h >> 32;
}

static uint64_t hash(const uint8_t *p, size_t n) {
    uint64_t h = n;
    for (; n >= 8; n -= 8, p += 8) h = mixed(h, hb_u64(p));
    if (n >= 4) return mixed(h, hb_u32(p) | (uint64_t)hb_u32(p + n - 4) << 8 * (n - 4));
    if (n) return mixed(h, p[0] | (uint64_t)p[n / 2] << 8 * (n / 2) | (uint64_t)p[n - 1] << 8 * (n - 1));
    return h;
}

uint32_t hb_find_token(const hb_tokenizer *t, const uint8_t *p, size_t n) {
    const hb_bytes table = t->tables[HB_T_TOKEN_HASH];
    const uint32_t slots = (uint32_t)(table.n / 4);
    const uint64_t h = hash(p, n);
    uint32_t at = (uint32_t)((h >> 32) * (slots / TOKEN_BUCKET) >> 32) * TOKEN_BUCKET;
    for (uint32_t i = 0; i < slots; i++, at = at + 1 < slots ? at + 1 : 0) {
        const uint32_t entry = hb_u32(table.p + 4 * (size_t)at);
        if (entry == HB_NONE) break;
        if ((entry ^ h) & 0xFFF) continue;
        const hb_bytes found = hb_token_spelled(t, entry >> 12);
        if (found.n == n && entry >> 12 < t->count && !memcmp(found.p, p, n)) return entry >> 12;
    }
    return HB_NONE;
}

uint32_t hb_trie_child(const hb_trie *trie, uint32_t node, uint8_t label) {
    uint32_t lo = hb_u32(trie->child + 4 * (size_t)node), hi = hb_u32(trie->child + 4 * (size_t)node + 4);
    if (hi > trie->nodes || lo <= node) return 0;
    while (lo < hi) {
        const uint32_t mid = lo + (hi - lo) / 2;
        if (trie->label[mid] == label) return mid;
        if (trie->label[mid] < label)
            lo = mid + 1;
        else
            hi = mid;
    }
    return 0;
}
