/* The stable interface as an app without Python uses it, on any system.
 *
 *     client SCRIPT
 *
 * SCRIPT is UTF-8, which arguments are not on every system. Its lines: a model; a session file to write; a
 * larger file that has the model inside, twice; the two offsets; then texts. Prints the ids of each text and
 * its text again, then ten greedy tokens after the first text. What has to be equal on one system is checked
 * here: exit status 1, and why. */
#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "halfbyte.h"
#include "halfbyte_tokenizer.h"
#include "thread.h"
#if defined(_WIN32)
#include <io.h>
#define open _open
#define close _close
#define lseek _lseeki64
#define read(fd, to, bytes) _read(fd, to, (unsigned)(bytes))
#define READ_ONLY (_O_RDONLY | _O_BINARY)
#else
#include <unistd.h>
#define READ_ONLY O_RDONLY
#endif

enum { LINE = 4096, MOST = 256, COUNT = 10 };

static void check(int right, const char *what) {
    if (right) return;
    printf("client: %s: %s\n", what, hb_last_error());
    exit(1);
}

static int read_line(FILE *f, char line[LINE]) {
    if (!fgets(line, LINE, f)) return 0;
    line[strcspn(line, "\r\n")] = 0;
    return 1;
}

static void print(const int32_t *ids, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) printf("%s%" PRId32, i ? " " : "", ids[i]);
    puts("");
}

/* The tokens that follow, each the highest logit. */
static void continue_greedily(hb_session *s, const int32_t *ids, uint32_t count, uint32_t vocab,
                              int32_t *out) {
    float *logits = malloc(vocab * sizeof *logits);
    check(logits && !hb_feed(s, ids, count, logits), "feeding");
    for (uint32_t i = 0; i < COUNT; i++) {
        out[i] = 0;
        for (uint32_t k = 1; k < vocab; k++)
            if (logits[k] > logits[out[i]]) out[i] = (int32_t)k;
        check(!hb_feed(s, &out[i], 1, logits), "feeding");
    }
    free(logits);
}

/* The same tokens from a file that was opened in another way; closes it. */
static void check_file(hb_file *file, int threads, const int32_t *ids, uint32_t count, const int32_t *want) {
    hb_model_options options = {.size = sizeof options, .threads = threads, .rows = 16, .sessions = 1};
    hb_model *model;
    hb_session *session;
    int32_t got[COUNT];
    check(!hb_verify(file, NULL, NULL), "verifying");
    check(!hb_model_create(file, &options, &model), "a model");
    check(!hb_session_create(model, NULL, &session), "a session");
    continue_greedily(session, ids, count, hb_vocab_size(file), got);
    check(!memcmp(got, want, sizeof got), "other tokens");
    hb_session_free(session), hb_model_free(model), hb_close(file);
}

/* What hb_fit says is enough, and a page less is not. */
static void check_memory(hb_file *file, const int32_t *ids, uint32_t count) {
    hb_model_options options = {.size = sizeof options, .rows = 16, .sessions = 1, .threads = 2};
    hb_needs needs = {.size = sizeof needs};
    check(!hb_fit(file, &options, 64, &needs), "hb_fit");
    const size_t total = (size_t)(needs.model + needs.session);
    char *memory = malloc(total + 64);
    check(memory != NULL, "memory");
    for (int less = 0; less < 2; less++) {
        hb_allocator arena;
        hb_model *model = NULL;
        hb_session *session = NULL;
        const hb_session_options whole = {.size = sizeof whole, .positions = 64, .reserve = 64};
        char *aligned = memory + (64 - (uintptr_t)memory % 64) % 64;
        check(!hb_arena(aligned, total - (less ? 4096 : 0), &arena), "an arena");
        options.allocator = &arena;
        int status = hb_model_create(file, &options, &model);
        if (!status) status = hb_session_create(model, &whole, &session);
        if (!status) status = hb_feed(session, ids, count, NULL);
        check(status == (less ? HB_ERROR_MEMORY : HB_OK), less ? "a page less" : "what was foretold");
        hb_session_free(session), hb_model_free(model);
    }
    free(memory);
}

typedef struct {
    hb_model *model;
    _Atomic int begun;
} canceller;

static HB_THREAD_MAIN cancel(void *argument) {
    canceller *c = argument;
    while (!atomic_load(&c->begun)) hb_thread_yield();
    hb_cancel(c->model, 1);
    return 0;
}

/* Feeds until another thread says that it is enough. */
static void check_cancel(hb_model *model, const int32_t *ids) {
    canceller c = {model, 0};
    hb_thread thread;
    hb_session *session;
    int status;
    check(!hb_session_create(model, NULL, &session), "a session");
    check(!hb_thread_start(&thread, cancel, &c), "a thread");
    do {
        status = hb_feed(session, ids, 1, NULL);
        if (!status) check(!hb_session_rewind(session, 1), "rewinding");
        atomic_store(&c.begun, 1);
    } while (!status);
    check(status == HB_ERROR_CANCELLED, "cancelling");
    hb_thread_join(thread);
    hb_cancel(model, 0);
    check(!hb_feed(session, ids, 1, NULL), "going on");
    hb_session_free(session);
}

static void check_state(hb_model *model, hb_session *session, const char *path, const char *broken,
                        uint32_t vocab) {
    hb_session *again;
    int32_t one[COUNT], other[COUNT];
    const int32_t next = hb_session_ids(session)[0];
    for (int i = 0; i < 2; i++) check(!hb_session_save(session, path), "saving"); /* twice: it replaces */
    check(!hb_session_load(model, path, NULL, &again), "loading");
    continue_greedily(session, &next, 1, vocab, one);
    continue_greedily(again, &next, 1, vocab, other);
    check(!memcmp(one, other, sizeof one), "a loaded session goes another way");
    hb_session_free(again);
    check(hb_session_load(model, broken, NULL, &again) == HB_ERROR_FORMAT, "a model as a session");
}

int main(int argc, char **argv) {
    static char path[LINE], saved[LINE], asset[LINE], line[LINE], text[LINE];
    static int32_t ids[MOST], first[MOST], want[COUNT];
    uint64_t offsets[2];
    FILE *script = argc == 2 ? fopen(argv[1], "rb") : NULL;
    hb_file *file, *other;
    hb_tokenizer *tokenizer;
    check(script && read_line(script, path) && read_line(script, saved) && read_line(script, asset),
          "the script");
    for (int i = 0; i < 2; i++) {
        check(read_line(script, line), "an offset");
        offsets[i] = strtoull(line, NULL, 10);
    }
    const hb_open_options verified = {.size = sizeof verified, .verify = 1};
    check(!hb_open_path(path, &verified, &file), "opening");
    check(!hb_file_tokenizer(file, &tokenizer), "the tokenizer");
    uint32_t count = 0;
    while (read_line(script, line)) {
        const int64_t n = hb_tokenize(tokenizer, line, strlen(line), HB_TOKENIZE_ADD, ids, MOST);
        check(n > 0 && n <= MOST, "tokenising");
        print(ids, (uint32_t)n);
        if (!count) memcpy(first, ids, sizeof first), count = (uint32_t)n;
        hb_detokenizer stream;
        size_t at = 0;
        hb_detokenize_start(&stream, tokenizer, 0);
        for (int64_t i = 0; i < n; i++) {
            const int64_t part = hb_detokenize(&stream, ids[i], text + at, LINE - at);
            check(part >= 0, "detokenising");
            at += (size_t)part;
        }
        const int64_t rest = hb_detokenize_finish(&stream, text + at, LINE - at);
        check(rest >= 0, "detokenising");
        fwrite(text, 1, at + (size_t)rest, stdout);
        puts("");
    }
    fclose(script);

    hb_model *model;
    hb_session *session;
    hb_model_options options = {.size = sizeof options, .threads = 2};
    const uint32_t vocab = hb_vocab_size(file);
    check(!hb_model_create(file, &options, &model), "a model");
    check(hb_model_threads(model) == 2 * HB_THREADS + !HB_THREADS, "threads");
    check(!hb_session_create(model, NULL, &session), "a session");
    continue_greedily(session, first, count, vocab, want);
    print(want, COUNT);
    check_state(model, session, saved, path, vocab);
    check_cancel(model, first);
    hb_session_free(session), hb_model_free(model);
    check_memory(file, first, count);

    /* from a descriptor, mapped where the offset is a multiple of 64 and else read; from memory, copied if it
     * is not aligned to 64 */
    const size_t bytes = (size_t)hb_file_bytes(file);
    const int fd = open(asset, READ_ONLY);
    char *memory = malloc(bytes + 65);
    check(fd >= 0 && memory, "the larger file");
    for (int i = 0; i < 2; i++) {
        check(!hb_open_fd(fd, offsets[i], bytes, NULL, &other), "opening a descriptor");
        check_file(other, i, first, count, want);
        char *at = memory + (64 - (uintptr_t)memory % 64) % 64 + i;
        check(lseek(fd, (int64_t)offsets[i], SEEK_SET) >= 0, "seeking");
        for (size_t done = 0; done < bytes;) {
            const int64_t got = read(fd, at + done, bytes - done);
            check(got > 0, "reading");
            done += (size_t)got;
        }
        check(!hb_open_memory(at, bytes, NULL, &other), "opening memory");
        check_file(other, 2 - i, first, count, want);
    }
    check(hb_open_fd(fd, 1, bytes, NULL, &other) == HB_ERROR_FORMAT, "a hole as a model");
    close(fd), free(memory);
    hb_tokenizer_free(tokenizer), hb_close(file);
    return 0;
}
