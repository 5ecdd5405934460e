/* libFuzzer: a section VOCB and a text. The input is u32 bytes of the section, the section, then the text, or
 * with 0 bytes patches to the section in $HALFBYTE_VOCB: u32 offset, u8 value, until an offset of all ones.
 *
 * clang -g -O1 -fsanitize=fuzzer,address,undefined -Iinclude -Isrc -DHB_X86=0 -DHB_ARM=0 -DHB_AVXVNNI=0
 * -D_GNU_SOURCE fuzz/fuzz_tokenizer.c src/{vocab,tokenizer*,normalise,detokenize,chat,memory}.c */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "halfbyte_tokenizer.h"

static uint8_t *seed;
static size_t seed_bytes;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    FILE *f = getenv("HALFBYTE_VOCB") ? fopen(getenv("HALFBYTE_VOCB"), "rb") : NULL;
    if (!f) return 0;
    fseek(f, 0, SEEK_END);
    seed_bytes = (size_t)ftell(f);
    rewind(f);
    seed = malloc(seed_bytes);
    if (seed && fread(seed, 1, seed_bytes, f) != seed_bytes) seed_bytes = 0;
    fclose(f);
    return 0;
}

static void use(const uint8_t *section, size_t bytes, const uint8_t *text, size_t n) {
    static int32_t ids[4096];
    static char out[1 << 16];
    hb_tokenizer *t;
    hb_detokenizer s;
    if (hb_tokenizer_open(section, bytes, NULL, &t)) return;
    for (uint32_t flags = 0; flags < 4; flags++) {
        const int64_t count = hb_tokenize(t, (const char *)text, n, flags, ids, 4096);
        hb_detokenize_start(&s, t, flags & 1);
        for (int64_t i = 0; i < count && i < 4096; i++) hb_detokenize(&s, ids[i], out, sizeof out);
        hb_detokenize_finish(&s, out, sizeof out);
    }
    hb_token_id(t, (const char *)text, n);
    hb_tokenizer_free(t);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    uint32_t n;
    if (size < 4) return 0;
    memcpy(&n, data, 4);
    data += 4, size -= 4;
    if (n && n <= size) {
        uint8_t *section = malloc(n); /* its end is the end of the memory */
        if (!section) return 0;
        memcpy(section, data, n);
        use(section, n, data + n, size - n);
        free(section);
        return 0;
    }
    if (!seed_bytes) return 0;
    uint8_t *section = malloc(seed_bytes);
    if (!section) return 0;
    memcpy(section, seed, seed_bytes);
    for (; size >= 5; data += 5, size -= 5) {
        memcpy(&n, data, 4);
        if (n == UINT32_MAX) {
            data += 4, size -= 4;
            break;
        }
        section[n % (n & 1 ? seed_bytes : seed_bytes < 768 ? seed_bytes : 768)] = data[4];
    }
    use(section, seed_bytes, data, size);
    /* the same bytes as a conversation's section */
    hb_message m = {sizeof m, "user", (const char *)data, size};
    hb_chat_render(section, seed_bytes, &m, 1, NULL, 0);
    free(section);
    return 0;
}
