/* An offline assistant whose every answer can be given again: text in, text out, and a line in a log.
 *
 *     assistant MODEL.hb LOG.jsonl [-n TOKENS] [-t THREADS] < questions, one a line
 *
 * A model with a chat template answers as its assistant, any other continues the text. The lines of the log
 * are those of runtime/replay.py: `halfbyte replay LOG.jsonl` answers them again and reports every one that
 * differs. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "halfbyte.h"
#include "halfbyte_tokenizer.h"

enum { LINE = 1 << 16, MOST = 4096 };

static hb_file *file;
static hb_model *model;
static hb_tokenizer *tokenizer;
static char chain[65];

static int fail(const char *what) {
    fprintf(stderr, "assistant: %s: %s\n", what, hb_last_error());
    return 2;
}

static void hex(const uint8_t *bytes, char *text) {
    for (int i = 0; i < 32; i++) sprintf(text + 2 * i, "%02x", bytes[i]);
}

/* A growing line of the log. */
typedef struct line {
    char *text;
    size_t used, room;
} line;

static void add(line *l, const char *text, size_t bytes) {
    if (l->used + bytes + 1 > l->room) {
        l->room = 2 * (l->used + bytes + 1);
        if (!(l->text = realloc(l->text, l->room))) exit(2);
    }
    memcpy(l->text + l->used, text, bytes);
    l->text[l->used += bytes] = 0;
}

static void say(line *l, const char *text) { add(l, text, strlen(text)); }

static void quote(line *l, const char *text, size_t bytes) {
    char code[8];
    say(l, "\"");
    for (size_t i = 0; i < bytes; i++) {
        const unsigned char c = (unsigned char)text[i];
        if (c == '"' || c == '\\' || c < ' ') {
            snprintf(code, sizeof code, "\\u%04x", c);
            say(l, code);
        } else {
            add(l, text + i, 1);
        }
    }
    say(l, "\"");
}

static void numbers(line *l, const int32_t *ids, uint32_t count) {
    char number[16];
    for (uint32_t i = 0; i < count; i++) {
        snprintf(number, sizeof number, "%s%" PRId32, i ? "," : "[", ids[i]);
        say(l, number);
    }
    say(l, count ? "]" : "[]");
}

/* The last 32 bytes of a session's file are the digest of the rest. */
static int keep_digest(void *context, const void *data, size_t bytes) {
    if (bytes == 32) memcpy(context, data, 32);
    return 0;
}

/* The chain of the last line, so that another run goes on from there. */
static void last_chain(FILE *log) {
    static char tail[67];
    memset(chain, '0', 64);
    if (fseek(log, -(long)sizeof tail, SEEK_END)) return;
    if (fread(tail, 1, sizeof tail, log) == sizeof tail && !memcmp(tail + 64, "\"}\n", 3))
        memcpy(chain, tail, 64);
}

static int answer(const char *question, uint32_t most, FILE *log, const char *path) {
    static int32_t prompt[MOST], ids[MOST];
    static char text[LINE];
    const uint32_t vocab = hb_vocab_size(file), context = hb_context_length(file);
    const void *chat;
    size_t chat_bytes, end_count = 0;
    int64_t ends[16], count;
    hb_session *session = NULL;
    hb_detokenizer stream;
    float *logits = malloc(vocab * sizeof *logits);
    line shown = {NULL, 0, 0}, l = {NULL, 0, 0};
    const hb_message message = {sizeof message, "user", question, strlen(question)};
    if (!hb_file_chat(file, &chat, &chat_bytes))
        count = hb_chat_tokenize(chat, chat_bytes, tokenizer, &message, 1, prompt, MOST);
    else
        count = hb_tokenize(tokenizer, question, message.bytes, HB_TOKENIZE_ADD, prompt, MOST);
    if (count < 1 || count > MOST || !logits || hb_session_create(model, NULL, &session) ||
        hb_feed(session, prompt, (uint32_t)count, logits))
        return fail(count > MOST ? "the question is too long" : "question");
    hb_metadata_ints(file, "tokenizer.eos_ids", ends, 16, &end_count);
    hb_detokenize_start(&stream, tokenizer, 0);
    const char *finish = "length";
    uint32_t n = 0;
    for (; n < most; n++) {
        int32_t next = 0;
        for (uint32_t i = 1; i < vocab; i++)
            if (logits[i] > logits[next]) next = (int32_t)i;
        for (size_t e = 0; e < end_count; e++)
            if (ends[e] == next) finish = "stop";
        if (*finish == 's') break;
        ids[n] = next;
        const int64_t bytes = hb_detokenize(&stream, next, text, LINE);
        if (bytes > 0)
            add(&shown, text, (size_t)bytes), fwrite(text, 1, (size_t)bytes, stdout), fflush(stdout);
        if (n + 1 == most) { /* the last token is not fed: the session holds what made it */
            n++;
            break;
        }
        if (hb_session_position(session) == context) {
            finish = "context", n++;
            break;
        }
        if (hb_feed(session, &next, 1, logits)) return fail("feeding");
    }
    const int64_t rest = hb_detokenize_finish(&stream, text, LINE);
    if (rest > 0) add(&shown, text, (size_t)rest), fwrite(text, 1, (size_t)rest, stdout);
    puts("");
    uint8_t digest[32];
    char model_hex[65], state[65], number[64];
    hex(hb_file_digest(file), model_hex);
    if (hb_session_write(session, keep_digest, digest)) return fail("state");
    hex(digest, state);
    say(&l, "{\"version\":1,\"model\":\""), say(&l, model_hex), say(&l, "\",\"file\":");
    quote(&l, path, strlen(path));
    say(&l, ",\"policy\":\"i8g32\",\"kv\":\""), say(&l, hb_model_kv(model));
    say(&l, "\",\"backend\":\"native\",\"isa\":\""), say(&l, hb_isa_name(hb_model_isa(model)));
    say(&l, "\",\"sampling\":{},\"stop\":[],\"max_tokens\":");
    snprintf(number, sizeof number, "%" PRIu32 ",\"prompt\":", most);
    say(&l, number), numbers(&l, prompt, (uint32_t)count), say(&l, ",\"answer\":"), numbers(&l, ids, n);
    say(&l, ",\"text\":"), quote(&l, shown.text ? shown.text : "", shown.used);
    say(&l, ",\"finish\":\""), say(&l, finish), say(&l, "\",\"state\":\""), say(&l, state), say(&l, "\"");
    line chained = {NULL, 0, 0};
    add(&chained, chain, 64), add(&chained, l.text, l.used);
    hb_digest(chained.text, chained.used, digest);
    hex(digest, chain);
    const int written = fprintf(log, "%s,\"chain\":\"%s\"}\n", l.text, chain);
    hb_session_free(session);
    free(logits), free(shown.text), free(l.text), free(chained.text);
    return written < 0 || fflush(log) ? fail("the log") : 0;
}

int main(int argc, char **argv) {
    hb_model_options options;
    uint32_t most = 128;
    memset(&options, 0, sizeof options);
    options.size = sizeof options;
    for (int i = 3; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "-n")) most = (uint32_t)atoi(argv[i + 1]);
        if (!strcmp(argv[i], "-t")) options.threads = atoi(argv[i + 1]);
    }
    if (argc < 3 || most > MOST) {
        fprintf(stderr, "usage: assistant MODEL.hb LOG.jsonl [-n TOKENS] [-t THREADS] < QUESTIONS\n");
        return 2;
    }
    const hb_open_options check = {sizeof check, NULL, 1, NULL, NULL}; /* every byte: answers are kept */
    if (hb_open_path(argv[1], &check, &file) || hb_model_create(file, &options, &model) ||
        hb_file_tokenizer(file, &tokenizer))
        return fail(argv[1]);
    FILE *log = fopen(argv[2], "a+b");
    if (!log) {
        perror(argv[2]);
        return 2;
    }
    last_chain(log);
    static char question[LINE];
    int status = 0;
    while (!status && fgets(question, LINE, stdin)) {
        question[strcspn(question, "\r\n")] = 0;
        if (*question) status = answer(question, most, log, argv[1]);
    }
    fclose(log);
    hb_tokenizer_free(tokenizer);
    hb_model_free(model);
    hb_close(file);
    return status;
}
