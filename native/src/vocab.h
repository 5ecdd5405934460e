/* The section VOCB (SPEC.md section 14), read where it lies. What is small is checked when it is opened; ids
 * and offsets of the large tables are checked where they are used, so that opening does not read them. */
#ifndef HB_VOCAB_H
#define HB_VOCAB_H

#include <stdbool.h>
#include <string.h>

#include "halfbyte_tokenizer.h"
#include "memory.h"

#define HB_NONE UINT32_MAX

enum { HB_BPE = 1, HB_UNIGRAM = 2, HB_WORDPIECE = 3 };
enum { HB_ADD_BOS = 1, HB_BYTE_LEVEL = 2, HB_BYTE_FALLBACK = 4, HB_FUSE_UNKNOWN = 8, HB_WORD_STARTS = 16 };
enum { HB_FIRST_SAME, HB_FIRST_STRIP, HB_FIRST_WITHOUT, HB_FIRST_SPELLED };
enum { HB_KIND_SPECIAL = 1, HB_KIND_CONTROL = 2, HB_KIND_WHOLE = 4, HB_KIND_PRESENT = 8 };
enum { HB_ADDED_SINGLE = 1, HB_ADDED_LEFT = 2, HB_ADDED_RIGHT = 4, HB_ADDED_SPECIAL = 8 };
enum { HB_STEP_NORMAL = 1, HB_STEP_MAP, HB_STEP_REPLACE, HB_STEP_LITERAL, HB_STEP_PREPEND, HB_STEP_SPLIT };
enum { HB_ISOLATED, HB_REMOVED, HB_CONTIGUOUS, HB_WITH_PREVIOUS, HB_WITH_NEXT, HB_INVERT = 8 };
enum { HB_UNLESS_THERE = 1, HB_FIRST_ONLY = 2 };
enum {
    HB_MATCH = 0x8000,
    HB_STAYS = 0x100,
    HB_PAGES = 0x110000 >> 8,
    HB_MAX_STEPS = 16,
    HB_MAX_TOKEN = 4096
};

/* Tables, as formats/vocab.py lists them. */
enum {
    HB_T_TOKEN_OFFSETS,
    HB_T_TOKEN_BYTES,
    HB_T_KINDS,
    HB_T_TEXT_OFFSETS,
    HB_T_TEXT_BYTES,
    HB_T_TOKEN_HASH,
    HB_T_MERGES,
    HB_T_MERGED,
    HB_T_BYTE_IDS,
    HB_T_SCORES,
    HB_T_TRIE,
    HB_T_ADDED,
    HB_T_RAW_ADDED,
    HB_T_NORMALIZED_ADDED,
    HB_T_STEPS,
    HB_T_POOL,
    HB_T_WORD_CHARACTERS,
    HB_T_COUNT
};

typedef struct hb_bytes {
    const uint8_t *p;
    size_t n;
} hb_bytes;

typedef struct hb_trie {
    uint32_t nodes;
    const uint8_t *child, *value, *label;
    uint8_t first[32]; /* a bit for each byte that some text starts with */
} hb_trie;

typedef struct hb_automaton {
    uint32_t columns;
    uint32_t start[2]; /* at the start of the text, elsewhere */
    const uint8_t *index, *classes, *transitions;
    const uint8_t *ascii; /* classes of the first 256 code points */
} hb_automaton;

typedef struct hb_tokenizer_step {
    uint32_t kind, flags;
    hb_bytes pattern, text;
    hb_automaton automaton;
} hb_tokenizer_step;

struct hb_tokenizer {
    hb_allocator allocator;
    uint32_t model, flags, count, unknown, bos, normalizers, steps, first, first_count, max_characters;
    double unknown_score;
    hb_bytes first_text, prefix, tables[HB_T_COUNT];
    hb_trie trie, raw_added, normalized_added;
    hb_automaton word_characters;
    hb_tokenizer_step step[HB_MAX_STEPS];
};

static inline uint32_t hb_u32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

static inline uint32_t hb_u16(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

static inline uint64_t hb_u64(const uint8_t *p) {
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

/* Entry i of a table of u32, HB_NONE beyond its end. */
static inline uint32_t hb_entry(hb_bytes table, size_t i) {
    return i < table.n / 4 ? hb_u32(table.p + 4 * i) : HB_NONE;
}

static inline uint32_t hb_kind(const hb_tokenizer *t, uint32_t id) {
    return id < t->tables[HB_T_KINDS].n ? t->tables[HB_T_KINDS].p[id] : 0;
}

/* The code point at *p, which moves on. Bytes that are no character give U+FFFD: tables may hold such. */
static inline uint32_t hb_character(const uint8_t **p, const uint8_t *end) {
    const uint8_t *s = *p;
    const uint32_t c = *s;
    if (c < 0x80) return *p = s + 1, c;
    if (c >= 0xF0 && end - s >= 4) {
        const uint32_t v = (c & 7) << 18 | (s[1] & 63u) << 12 | (s[2] & 63u) << 6 | (s[3] & 63u);
        return *p = s + 4, v < 0x110000 ? v : 0xFFFD;
    }
    if (c >= 0xE0 && c < 0xF0 && end - s >= 3)
        return *p = s + 3, (c & 15) << 12 | (s[1] & 63u) << 6 | (s[2] & 63u);
    if (c >= 0xC0 && c < 0xE0 && end - s >= 2) return *p = s + 2, (c & 31) << 6 | (s[1] & 63u);
    return *p = s + 1, 0xFFFD;
}

static inline size_t hb_character_bytes(const uint8_t *p, const uint8_t *end) {
    const uint8_t *q = p;
    hb_character(&q, end);
    return (size_t)(q - p);
}

static inline uint32_t hb_class(const hb_automaton *a, uint32_t c) {
    return a->classes[256 * hb_u16(a->index + 2 * (c >> 8)) + (c & 255)];
}

/* The bytes of a token as they are looked up, or as they are shown. */
hb_bytes hb_token_spelled(const hb_tokenizer *t, uint32_t id);
hb_bytes hb_token_shown(const hb_tokenizer *t, uint32_t id);
/* The id of a token of the model by its bytes, or HB_NONE. */
uint32_t hb_find_token(const hb_tokenizer *t, const uint8_t *p, size_t n);

/* The child of a node by its label, or 0 (the root is nobody's child). */
uint32_t hb_trie_child(const hb_trie *trie, uint32_t node, uint8_t label);
static inline uint32_t hb_trie_value(const hb_trie *trie, uint32_t node) {
    return hb_u32(trie->value + 4 * (size_t)node);
}

#endif
