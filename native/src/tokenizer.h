/* The way of a text through a tokenizer: added tokens cut out, normalised, split into words, modelled.
 *
 * tokenizer.c leads the way and calls the rest: normalise.c, tokenizer_split.c, the models of tokenizer_bpe.c
 * and tokenizer_unigram.c. Of each other they know only the matches of tokenizer_split.c, and below them all
 * lie tokenizer_buffer.c and vocab.c. */
#ifndef HB_TOKENIZER_H
#define HB_TOKENIZER_H

#include "vocab.h"

typedef struct hb_buffer {
    uint8_t *p;
    size_t size, used;
} hb_buffer;

/* One call of hb_tokenize. Memory is the call's own: buffers grow and are freed at its end. */
typedef struct hb_encoding {
    const hb_tokenizer *t;
    uint32_t flags;
    bool plain;   /* spellings of control tokens are cut in two before the model sees them */
    bool control; /* the model gave a control token */
    int status;
    int32_t *ids;
    size_t capacity, count;
    hb_buffer level[HB_MAX_STEPS]; /* the text behind each step */
    hb_buffer segment;             /* of a normal form */
    hb_buffer work;                /* of the model */
    hb_buffer found;               /* ids of a word */
    hb_buffer order;               /* ids of control tokens, for plain text */
} hb_encoding;

/* Room for `bytes` bytes in all; false, with the status set, without memory. Contents stay. */
bool hb_room(hb_encoding *e, hb_buffer *b, size_t bytes);
bool hb_append(hb_encoding *e, hb_buffer *b, const void *p, size_t n);

static inline void hb_emit(hb_encoding *e, uint32_t id) {
    if (e->count < e->capacity) e->ids[e->count] = (int32_t)id;
    e->count++;
}

/* An id that the model chose. */
static inline void hb_emit_word(hb_encoding *e, uint32_t id) {
    if (id >= e->t->count) return;
    if (hb_kind(e->t, id) & HB_KIND_CONTROL) e->control = true;
    hb_emit(e, id);
}

/* The text behind step i, which is none that splits; it lies in e->level[i] or is the text itself. */
hb_bytes hb_transform(hb_encoding *e, uint32_t i, hb_bytes text, bool at_start);
/* Bytes of the match that starts at p, or 0. */
size_t hb_match(const hb_automaton *a, const uint8_t *p, const uint8_t *end, bool at_start);
/* A text from step i on. */
typedef void hb_way(hb_encoding *e, uint32_t i, hb_bytes text, bool at_start);
/* Sends each part of the text that step i leaves on the rest of its way. */
void hb_split(hb_encoding *e, uint32_t i, hb_bytes text, bool at_start, hb_way *rest);

void hb_bpe(hb_encoding *e, hb_bytes text);
void hb_unigram(hb_encoding *e, hb_bytes text);
void hb_wordpiece(hb_encoding *e, hb_bytes text);

#endif
