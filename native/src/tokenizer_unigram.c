/* Unigram: the likeliest way to spell a text by tokens (Viterbi; Kudo 2018), and WordPiece: the longest token
 * first. */
#include "tokenizer.h"

typedef struct node {
    double score; /* of the best way that ends here */
    uint32_t from, id;
} node;

static double score_of(const hb_tokenizer *t, uint32_t id) {
    double score;
    memcpy(&score, t->tables[HB_T_SCORES].p + 8 * (size_t)id, 8);
    return score;
}

static void better(node *to, double score, size_t from, uint32_t id) {
    if (to->from == HB_NONE || score > to->score) *to = (node){score, (uint32_t)from, id};
}

/* Ids of a run of unknown characters, last first. */
static bool unknown_run(hb_encoding *e, hb_bytes run) {
    const hb_tokenizer *t = e->t;
    uint32_t id = hb_find_token(t, run.p, run.n);
    if (id == HB_NONE && t->flags & HB_BYTE_FALLBACK) {
        for (size_t i = run.n; i-- > 0;) {
            id = hb_entry(t->tables[HB_T_BYTE_IDS], run.p[i]);
            if (!hb_append(e, &e->found, &id, 4)) return false;
        }
        return true;
    }
    if (id == HB_NONE) id = t->unknown;
    return hb_append(e, &e->found, &id, 4);
}

static void ways(const hb_tokenizer *t, hb_bytes text, node *best) {
    for (size_t at = 0; at < text.n;) {
        const size_t character = hb_character_bytes(text.p + at, text.p + text.n);
        bool single = false;
        uint32_t n = 0;
        for (size_t end = at; end < text.n && (n = hb_trie_child(&t->trie, n, text.p[end]));) {
            const uint32_t id = hb_trie_value(&t->trie, n);
            end++;
            if (id >= t->count) continue;
            better(&best[end], score_of(t, id) + best[at].score, at, id);
            single = single || end - at == character;
        }
        if (!single) better(&best[at + character], t->unknown_score + best[at].score, at, t->unknown);
        at += character;
    }
}

void hb_unigram(hb_encoding *e, hb_bytes text) {
    const hb_tokenizer *t = e->t;
    if (text.n >= UINT32_MAX / sizeof(node) || !hb_room(e, &e->work, (text.n + 1) * sizeof(node))) {
        if (!e->status) e->status = HB_ERROR_MEMORY;
        return;
    }
    node *best = (node *)(void *)e->work.p;
    for (size_t i = 0; i <= text.n; i++) best[i] = (node){0, HB_NONE, 0};
    ways(t, text, best);
    e->found.used = 0;
    size_t run = 0; /* bytes of unknown characters behind `end` */
    for (size_t end = text.n; end;) {
        const node *b = &best[end];
        const size_t from = b->from < end ? b->from : 0; /* a damaged table may leave a place without a way */
        if (b->id == t->unknown) {
            run += end - from;
        } else {
            if (run && !unknown_run(e, (hb_bytes){text.p + end, run})) return;
            run = 0;
            if (!hb_append(e, &e->found, &b->id, 4)) return;
        }
        end = from;
    }
    if (run && !unknown_run(e, (hb_bytes){text.p, run})) return;
    for (size_t i = e->found.used / 4; i-- > 0;) hb_emit_word(e, hb_u32(e->found.p + 4 * i));
}

/* ---- WordPiece (Schuster and Nakajima 2012) ---- */

void hb_wordpiece(hb_encoding *e, hb_bytes text) {
    const hb_tokenizer *t = e->t;
    const uint8_t *const end = text.p + text.n;
    size_t characters = 0;
    for (const uint8_t *p = text.p; p < end; characters++) hb_character(&p, end);
    uint32_t inside = 0; /* the node behind the prefix of tokens that continue a word */
    bool continues = true;
    for (size_t i = 0; i < t->prefix.n && continues; i++) {
        inside = hb_trie_child(&t->trie, inside, t->prefix.p[i]);
        continues = inside != 0;
    }
    const size_t mark = e->count;
    const bool control = e->control;
    bool spelled = characters <= t->max_characters;
    for (const uint8_t *p = text.p; p < end && spelled;) {
        const uint8_t *longest = NULL;
        uint32_t id = 0, n = p == text.p ? 0 : inside;
        if (p != text.p && !continues) {
            spelled = false;
            break;
        }
        for (const uint8_t *q = p; q < end && (n = hb_trie_child(&t->trie, n, *q));) {
            q++;
            if (hb_trie_value(&t->trie, n) < t->count && (q == end || (*q & 0xC0) != 0x80))
                longest = q, id = hb_trie_value(&t->trie, n);
        }
        spelled = longest != NULL;
        if (!spelled) break;
        hb_emit_word(e, id);
        p = longest;
    }
    if (!spelled) {
        e->count = mark, e->control = control;
        hb_emit_word(e, t->unknown);
    }
}
