/* Token ids to text, and tokens by their spelling. */
#include "vocab.h"

uint32_t hb_tokenizer_size(const hb_tokenizer *t) { return t->count; }

int32_t hb_tokenizer_bos(const hb_tokenizer *t) { return t->bos == HB_NONE ? -1 : (int32_t)t->bos; }

int hb_token_bytes(const hb_tokenizer *t, int32_t id, const char **text, size_t *bytes) {
    if (!t || !text || !bytes || id < 0 || (uint32_t)id >= t->count)
        return hb_fail(HB_ERROR_ID, "token %d is outside the vocabulary", (int)id);
    const hb_bytes b = hb_token_shown(t, (uint32_t)id);
    *text = (const char *)b.p, *bytes = b.n;
    return HB_OK;
}

int hb_token_special(const hb_tokenizer *t, int32_t id) {
    return id >= 0 && (uint32_t)id < t->count && hb_kind(t, (uint32_t)id) & HB_KIND_SPECIAL ? 1 : 0;
}

int32_t hb_token_id(const hb_tokenizer *t, const char *text, size_t bytes) {
    const hb_bytes added = t->tables[HB_T_ADDED];
    const uint8_t *p = (const uint8_t *)text;
    for (size_t i = 0; i < added.n / 8; i++) {
        const uint32_t id = hb_entry(added, 2 * i);
        const hb_bytes s = hb_token_spelled(t, id);
        if (id < t->count && s.n == bytes && !memcmp(s.p, p, bytes)) return (int32_t)id;
    }
    const uint32_t id = hb_find_token(t, p, bytes);
    return id == HB_NONE ? -1 : (int32_t)id;
}

void hb_detokenize_start(hb_detokenizer *s, const hb_tokenizer *t, uint32_t flags) {
    *s = (hb_detokenizer){t, flags, 0, 0, {0}};
}

/* Where text goes: counted when there is no more room. */
typedef struct sink {
    char *text;
    size_t capacity, count;
} sink;

static void put(sink *to, const void *p, size_t n) {
    if (to->count <= to->capacity && n <= to->capacity - to->count) memcpy(to->text + to->count, p, n);
    to->count += n;
}

/* Whether `byte` may follow the `held` bytes of a character that is incomplete. */
static bool follows(const hb_detokenizer *s, uint8_t byte) {
    if (s->held > 1) return (byte & 0xC0) == 0x80;
    const uint8_t low = s->bytes[0] == 0xE0 ? 0xA0 : s->bytes[0] == 0xF0 ? 0x90 : 0x80;
    const uint8_t high = s->bytes[0] == 0xED ? 0x9F : s->bytes[0] == 0xF4 ? 0x8F : 0xBF;
    return byte >= low && byte <= high;
}

static void take(hb_detokenizer *s, uint8_t byte, sink *to) {
    if (s->held) {
        if (!follows(s, byte)) {
            put(to, "\xEF\xBF\xBD", 3);
            s->held = 0;
        } else {
            s->bytes[s->held++] = byte;
            const uint32_t whole = s->bytes[0] >= 0xF0 ? 4 : s->bytes[0] >= 0xE0 ? 3 : 2;
            if (s->held == whole) {
                put(to, s->bytes, whole);
                s->held = 0;
            }
            return;
        }
    }
    if (byte < 0x80) {
        put(to, &byte, 1);
    } else if (byte >= 0xC2 && byte <= 0xF4) {
        s->bytes[s->held++] = byte;
    } else {
        put(to, "\xEF\xBF\xBD", 3);
    }
}

static void take_all(hb_detokenizer *s, hb_bytes b, sink *to) {
    for (size_t i = 0; i < b.n; i++) take(s, b.p[i], to);
}

static bool starts(hb_bytes text, hb_bytes with) {
    return with.n && text.n >= with.n && !memcmp(text.p, with.p, with.n);
}

/* The first token of a text, without the space that encoding put in front. */
static void take_first(hb_detokenizer *s, uint32_t id, hb_bytes shown, sink *to) {
    const hb_tokenizer *t = s->tokenizer;
    hb_bytes spelled = hb_token_spelled(t, id);
    bool there = false;
    switch (t->first) {
        case HB_FIRST_STRIP:
            for (uint32_t i = 0; i < t->first_count && starts(shown, t->first_text); i++)
                shown.p += t->first_text.n, shown.n -= t->first_text.n;
            break;
        case HB_FIRST_SPELLED:
            shown = spelled;
            break;
        case HB_FIRST_WITHOUT:
            for (hb_bytes b = spelled; b.n && !there; b.p++, b.n--) there = starts(b, t->first_text);
            while (there && spelled.n) {
                const size_t n = starts(spelled, t->first_text) ? t->first_text.n : 0;
                if (!n) take(s, *spelled.p, to);
                spelled.p += n ? n : 1, spelled.n -= n ? n : 1;
            }
            if (there) return;
            break;
        default:
            break;
    }
    take_all(s, shown, to);
}

int64_t hb_detokenize(hb_detokenizer *s, int32_t id, char *text, size_t capacity) {
    if (!s || !s->tokenizer || (capacity && !text))
        return hb_fail(HB_ERROR_ARGUMENT, "an argument of hb_detokenize is wrong");
    const hb_tokenizer *t = s->tokenizer;
    if (id < 0) return hb_fail(HB_ERROR_ID, "token %d is outside the vocabulary", (int)id);
    if ((uint32_t)id >= t->count) return 0; /* padding of the embedding */
    if (hb_token_special(t, id) && !(s->flags & HB_DETOKENIZE_SPECIAL)) return 0;
    const hb_bytes shown = hb_token_shown(t, (uint32_t)id);
    hb_detokenizer next = *s;
    sink to = {text, capacity, 0};
    if (!next.started && shown.n) {
        next.started = 1;
        take_first(&next, (uint32_t)id, shown, &to);
    } else {
        take_all(&next, shown, &to);
    }
    if (to.count <= capacity) *s = next;
    return (int64_t)to.count;
}

int64_t hb_detokenize_finish(hb_detokenizer *s, char *text, size_t capacity) {
    if (!s || (capacity && !text))
        return hb_fail(HB_ERROR_ARGUMENT, "an argument of hb_detokenize_finish is wrong");
    sink to = {text, capacity, 0};
    if (s->held) put(&to, "\xEF\xBF\xBD", 3);
    if (to.count <= capacity) s->held = s->started = 0;
    return (int64_t)to.count;
}
