/* Matches of an automaton, and the words that they make of a text. */
#include "tokenizer.h"

size_t hb_match(const hb_automaton *a, const uint8_t *p, const uint8_t *end, bool at_start) {
    const uint8_t *const begin = p, *match = p;
    const size_t columns = a->columns;
    uint32_t state = a->start[!at_start];
    while (state) {
        const uint8_t *const here = p;
        uint32_t column;
        if (p == end)
            column = a->columns - 1;
        else if (*p < 0x80)
            column = a->ascii[*p++];
        else
            column = hb_class(a, hb_character(&p, end));
        const uint32_t to = hb_u16(a->transitions + 2 * (state * columns + column));
        if (to & HB_MATCH) match = here;
        if (here == end) break;
        state = to & (HB_MATCH - 1);
    }
    return (size_t)(match - begin);
}

/* A stretch of the text: a match, or what lies between. */
typedef struct part {
    size_t from, to;
    bool there, match;
} part;

typedef struct split {
    hb_encoding *e;
    uint32_t step;
    hb_bytes text;
    bool at_start;
    hb_way *rest;
    part last; /* that is not handed on yet */
} split;

static void flush(const split *s, part *p) {
    const hb_bytes text = {s->text.p + p->from, p->to - p->from};
    if (p->there) s->rest(s->e, s->step + 1, text, s->at_start && !p->from);
    p->there = false;
}

/* The next stretch, by the step's behaviour. */
static void take(split *s, part next) {
    const uint32_t flags = s->e->t->step[s->step].flags;
    part *const last = &s->last;
    if (flags & HB_INVERT) next.match = !next.match;
    switch (flags & 7) {
        case HB_REMOVED:
            next.there = !next.match;
            flush(s, &next);
            return;
        case HB_CONTIGUOUS:
            if (last->there && last->match == next.match) {
                last->to = next.to;
                return;
            }
            break;
        case HB_WITH_PREVIOUS:
            if (last->there && next.match && !last->match) {
                last->to = next.to, last->match = true;
                return;
            }
            break;
        case HB_WITH_NEXT:
            if (last->there && last->match && !next.match) {
                last->to = next.to, last->match = false;
                flush(s, last);
                return;
            }
            break;
        default:
            flush(s, &next);
            return;
    }
    flush(s, last);
    *last = next;
}

void hb_split(hb_encoding *e, uint32_t i, hb_bytes text, bool at_start, hb_way *rest) {
    const hb_automaton *a = &e->t->step[i].automaton;
    const uint8_t *const end = text.p + text.n;
    split s = {e, i, text, at_start, rest, {0}};
    for (size_t at = 0, done = 0; at < text.n && !e->status;) {
        const size_t n = hb_match(a, text.p + at, end, !at);
        if (!n) {
            at += hb_character_bytes(text.p + at, end);
            if (at == text.n) take(&s, (part){done, at, true, false});
            continue;
        }
        if (done < at) take(&s, (part){done, at, true, false});
        take(&s, (part){at, at + n, true, true});
        done = at += n;
    }
    if (!e->status) flush(&s, &s.last);
}
