/* Steps that change a text: normal forms (Unicode Standard Annex 15), character maps, replacements. */
#include "tokenizer.h"

enum {
    HANGUL = 0xAC00,
    L = 0x1100,
    V = 0x1161,
    T = 0x11A7,
    V_COUNT = 21,
    T_COUNT = 28,
    HANGUL_COUNT = 11172
};

static bool append_character(hb_encoding *e, hb_buffer *b, uint32_t c) {
    uint8_t u[4];
    size_t n = 1;
    if (c < 0x80) {
        u[0] = (uint8_t)c;
    } else if (c < 0x800) {
        u[0] = (uint8_t)(0xC0 | c >> 6), u[1] = (uint8_t)(0x80 | (c & 63)), n = 2;
    } else if (c < 0x10000) {
        u[0] = (uint8_t)(0xE0 | c >> 12), u[1] = (uint8_t)(0x80 | (c >> 6 & 63)),
        u[2] = (uint8_t)(0x80 | (c & 63));
        n = 3;
    } else {
        u[0] = (uint8_t)(0xF0 | c >> 18), u[1] = (uint8_t)(0x80 | (c >> 12 & 63));
        u[2] = (uint8_t)(0x80 | (c >> 6 & 63)), u[3] = (uint8_t)(0x80 | (c & 63)), n = 4;
    }
    return hb_append(e, b, u, n);
}

/* ---- normal forms ---- */

typedef struct normal {
    bool compose;
    uint32_t pairs;
    const uint8_t *index, *numbers, *records, *characters, *pair;
} normal;

static normal open_normal(hb_bytes b) {
    normal f = {hb_u32(b.p) != 0, hb_u32(b.p + 12), b.p + 20, b.p + 20 + 2 * HB_PAGES, 0, 0, 0};
    f.records = f.numbers + 512 * (size_t)hb_u32(b.p + 16);
    f.characters = f.records + 12 * (size_t)hb_u32(b.p + 4);
    f.pair = f.characters + 4 * (size_t)hb_u32(b.p + 8);
    return f;
}

static uint32_t record_of(const normal *f, uint32_t c) {
    return hb_u16(f->numbers + 512 * (size_t)hb_u16(f->index + 2 * (c >> 8)) + 2 * (c & 255));
}

/* Whether a character by itself is left as it is, and joins nothing before it. */
static bool stays(const normal *f, uint32_t c) {
    const uint32_t r = record_of(f, c);
    return !r || hb_u32(f->records + 12 * (size_t)(r - 1)) & HB_STAYS;
}

static uint32_t composed(const normal *f, uint32_t a, uint32_t b) {
    if (a - L < 19 && b - V < V_COUNT) return HANGUL + ((a - L) * V_COUNT + (b - V)) * T_COUNT;
    if (a - HANGUL < HANGUL_COUNT && (a - HANGUL) % T_COUNT == 0 && b - T - 1 < T_COUNT - 1)
        return a + (b - T);
    for (uint32_t lo = 0, hi = f->pairs; lo < hi;) {
        const uint32_t mid = lo + (hi - lo) / 2;
        const uint8_t *p = f->pair + 12 * (size_t)mid;
        const uint32_t x = hb_u32(p), y = hb_u32(p + 4);
        if (x == a && y == b) return hb_u32(p + 8);
        if (x < a || (x == a && y < b))
            lo = mid + 1;
        else
            hi = mid;
    }
    return 0;
}

/* A character of a segment: its code point, and above it its combining class. */
static bool push(hb_encoding *e, const normal *f, uint32_t c) {
    const uint32_t r = record_of(f, c);
    const uint32_t ccc = r ? hb_u32(f->records + 12 * (size_t)(r - 1)) & 255 : 0;
    const uint32_t value = c | ccc << 24;
    return hb_append(e, &e->segment, &value, 4);
}

static bool decompose(hb_encoding *e, const normal *f, uint32_t c) {
    const uint32_t r = record_of(f, c);
    if (c - HANGUL < HANGUL_COUNT) {
        const uint32_t s = c - HANGUL, t = s % T_COUNT;
        return push(e, f, L + s / (V_COUNT * T_COUNT)) && push(e, f, V + s / T_COUNT % V_COUNT) &&
               (!t || push(e, f, T + t));
    }
    const uint8_t *record = f->records + 12 * (size_t)(r ? r - 1 : 0);
    const uint32_t n = r ? hb_u32(record + 8) : 0;
    if (!n) return push(e, f, c);
    for (uint32_t i = 0; i < n; i++)
        if (!push(e, f, hb_u32(f->characters + 4 * ((size_t)hb_u32(record + 4) + i)))) return false;
    return true;
}

/* Marks between two starters in the order of their classes; equal ones keep theirs. */
static bool reorder(hb_encoding *e, uint32_t *s, size_t n) {
    for (size_t from = 0; from < n; from++) {
        if (!(s[from] >> 24)) continue;
        size_t to = from;
        while (to < n && s[to] >> 24) to++;
        if (to - from <= 32) {
            for (size_t i = from + 1; i < to; i++)
                for (size_t j = i; j > from && s[j] >> 24 < s[j - 1] >> 24; j--) {
                    const uint32_t swap = s[j];
                    s[j] = s[j - 1], s[j - 1] = swap;
                }
        } else { /* by counting: a text may be all marks */
            size_t at[256] = {0}, sum = 0;
            if (!hb_room(e, &e->work, 4 * (to - from))) return false;
            for (size_t i = from; i < to; i++) at[s[i] >> 24]++;
            for (size_t i = 0; i < 256; i++) {
                const size_t count = at[i];
                at[i] = sum, sum += count;
            }
            uint32_t *sorted = (uint32_t *)(void *)e->work.p;
            for (size_t i = from; i < to; i++) sorted[at[s[i] >> 24]++] = s[i];
            memcpy(s + from, sorted, 4 * (to - from));
        }
        from = to - 1;
    }
    return true;
}

static size_t compose(const normal *f, uint32_t *s, size_t n) {
    size_t out = 0, starter = n;
    for (size_t i = 0; i < n; i++) {
        const uint32_t c = s[i] & 0xFFFFFF, ccc = s[i] >> 24;
        const bool adjacent = starter < n && out == starter + 1;
        const bool blocked = starter == n || (!adjacent && (!ccc || s[out - 1] >> 24 >= ccc));
        const uint32_t whole = blocked ? 0 : composed(f, s[starter] & 0xFFFFFF, c);
        if (whole) {
            s[starter] = whole;
            continue;
        }
        if (!ccc) starter = out;
        s[out++] = s[i];
    }
    return out;
}

/* A segment: a character that stays, and what may join or follow it. */
static bool append_segment(hb_encoding *e, const normal *f, hb_bytes text, hb_buffer *out) {
    e->segment.used = 0;
    for (const uint8_t *p = text.p, *end = p + text.n; p < end;)
        if (!decompose(e, f, hb_character(&p, end))) return false;
    uint32_t *s = (uint32_t *)(void *)e->segment.p;
    size_t n = e->segment.used / 4;
    if (!reorder(e, s, n)) return false;
    if (f->compose) n = compose(f, s, n);
    for (size_t i = 0; i < n; i++)
        if (!append_character(e, out, s[i] & 0xFFFFFF)) return false;
    return true;
}

static hb_bytes normalised(hb_encoding *e, uint32_t i, hb_bytes text) {
    const normal f = open_normal(e->t->step[i].pattern);
    hb_buffer *out = &e->level[i];
    const uint8_t *const end = text.p + text.n, *p = text.p, *copied = text.p, *safe = text.p;
    out->used = 0;
    while (p < end) {
        const uint8_t *here = p;
        if (*p < 0x80) { /* no form changes these; runs of them are most of most texts */
            while (end - p >= 8 && !(hb_u64(p) & 0x8080808080808080u)) p += 8;
            while (p < end && *p < 0x80) p++;
            safe = p - 1;
            continue;
        }
        if (stays(&f, hb_character(&p, end))) {
            safe = here;
            continue;
        }
        while (p < end) { /* to the next character that stays */
            here = p;
            if (stays(&f, hb_character(&p, end))) {
                p = here;
                break;
            }
        }
        if (!hb_append(e, out, copied, (size_t)(safe - copied))) return (hb_bytes){text.p, 0};
        if (!append_segment(e, &f, (hb_bytes){safe, (size_t)(p - safe)}, out)) return (hb_bytes){text.p, 0};
        copied = safe = p;
    }
    if (copied == text.p) return text;
    if (!hb_append(e, out, copied, (size_t)(end - copied))) return (hb_bytes){text.p, 0};
    return (hb_bytes){out->p, out->used};
}

/* ---- maps and replacements ---- */

/* The text of an entry, in which a byte 0xFF stands for the character itself. */
static bool append_entry(hb_encoding *e, hb_buffer *out, hb_bytes text, hb_bytes self) {
    const uint8_t *p = text.p, *const end = p + text.n;
    while (p < end) {
        const uint8_t *mark = memchr(p, 0xFF, (size_t)(end - p));
        if (!hb_append(e, out, p, (size_t)((mark ? mark : end) - p))) return false;
        if (mark && !hb_append(e, out, self.p, self.n)) return false;
        p = mark ? mark + 1 : end;
    }
    return true;
}

static hb_bytes mapped(hb_encoding *e, uint32_t i, hb_bytes text) {
    const uint8_t *m = e->t->step[i].pattern.p, *index = m + 8, *numbers = index + 2 * HB_PAGES;
    const uint8_t *offsets = numbers + 512 * (size_t)hb_u32(m + 4);
    const uint8_t *texts = offsets + 4 * ((size_t)hb_u32(m) + 1);
    const uint8_t *const end = text.p + text.n, *copied = text.p;
    hb_buffer *out = &e->level[i];
    bool changed = false;
    out->used = 0;
    for (const uint8_t *p = text.p; p < end;) {
        const uint8_t *here = p;
        const uint32_t c = hb_character(&p, end);
        const uint32_t entry = hb_u16(numbers + 512 * (size_t)hb_u16(index + 2 * (c >> 8)) + 2 * (c & 255));
        if (!entry) continue;
        const uint32_t from = hb_u32(offsets + 4 * (size_t)(entry - 1)),
                       to = hb_u32(offsets + 4 * (size_t)entry);
        changed = true;
        if (!hb_append(e, out, copied, (size_t)(here - copied)) ||
            !append_entry(e, out, (hb_bytes){texts + from, to - from}, (hb_bytes){here, (size_t)(p - here)}))
            return (hb_bytes){text.p, 0};
        copied = p;
    }
    if (!changed) return text;
    if (!hb_append(e, out, copied, (size_t)(end - copied))) return (hb_bytes){text.p, 0};
    return (hb_bytes){out->p, out->used};
}

/* Behind the next match or occurrence at or after *p, which moves to its start; NULL when there is none. */
static const uint8_t *next_match(const hb_tokenizer_step *s, const uint8_t *begin, const uint8_t **p,
                                 const uint8_t *end) {
    if (s->kind == HB_STEP_LITERAL) {
        const size_t n = s->pattern.n;
        while ((size_t)(end - *p) >= n) {
            *p = memchr(*p, s->pattern.p[0], (size_t)(end - *p) - n + 1);
            if (!*p) return NULL;
            if (!memcmp(*p, s->pattern.p, n)) return *p + n;
            ++*p;
        }
        return NULL;
    }
    while (*p < end) {
        const size_t n = hb_match(&s->automaton, *p, end, *p == begin);
        if (n) return *p + n;
        *p += hb_character_bytes(*p, end);
    }
    return NULL;
}

static hb_bytes replaced(hb_encoding *e, uint32_t i, hb_bytes text) {
    const hb_tokenizer_step *s = &e->t->step[i];
    const uint8_t *const end = text.p + text.n, *copied = text.p, *behind;
    hb_buffer *out = &e->level[i];
    bool changed = false;
    out->used = 0;
    for (const uint8_t *p = text.p; (behind = next_match(s, text.p, &p, end)); copied = p = behind) {
        changed = true;
        if (!hb_append(e, out, copied, (size_t)(p - copied)) || !hb_append(e, out, s->text.p, s->text.n))
            return (hb_bytes){text.p, 0};
    }
    if (!changed) return text;
    if (!hb_append(e, out, copied, (size_t)(end - copied))) return (hb_bytes){text.p, 0};
    return (hb_bytes){out->p, out->used};
}

static hb_bytes prepended(hb_encoding *e, uint32_t i, hb_bytes text, bool at_start) {
    const hb_tokenizer_step *s = &e->t->step[i];
    if (s->flags & HB_FIRST_ONLY && !at_start) return text;
    if (s->flags & HB_UNLESS_THERE && text.n >= s->text.n && !memcmp(text.p, s->text.p, s->text.n))
        return text;
    hb_buffer *out = &e->level[i];
    out->used = 0;
    if (!hb_append(e, out, s->text.p, s->text.n) || !hb_append(e, out, text.p, text.n))
        return (hb_bytes){text.p, 0};
    return (hb_bytes){out->p, out->used};
}

hb_bytes hb_transform(hb_encoding *e, uint32_t i, hb_bytes text, bool at_start) {
    switch (e->t->step[i].kind) {
        case HB_STEP_NORMAL:
            return normalised(e, i, text);
        case HB_STEP_MAP:
            return mapped(e, i, text);
        case HB_STEP_PREPEND:
            return prepended(e, i, text, at_start);
        default:
            return replaced(e, i, text);
    }
}
