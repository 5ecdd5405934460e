/* Conversations as prompts, by the texts of the section CHAT (SPEC.md section 15). */
#include "vocab.h"

enum { START, SYSTEM, USER, ASSISTANT, ROLES };
enum { FOLD = 1, EMPTY_IS_NONE = 2, AFTER_THOUGHT = 4, KEEP_NEWLINES = 8 };
enum { AS_IS, NO_SPACE, NO_NEWLINE };
enum { HEAD = 152, MAX_TEXT = 1 << 16 };

static const char *const names[ROLES] = {"start", "system", "user", "assistant"};

typedef struct chat {
    uint32_t flags, trims;
    bool there[ROLES][ROLES];
    hb_bytes joint[ROLES][ROLES], fold;
} chat;

/* Where the prompt goes: text, or pieces of it to a tokenizer. */
typedef struct prompt {
    char *text;
    size_t capacity, count;
} prompt;

static int open_chat(const void *section, size_t bytes, chat *c) {
    const uint8_t *p = section;
    memset(c, 0, sizeof *c);
    if (!section || !bytes)
        return hb_fail(HB_ERROR_ARGUMENT,
                       "the file has no section CHAT: its chat template, if any, needs Python");
    if (bytes < HEAD) return hb_fail(HB_ERROR_FORMAT, "the section CHAT is damaged: it is cut off");
    if (hb_u32(p) != 1)
        return hb_fail(HB_ERROR_FORMAT, "the section CHAT has version %u; a newer halfbyte may know it",
                       hb_u32(p));
    c->flags = hb_u32(p + 4), c->trims = hb_u32(p + 8);
    if (c->flags > 15 || c->trims >> 12)
        return hb_fail(HB_ERROR_FORMAT, "the section CHAT is damaged: unknown flags");
    for (uint32_t i = 0; i <= ROLES * ROLES; i++) {
        const uint32_t at = hb_u32(p + 16 + 8 * i), n = hb_u32(p + 20 + 8 * i);
        if (at == HB_NONE && !n && i < ROLES * ROLES) continue;
        if (at < HEAD || at > bytes || n > bytes - at || n > MAX_TEXT)
            return hb_fail(HB_ERROR_FORMAT, "the section CHAT is damaged: a text is out of place");
        const hb_bytes text = {p + at, n};
        if (i < ROLES * ROLES)
            c->joint[i / ROLES][i % ROLES] = text, c->there[i / ROLES][i % ROLES] = true;
        else
            c->fold = text;
    }
    return HB_OK;
}

static void put(prompt *to, hb_bytes b) {
    if (to->count <= to->capacity && b.n <= to->capacity - to->count && b.n)
        memcpy(to->text + to->count, b.p, b.n);
    to->count += b.n;
}

/* What Python's str.strip takes. */
static bool is_space(uint32_t c, uint32_t kind) {
    if (kind == NO_NEWLINE) return c == '\n';
    return (c >= 9 && c <= 13) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
           c == 0x3000;
}

static hb_bytes trim_start(hb_bytes b, uint32_t kind) {
    while (kind && b.n) {
        const uint8_t *p = b.p;
        if (!is_space(hb_character(&p, b.p + b.n), kind)) break;
        b.n -= (size_t)(p - b.p), b.p = p;
    }
    return b;
}

static hb_bytes trim_end(hb_bytes b, uint32_t kind) {
    while (kind && b.n) {
        size_t at = b.n - 1;
        while (at && (b.p[at] & 0xC0) == 0x80) at--;
        const uint8_t *p = b.p + at;
        if (!is_space(hb_character(&p, b.p + b.n), kind)) break;
        b.n = at;
    }
    return b;
}

static hb_bytes after_thought(const chat *c, hb_bytes b) {
    static const char mark[] = "</think>";
    for (size_t i = b.n; i-- > 0;) {
        if (b.n - i < sizeof mark - 1 || memcmp(b.p + i, mark, sizeof mark - 1)) continue;
        const size_t at = i + sizeof mark - 1;
        b.p += at, b.n -= at;
        return c->flags & KEEP_NEWLINES ? b : trim_start(b, NO_NEWLINE);
    }
    return b;
}

/* One message as it is shown: up to three parts one after the other. */
typedef struct shown {
    hb_bytes part[3];
} shown;

static shown show(const chat *c, int role, hb_bytes head, hb_bytes fold, hb_bytes content) {
    shown s = {{head, fold, content}};
    const uint32_t start = c->trims >> 2 * (role - 1) & 3, end = c->trims >> 2 * (role + 2) & 3;
    if (role == ASSISTANT && c->flags & AFTER_THOUGHT) s.part[2] = after_thought(c, content);
    for (int i = 0; i < 3; i++) {
        s.part[i] = trim_start(s.part[i], start);
        if (s.part[i].n) break;
    }
    for (int i = 3; i-- > 0;) {
        s.part[i] = trim_end(s.part[i], end);
        if (s.part[i].n) break;
    }
    return s;
}

static int role_of(const char *name) {
    for (int i = SYSTEM; i < ROLES; i++)
        if (name && !strcmp(name, names[i])) return i;
    return START;
}

static hb_message message_at(const hb_message *messages, uint32_t i) {
    hb_message m = {0};
    hb_copy_options(&m, sizeof m, (const char *)messages + i * messages->size);
    return m;
}

static hb_bytes content_of(hb_message m) {
    return (hb_bytes){(const uint8_t *)m.content, m.content ? m.bytes : 0};
}

/* What a walk over a conversation meets: texts of the template, and messages. */
typedef int visit(void *context, hb_bytes text, bool message);

static int between(const chat *c, int from, int to, visit *each, void *context) {
    if (!c->there[from][to])
        return hb_fail(HB_ERROR_ARGUMENT, "this model's chat has no %s after %s%s", to ? names[to] : "end",
                       from ? "" : "its ", names[from]);
    return each(context, c->joint[from][to], false);
}

static int walk(const chat *c, const hb_message *messages, uint32_t count, visit *each, void *context) {
    int last = START, status;
    uint32_t i = 0;
    hb_bytes head = {0}, fold = {0};
    if (count && (!messages || messages->size < sizeof messages->size))
        return hb_fail(HB_ERROR_ARGUMENT, "messages need their size");
    if (count && role_of(message_at(messages, 0).role) == SYSTEM) {
        const hb_bytes system = content_of(message_at(messages, 0));
        if (c->flags & EMPTY_IS_NONE && !system.n) {
            i = 1;
        } else if (c->flags & FOLD && count > 1 && role_of(message_at(messages, 1).role) == USER) {
            head = system, fold = c->fold, i = 1;
        }
    }
    for (; i < count; i++) {
        const hb_message m = message_at(messages, i);
        const int role = role_of(m.role);
        if (!role)
            return hb_fail(HB_ERROR_ARGUMENT,
                           "a message has the role %.32s; there are system, user and assistant",
                           m.role ? m.role : "(none)");
        if ((status = between(c, last, role, each, context))) return status;
        const shown s = show(c, role, head, fold, content_of(m));
        for (int k = 0; k < 3; k++)
            if (s.part[k].n && (status = each(context, s.part[k], true))) return status;
        head.n = fold.n = 0;
        last = role;
    }
    return between(c, last, START, each, context);
}

static int to_text(void *context, hb_bytes text, bool message) {
    (void)message;
    put(context, text);
    return HB_OK;
}

int64_t hb_chat_render(const void *section, size_t section_bytes, const hb_message *messages, uint32_t count,
                       char *text, size_t capacity) {
    chat c;
    prompt to = {text, capacity, 0};
    if (capacity && !text) return hb_fail(HB_ERROR_ARGUMENT, "an argument of hb_chat_render is wrong");
    int status = open_chat(section, section_bytes, &c);
    if (!status) status = walk(&c, messages, count, to_text, &to);
    return status ? status : (int64_t)to.count;
}

/* ---- ids ---- */

/* The template's own texts and the messages that spell no control token are one text; others are plain. */
typedef struct pieces {
    const hb_tokenizer *t;
    prompt held; /* text that is not tokenised yet */
    int32_t *ids;
    size_t capacity, count;
    bool started;
} pieces;

static bool spells_control(const hb_tokenizer *t, hb_bytes text) {
    const hb_bytes added = t->tables[HB_T_ADDED];
    for (size_t i = 0; i < added.n / 8; i++) {
        const hb_bytes s = hb_token_spelled(t, hb_entry(added, 2 * i));
        if (!(hb_entry(added, 2 * i + 1) & HB_ADDED_SPECIAL) || !s.n) continue;
        for (const uint8_t *p = text.p, *end = p + text.n; (size_t)(end - p) >= s.n; p++) {
            p = memchr(p, s.p[0], (size_t)(end - p) - s.n + 1);
            if (!p) break;
            if (!memcmp(p, s.p, s.n)) return true;
        }
    }
    return false;
}

static int tokenise(pieces *to, hb_bytes text, uint32_t flags) {
    const size_t written = to->count < to->capacity ? to->count : to->capacity;
    if (!to->started) flags |= HB_TOKENIZE_ADD;
    const int64_t n = hb_tokenize(to->t, (const char *)text.p, text.n, flags,
                                  to->capacity ? to->ids + written : NULL, to->capacity - written);
    if (n < 0) return (int)n;
    to->started = true;
    to->count += (size_t)n;
    return HB_OK;
}

static int flush(pieces *to) {
    const hb_bytes held = {(const uint8_t *)to->held.text, to->held.count};
    to->held.count = 0;
    return held.n ? tokenise(to, held, HB_TOKENIZE_SPECIAL) : HB_OK;
}

static int to_ids(void *context, hb_bytes text, bool message) {
    pieces *to = context;
    if (!message || !spells_control(to->t, text)) {
        put(&to->held, text);
        return HB_OK;
    }
    const int status = flush(to);
    return status ? status : tokenise(to, text, 0);
}

int64_t hb_chat_tokenize(const void *section, size_t section_bytes, const hb_tokenizer *t,
                         const hb_message *messages, uint32_t count, int32_t *ids, size_t capacity) {
    chat c;
    if (!t || (capacity && !ids))
        return hb_fail(HB_ERROR_ARGUMENT, "an argument of hb_chat_tokenize is wrong");
    const int64_t bytes = hb_chat_render(section, section_bytes, messages, count, NULL, 0);
    if (bytes < 0) return bytes;
    pieces to = {.t = t,
                 .held = {hb_allocate(&t->allocator, (size_t)bytes + 1), (size_t)bytes, 0},
                 .ids = ids,
                 .capacity = capacity};
    if (!to.held.text)
        return hb_fail(HB_ERROR_MEMORY, "no memory for a prompt of %lld bytes", (long long)bytes);
    int status = open_chat(section, section_bytes, &c);
    if (!status) status = walk(&c, messages, count, to_ids, &to);
    if (!status) status = flush(&to);
    hb_release(&t->allocator, to.held.text);
    return status ? status : (int64_t)to.count;
}
