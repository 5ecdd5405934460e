/* Byte pair encoding: the pair of the lowest rank is merged first, the leftmost of equal ones (Sennrich et
 * al. 2016). */
#include "tokenizer.h"

enum { SMALL = 48, MERGE_BUCKET = 8 };

/* The rank of a merge of two tokens, or HB_NONE. */
static uint32_t rank_of(const hb_tokenizer *t, uint32_t left, uint32_t right) {
    const hb_bytes table = t->tables[HB_T_MERGES];
    const uint32_t slots = (uint32_t)(table.n / 8);
    const uint64_t key = (uint64_t)left << 20 | right, h = key * 0x9E3779B97F4A7C15u;
    uint32_t at = (uint32_t)((h >> 32) * (slots / MERGE_BUCKET) >> 32) * MERGE_BUCKET;
    for (uint32_t i = 0; i < slots; i++, at = at + 1 < slots ? at + 1 : 0) {
        const uint64_t entry = hb_u64(table.p + 8 * (size_t)at);
        if (entry >> 24 == key) return (uint32_t)(entry & 0xFFFFFF);
        if (entry == UINT64_MAX) break;
    }
    return HB_NONE;
}

static uint32_t merged(const hb_tokenizer *t, uint32_t rank) {
    const uint32_t id = hb_entry(t->tables[HB_T_MERGED], rank);
    return id < t->count ? id : 0;
}

/* Tokens of the characters or bytes of a word, at most one a byte; how many. */
static size_t letters(const hb_tokenizer *t, hb_bytes w, uint32_t *ids) {
    const uint8_t *p = w.p, *const end = p + w.n;
    const hb_bytes bytes = t->tables[HB_T_BYTE_IDS];
    size_t n = 0;
    bool unknown = false; /* one is to be added: equal neighbours may become one */
    while (p < end) {
        const uint8_t *const from = p;
        uint32_t id;
        if (t->flags & HB_BYTE_LEVEL) {
            id = hb_entry(bytes, *p++);
        } else {
            p += hb_character_bytes(p, end);
            id = hb_find_token(t, from, (size_t)(p - from));
        }
        if (id < t->count) {
            if (unknown) ids[n++] = t->unknown;
            unknown = false;
            ids[n++] = id;
        } else if (t->flags & HB_BYTE_FALLBACK) {
            for (const uint8_t *b = from; b < p; b++) {
                id = hb_entry(bytes, *b);
                ids[n++] = id < t->count ? id : 0;
            }
        } else if (t->unknown != HB_NONE) {
            if (unknown && !(t->flags & HB_FUSE_UNKNOWN)) ids[n++] = t->unknown;
            unknown = true;
        }
    }
    if (unknown) ids[n++] = t->unknown;
    return n;
}

static void merge_small(hb_encoding *e, uint32_t *ids, size_t n) {
    const hb_tokenizer *t = e->t;
    uint32_t rank[SMALL];
    for (size_t i = 0; i + 1 < n; i++) rank[i] = rank_of(t, ids[i], ids[i + 1]);
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (rank[i] < rank[best]) best = i;
        if (rank[best] == HB_NONE) break;
        ids[best] = merged(t, rank[best]);
        n--;
        memmove(ids + best + 1, ids + best + 2, (n - best - 1) * sizeof *ids);
        if (best + 1 < n) {
            memmove(rank + best + 1, rank + best + 2, (n - best - 2) * sizeof *rank);
            rank[best] = rank_of(t, ids[best], ids[best + 1]);
        }
        if (best) rank[best - 1] = rank_of(t, ids[best - 1], ids[best]);
    }
    for (size_t i = 0; i < n; i++) hb_emit_word(e, ids[i]);
}

/* ---- long words: a heap of rank << 32 | position ---- */

typedef struct heap {
    uint64_t *items;
    size_t count;
} heap;

static void heap_push(heap *h, uint64_t item) {
    size_t i = h->count++;
    for (; i && h->items[(i - 1) / 2] > item; i = (i - 1) / 2) h->items[i] = h->items[(i - 1) / 2];
    h->items[i] = item;
}

static uint64_t heap_pop(heap *h) {
    const uint64_t top = h->items[0], item = h->items[--h->count];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= h->count) break;
        if (child + 1 < h->count && h->items[child + 1] < h->items[child]) child++;
        if (h->items[child] >= item) break;
        h->items[i] = h->items[child];
        i = child;
    }
    h->items[i] = item;
    return top;
}

typedef struct symbol {
    uint32_t id, next, before,
        rank; /* rank of the pair that it starts; stale items of the heap have another */
} symbol;

static void pair(const hb_tokenizer *t, symbol *s, size_t n, uint32_t i, heap *h) {
    s[i].rank = s[i].next < n ? rank_of(t, s[i].id, s[s[i].next].id) : HB_NONE;
    if (s[i].rank != HB_NONE) heap_push(h, (uint64_t)s[i].rank << 32 | i);
}

/* At e->work: room for n symbols and 3 n items, then the ids. */
static void merge_large(hb_encoding *e, const uint32_t *ids, size_t n) {
    const hb_tokenizer *t = e->t;
    heap h = {(uint64_t *)(void *)e->work.p, 0};
    symbol *s = (symbol *)(void *)(h.items + 3 * n);
    for (uint32_t i = 0; i < n; i++) s[i] = (symbol){ids[i], i + 1, i - 1, HB_NONE};
    for (uint32_t i = 0; i < n; i++) pair(t, s, n, i, &h);
    while (h.count) {
        const uint64_t top = heap_pop(&h);
        const uint32_t i = (uint32_t)top;
        if (s[i].rank != top >> 32) continue;
        const uint32_t gone = s[i].next;
        s[i].id = merged(t, s[i].rank);
        s[i].next = s[gone].next;
        s[gone].rank = HB_NONE;
        if (s[i].next < n) s[s[i].next].before = i;
        pair(t, s, n, i, &h);
        if (i) pair(t, s, n, s[i].before, &h);
    }
    for (uint32_t i = 0; i < n; i = s[i].next) hb_emit_word(e, s[i].id);
}

static void word(hb_encoding *e, hb_bytes w) {
    const hb_tokenizer *t = e->t;
    if (w.n <= HB_MAX_TOKEN) {
        const uint32_t id = hb_find_token(t, w.p, w.n);
        if (id != HB_NONE && hb_kind(t, id) & HB_KIND_WHOLE) {
            hb_emit_word(e, id);
            return;
        }
    }
    if (w.n <= SMALL) {
        uint32_t ids[SMALL];
        merge_small(e, ids, letters(t, w, ids));
        return;
    }
    if (w.n >= UINT32_MAX / 2 || !hb_room(e, &e->work, w.n * (3 * sizeof(uint64_t) + sizeof(symbol)))) {
        if (!e->status) e->status = HB_ERROR_MEMORY;
        return;
    }
    if (!hb_room(e, &e->found, w.n * sizeof(uint32_t))) return;
    uint32_t *ids = (uint32_t *)(void *)e->found.p;
    merge_large(e, ids, letters(t, w, ids));
}

void hb_bpe(hb_encoding *e, hb_bytes text) {
    const hb_bytes mark = e->t->prefix;
    if (!(e->t->flags & HB_WORD_STARTS)) {
        word(e, text);
        return;
    }
    /* No token has the mark behind anything else, so that no merge crosses the start of a word. */
    size_t from = 0, at = 0;
    bool inside = false;
    while (at < text.n && !e->status) {
        if (text.n - at >= mark.n && !memcmp(text.p + at, mark.p, mark.n)) {
            if (inside) {
                word(e, (hb_bytes){text.p + from, at - from});
                from = at;
            }
            inside = false;
            at += mark.n;
        } else {
            inside = true;
            at++;
        }
    }
    if (from < text.n && !e->status) word(e, (hb_bytes){text.p + from, text.n - from});
}
