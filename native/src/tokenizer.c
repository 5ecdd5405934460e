/* hb_tokenize: added tokens are cut out of the text, the rest is normalised, split and handed to the model.
 */
#include "tokenizer.h"

enum { MAX_SPELLINGS = 1 << 16, MAX_CUTS = 200 };

/* ---- added tokens ---- */

/* White_Space, which Unicode does not change. */
static bool is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
           c == 0x3000;
}

static const uint8_t *before(const uint8_t *p, const uint8_t *begin) {
    do p--;
    while (p > begin && (*p & 0xC0) == 0x80);
    return p;
}

static bool is_word(const hb_tokenizer *t, const uint8_t *p, const uint8_t *end) {
    return hb_match(&t->word_characters, p, end, true) > 0;
}

/* Whether neither side of [from, to) is a letter of a word. */
static bool stands_alone(const hb_tokenizer *t, hb_bytes text, const uint8_t *from, const uint8_t *to) {
    const uint8_t *const end = text.p + text.n;
    if (!t->word_characters.columns) return true;
    return (from == text.p || !is_word(t, before(from, text.p), from)) && (to == end || !is_word(t, to, end));
}

/* The longest text of a trie at p: bytes, and its value. */
static size_t longest(const hb_trie *trie, const uint8_t *p, const uint8_t *end, uint32_t *value) {
    const uint8_t *const from = p;
    size_t found = 0;
    uint32_t node = 0;
    while (p < end && (node = hb_trie_child(trie, node, *p))) {
        p++;
        if (hb_trie_value(trie, node) != HB_NONE)
            found = (size_t)(p - from), *value = hb_trie_value(trie, node);
    }
    return found;
}

typedef void rest(hb_encoding *e, hb_bytes text, bool at_start);

static void cut_added(hb_encoding *e, const hb_trie *trie, hb_bytes text, bool at_start, rest *each) {
    const hb_bytes added = e->t->tables[HB_T_ADDED];
    const uint8_t *const end = text.p + text.n, *done = text.p;
    for (const uint8_t *p = text.p; trie->nodes && p < end && !e->status;) {
        uint32_t row = 0;
        const size_t n = trie->first[*p >> 3] >> (*p & 7) & 1 ? longest(trie, p, end, &row) : 0;
        if (!n) {
            p++;
            continue;
        }
        const uint8_t *from = p, *to = p += n;
        const uint32_t id = hb_entry(added, 2 * (size_t)row), flags = hb_entry(added, 2 * (size_t)row + 1);
        if (id >= e->t->count || (flags & HB_ADDED_SPECIAL && !(e->flags & HB_TOKENIZE_SPECIAL))) continue;
        if (flags & HB_ADDED_SINGLE && !stands_alone(e->t, text, from, to)) continue;
        while (flags & HB_ADDED_LEFT && from > done) {
            const uint8_t *q = before(from, done), *r = q;
            if (!is_space(hb_character(&r, from))) break;
            from = q;
        }
        while (flags & HB_ADDED_RIGHT && to < end) {
            const uint8_t *q = to;
            if (!is_space(hb_character(&q, end))) break;
            to = q;
        }
        if (done < from) each(e, (hb_bytes){done, (size_t)(from - done)}, at_start && done == text.p);
        hb_emit(e, id);
        done = to;
    }
    if (done < end && !e->status) each(e, (hb_bytes){done, (size_t)(end - done)}, at_start && done == text.p);
}

/* ---- plain text ---- */

static size_t characters(hb_bytes b) {
    size_t n = 0;
    for (size_t i = 0; i < b.n; i++) n += (b.p[i] & 0xC0) != 0x80;
    return n;
}

/* The ids of control tokens, the longest spelling first, to e->level[0], which plain words no longer need. */
static bool order_spellings(hb_encoding *e, hb_buffer *order) {
    const hb_bytes added = e->t->tables[HB_T_ADDED];
    for (size_t i = 0; i < added.n / 8; i++) {
        const uint32_t id = hb_entry(added, 2 * i);
        const hb_bytes s = hb_token_spelled(e->t, id);
        bool usable = hb_entry(added, 2 * i + 1) & HB_ADDED_SPECIAL && characters(s) >= 2;
        for (size_t k = 0; usable && e->t->flags & HB_BYTE_LEVEL && k < s.n; k++) usable = s.p[k] < 0x80;
        if (!usable || order->used / 4 >= MAX_SPELLINGS) continue;
        if (!hb_append(e, order, &id, 4)) return false;
        uint32_t *ids = (uint32_t *)(void *)order->p;
        for (size_t k = order->used / 4 - 1; k; k--) {
            if (characters(hb_token_spelled(e->t, ids[k - 1])) >= characters(s)) break;
            ids[k] = ids[k - 1], ids[k - 1] = id;
        }
    }
    return true;
}

static const uint8_t *occurrence(hb_bytes text, size_t from, hb_bytes s) {
    for (const uint8_t *p = text.p + from, *end = text.p + text.n; (size_t)(end - p) >= s.n; p++) {
        p = memchr(p, s.p[0], (size_t)(end - p) - s.n + 1);
        if (!p) return NULL;
        if (!memcmp(p, s.p, s.n)) return p;
    }
    return NULL;
}

static void model(hb_encoding *e, hb_bytes text) {
    if (!text.n || e->status) return;
    if (e->t->model == HB_BPE)
        hb_bpe(e, text);
    else if (e->t->model == HB_UNIGRAM)
        hb_unigram(e, text);
    else
        hb_wordpiece(e, text);
}

/* A word whose spellings of control tokens, from the k-th on, are cut behind their first character. */
static void cut_plain(hb_encoding *e, const hb_buffer *order, hb_bytes text, size_t k, int depth) {
    for (; k < order->used / 4; k++) {
        const hb_bytes s = hb_token_spelled(e->t, hb_u32(order->p + 4 * k));
        const uint8_t *at = occurrence(text, 0, s);
        if (!at) continue;
        if (depth > MAX_CUTS) {
            e->control = true;
            return;
        }
        size_t from = 0;
        for (; at; at = occurrence(text, (size_t)(at - text.p) + s.n, s)) {
            const size_t to = (size_t)(at - text.p) + hb_character_bytes(s.p, s.p + s.n);
            cut_plain(e, order, (hb_bytes){text.p + from, to - from}, k + 1, depth + 1);
            from = to;
        }
        text = (hb_bytes){text.p + from, text.n - from};
    }
    model(e, text);
}

/* ---- the way ---- */

/* A text from step i on. */
static void words(hb_encoding *e, uint32_t i, hb_bytes text, bool at_start) {
    for (; i < e->t->steps && text.n && !e->status; i++) {
        if (e->t->step[i].kind == HB_STEP_SPLIT) {
            hb_split(e, i, text, at_start, words);
            return;
        }
        text = hb_transform(e, i, text, at_start);
    }
    if (e->plain)
        cut_plain(e, &e->order, text, 0, 0);
    else
        model(e, text);
}

static void behind_normalizers(hb_encoding *e, hb_bytes text, bool at_start) {
    words(e, e->t->normalizers, text, at_start);
}

static void normalise(hb_encoding *e, hb_bytes text, bool at_start) {
    for (uint32_t i = 0; i < e->t->normalizers && text.n && !e->status; i++)
        text = hb_transform(e, i, text, at_start);
    if (!text.n || e->status) return;
    if (e->plain)
        behind_normalizers(e, text, at_start);
    else
        cut_added(e, &e->t->normalized_added, text, at_start, behind_normalizers);
}

static bool is_utf8(const uint8_t *p, const uint8_t *end) {
    while (p < end) {
        while (end - p >= 8 && !(hb_u64(p) & 0x8080808080808080u)) p += 8;
        if (p == end) break;
        const uint8_t c = *p++;
        if (c < 0x80) continue;
        const size_t more = c >= 0xF0 ? 3 : c >= 0xE0 ? 2 : 1;
        if (c < 0xC2 || c > 0xF4 || (size_t)(end - p) < more) return false;
        const uint8_t low = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80;
        const uint8_t high = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
        if (p[0] < low || p[0] > high) return false;
        for (size_t i = 1; i < more; i++)
            if ((p[i] & 0xC0) != 0x80) return false;
        p += more;
    }
    return true;
}

static void encode(hb_encoding *e, hb_bytes text) {
    e->count = 0, e->control = false;
    if (e->plain)
        normalise(e, text, true);
    else
        cut_added(e, &e->t->raw_added, text, true, normalise);
}

/* The start token in front, unless the text starts with it. */
static void add_bos(hb_encoding *e, int32_t first) {
    const int32_t bos = (int32_t)e->t->bos;
    if (!(e->flags & HB_TOKENIZE_ADD) || !(e->t->flags & HB_ADD_BOS) || e->t->bos == HB_NONE) return;
    if (e->count && first == bos) return;
    const size_t written = e->count < e->capacity ? e->count : e->capacity;
    if (e->capacity) {
        memmove(e->ids + 1, e->ids, (written < e->capacity ? written : written - 1) * sizeof *e->ids);
        e->ids[0] = bos;
    }
    e->count++;
}

int64_t hb_tokenize(const hb_tokenizer *t, const char *text, size_t bytes, uint32_t flags, int32_t *ids,
                    size_t capacity) {
    if (!t || (bytes && !text) || (capacity && !ids) || flags > 3)
        return hb_fail(HB_ERROR_ARGUMENT, "an argument of hb_tokenize is wrong");
    const hb_bytes all = {(const uint8_t *)text, bytes};
    if (bytes && !is_utf8(all.p, all.p + bytes)) return hb_fail(HB_ERROR_ARGUMENT, "the text is not UTF-8");
    int32_t first = -1; /* known even without room for it */
    hb_encoding e = {
        .t = t, .flags = flags, .ids = capacity ? ids : &first, .capacity = capacity ? capacity : 1};
    encode(&e, all);
    if (!e.status && e.control && !(flags & HB_TOKENIZE_SPECIAL)) {
        e.plain = true;
        if (order_spellings(&e, &e.order)) encode(&e, all);
        if (!e.status && e.control) {
            e.status =
                hb_fail(HB_ERROR_ARGUMENT,
                        "the text spells a control token that this tokenizer cannot take as plain text");
        }
    }
    for (int i = 0; i < HB_MAX_STEPS; i++) hb_release(&t->allocator, e.level[i].p);
    hb_release(&t->allocator, e.segment.p);
    hb_release(&t->allocator, e.work.p);
    hb_release(&t->allocator, e.found.p);
    hb_release(&t->allocator, e.order.p);
    if (e.status == HB_ERROR_MEMORY)
        hb_fail(HB_ERROR_MEMORY, "no memory to tokenise %llu bytes", (unsigned long long)bytes);
    if (e.status) return e.status;
    e.capacity = capacity;
    add_bos(&e, e.count ? e.ids[0] : -1);
    return (int64_t)e.count;
}
