/* Token ids in, token ids out: the smallest use of the library.
 *
 *     generate MODEL.hb COUNT [-t THREADS] [-k KV] [-s SEED -T TEMPERATURE] ID ...
 *
 * Prints COUNT tokens (fewer when one ends the text), greedy unless a temperature is given. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "halfbyte.h"

static int fail(const char *what) {
    fprintf(stderr, "generate: %s: %s\n", what, hb_last_error());
    return 2;
}

int main(int argc, char **argv) {
    hb_model_options options = {0};
    hb_sampling sampling = {0};
    options.size = sizeof options, sampling.size = sizeof sampling;
    int first = 3;
    for (; first + 1 < argc && argv[first][0] == '-' && argv[first][1] > '9'; first += 2) {
        const char *value = argv[first + 1];
        switch (argv[first][1]) {
            case 't':
                options.threads = atoi(value);
                break;
            case 'k':
                options.kv = value;
                break;
            case 's':
                sampling.seed = strtoull(value, NULL, 10);
                break;
            case 'T':
                sampling.temperature = atof(value);
                break;
            default:
                fprintf(stderr, "generate: unknown option %s\n", argv[first]);
                return 2;
        }
    }
    if (argc <= first) {
        fprintf(stderr, "usage: generate MODEL.hb COUNT [options] ID ...\n");
        return 2;
    }
    const uint32_t count = (uint32_t)(argc - first), most = (uint32_t)atoi(argv[2]);
    hb_file *file = NULL;
    hb_model *model = NULL;
    hb_session *session = NULL;
    hb_sampler *sampler = NULL;
    if (hb_open_path(argv[1], NULL, &file)) return fail(argv[1]);
    int64_t ends[16];
    size_t end_count = 0;
    hb_metadata_ints(file, "tokenizer.eos_ids", ends, 16, &end_count);
    const uint32_t vocab = hb_vocab_size(file);
    float *logits = malloc(vocab * sizeof *logits);
    int32_t *ids = malloc(count * sizeof *ids);
    if (!logits || !ids) return fail("memory");
    for (uint32_t i = 0; i < count; i++) ids[i] = atoi(argv[(uint32_t)first + i]);
    if (hb_model_create(file, &options, &model) || hb_session_create(model, NULL, &session) ||
        hb_sampler_create(&sampling, vocab, NULL, &sampler) || hb_feed(session, ids, count, logits))
        return fail("model");
    for (uint32_t i = 0; i < most; i++) {
        int32_t next;
        if (hb_sample(sampler, logits, hb_session_ids(session), hb_session_position(session), &next))
            return fail("sampling");
        for (size_t e = 0; e < end_count && e < 16; e++)
            if (ends[e] == next) i = most;
        printf("%" PRId32 "%s", next, i + 1 >= most ? "\n" : " ");
        if (i + 1 < most && hb_feed(session, &next, 1, logits)) return fail("feeding");
    }
    hb_sampler_free(sampler);
    hb_session_free(session);
    hb_model_free(model);
    hb_close(file);
    free(logits), free(ids);
    return 0;
}
