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

/* The part that is not handed on yet. */
typedef struct part {
    size_t from, to;
    bool there, match;
} part;

static void flush(hb_encoding *e, uint32_t i, hb_bytes text, bool at_start, part *p) {
    if (p->there) hb_words(e, i + 1, (hb_bytes){text.p + p->from, p->to - p->from}, at_start && !p->from);
    p->there = false;
}

/* What is between matches, or a match, by the step's behaviour. */
static void take(hb_encoding *e, uint32_t i, hb_bytes text, bool at_start, part *last, part next) {
    const uint32_t flags = e->t->step[i].flags;
    if (flags & HB_INVERT) next.match = !next.match;
    switch (flags & 7) {
        case HB_REMOVED:
            next.there = !next.match;
            flush(e, i, text, at_start, &next);
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
                flush(e, i, text, at_start, last);
                return;
            }
            break;
        default:
            flush(e, i, text, at_start, &next);
            return;
    }
    flush(e, i, text, at_start, last);
    *last = next;
}

void hb_split(hb_encoding *e, uint32_t i, hb_bytes text, bool at_start) {
    const hb_automaton *a = &e->t->step[i].automaton;
    const uint8_t *const end = text.p + text.n;
    part last = {0};
    for (size_t at = 0, done = 0; at < text.n && !e->status;) {
        const size_t n = hb_match(a, text.p + at, end, !at);
        if (!n) {
            at += hb_character_bytes(text.p + at, end);
            if (at == text.n) take(e, i, text, at_start, &last, (part){done, at, true, false});
            continue;
        }
        if (done < at) take(e, i, text, at_start, &last, (part){done, at, true, false});
        take(e, i, text, at_start, &last, (part){at, at + n, true, true});
        done = at += n;
    }
    if (!e->status) flush(e, i, text, at_start, &last);
}
