/* Chat on a terminal: a question a line, answers as they come. What was said is not computed twice.
 *
 *     chat MODEL.hb [-n TOKENS] [-t THREADS] [-T TEMPERATURE] [-s SEED] */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "halfbyte.h"
#include "halfbyte_tokenizer.h"

enum { LINE = 1 << 14, TURNS = 256, MOST = 1 << 15 };

static int fail(const char *what) {
    fprintf(stderr, "chat: %s: %s\n", what, hb_last_error());
    return 2;
}

int main(int argc, char **argv) {
    static char line[LINE], said[LINE];
    static int32_t ids[MOST];
    hb_model_options options = {.size = sizeof options};
    hb_sampling sampling = {.size = sizeof sampling};
    hb_message talk[TURNS];
    uint32_t turns = 0, most = 256;
    for (int i = 2; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "-n")) most = (uint32_t)atoi(argv[i + 1]);
        if (!strcmp(argv[i], "-t")) options.threads = atoi(argv[i + 1]);
        if (!strcmp(argv[i], "-T")) sampling.temperature = atof(argv[i + 1]);
        if (!strcmp(argv[i], "-s")) sampling.seed = strtoull(argv[i + 1], NULL, 10);
    }
    if (argc < 2)
        return fprintf(stderr, "usage: chat MODEL.hb [-n TOKENS] [-t THREADS] [-T TEMPERATURE] [-s SEED]\n"),
               2;
    hb_file *file;
    hb_model *model;
    hb_tokenizer *tokenizer;
    hb_session *session;
    hb_sampler *sampler;
    const void *chat;
    size_t chat_bytes, end_count = 0;
    int64_t ends[16];
    if (hb_open_path(argv[1], NULL, &file) || hb_file_tokenizer(file, &tokenizer) ||
        hb_file_chat(file, &chat, &chat_bytes) || hb_model_create(file, &options, &model) ||
        hb_session_create(model, NULL, &session) ||
        hb_sampler_create(&sampling, hb_vocab_size(file), NULL, &sampler))
        return fail(argv[1]);
    hb_metadata_ints(file, "tokenizer.eos_ids", ends, 16, &end_count);
    float *logits = malloc(hb_vocab_size(file) * sizeof *logits);
    while (logits && turns + 2 <= TURNS && fgets(line, LINE, stdin)) {
        line[strcspn(line, "\r\n")] = 0;
        talk[turns++] = (hb_message){sizeof *talk, "user", strdup(line), strlen(line)};
        const int64_t count = hb_chat_tokenize(chat, chat_bytes, tokenizer, talk, turns, ids, MOST);
        if (count < 1 || count > MOST) return fail("the conversation");
        /* what the session holds of it stays; at least one token is fed, for its logits */
        const uint32_t held = hb_session_position(session);
        const int32_t *before = hb_session_ids(session);
        uint32_t same = 0;
        while (same < held && same + 1 < count && before[same] == ids[same]) same++;
        if (hb_session_rewind(session, held - same) ||
            hb_feed(session, ids + same, (uint32_t)count - same, logits))
            return fail("the conversation");
        hb_detokenizer stream;
        hb_detokenize_start(&stream, tokenizer, 0);
        size_t bytes = 0;
        for (uint32_t n = 0; n < most; n++) {
            int32_t next;
            int done = 0;
            if (hb_sample(sampler, logits, hb_session_ids(session), hb_session_position(session), &next))
                return fail("sampling");
            for (size_t e = 0; e < end_count && e < 16; e++) done |= ends[e] == next;
            const int64_t part = done ? -1 : hb_detokenize(&stream, next, said + bytes, LINE - bytes);
            if (part < 0 || bytes + (size_t)part > LINE) break;
            fwrite(said + bytes, 1, (size_t)part, stdout), fflush(stdout);
            bytes += (size_t)part;
            if (hb_feed(session, &next, 1, logits)) return fail("the answer");
        }
        const int64_t rest = hb_detokenize_finish(&stream, said + bytes, LINE - bytes);
        if (rest > 0 && bytes + (size_t)rest <= LINE) {
            fwrite(said + bytes, 1, (size_t)rest, stdout);
            bytes += (size_t)rest;
        }
        puts("");
        char *copy = malloc(bytes + 1);
        if (!copy) return fail("memory");
        talk[turns++] = (hb_message){sizeof *talk, "assistant", memcpy(copy, said, bytes), bytes};
    }
    hb_sampler_free(sampler), hb_session_free(session), hb_model_free(model);
    hb_tokenizer_free(tokenizer), hb_close(file);
    return 0;
}
