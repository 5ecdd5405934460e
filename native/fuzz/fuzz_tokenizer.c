/* Tokenizers and chat templates: whatever the bytes of their sections are, opening them is refused or they
 * can be used. An input is a u32, that many bytes of a section, which is taken for a VOCB and for a CHAT, and
 * a text. Tables of Unicode make most sections longer than an input: from PATCHED up the u32 names one of
 * those in the files $HB_FUZZ_SECTION0 to 7, and changes follow, u32 offset and u8 value, until an offset of
 * all ones. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "halfbyte_tokenizer.h"

enum { SEEDS = 8, HEAD = 768 };
#define PATCHED 0xfffffff8u

static uint8_t *seeds[SEEDS];
static size_t seed_bytes[SEEDS];

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    for (int i = 0; i < SEEDS; i++) {
        char name[] = "HB_FUZZ_SECTION0";
        name[sizeof name - 2] = (char)('0' + i);
        FILE *f = getenv(name) ? fopen(getenv(name), "rb") : NULL;
        if (!f) continue;
        fseek(f, 0, SEEK_END);
        const size_t bytes = (size_t)ftell(f);
        rewind(f);
        seeds[i] = malloc(bytes);
        if (seeds[i] && fread(seeds[i], 1, bytes, f) == bytes) seed_bytes[i] = bytes;
        fclose(f);
    }
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

/* Conversations of one text, for which a template of any shape has some joint. */
static void converse(const uint8_t *section, size_t bytes, const uint8_t *text, size_t n) {
    static const char *const roles[4] = {"system", "user", "assistant", "user"};
    static char out[1 << 12];
    for (uint32_t first = 0; first < 2; first++)
        for (uint32_t count = 1; count <= 4 - first; count++) {
            hb_message m[4];
            for (uint32_t i = 0; i < count; i++)
                m[i] = (hb_message){sizeof *m, roles[first + i], (const char *)text, i % 2 ? n / 2 : n};
            hb_chat_render(section, bytes, m, count, out, sizeof out);
        }
}

/* Every other change is to the section's head, where the offsets and kinds are. */
static void patched(uint32_t seed, const uint8_t *data, size_t size) {
    const size_t bytes = seed_bytes[seed], head = bytes < HEAD ? bytes : HEAD;
    uint8_t *section = malloc(bytes);
    if (!section) return;
    memcpy(section, seeds[seed], bytes);
    for (; size >= 5; data += 5, size -= 5) {
        uint32_t at;
        memcpy(&at, data, 4);
        if (at == UINT32_MAX) {
            data += 4, size -= 4;
            break;
        }
        section[at / 2 % (at & 1 ? bytes : head)] = data[4];
    }
    use(section, bytes, data, size);
    free(section);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    uint32_t n;
    if (size < 4) return 0;
    memcpy(&n, data, 4);
    data += 4, size -= 4;
    if (n >= PATCHED && seed_bytes[n - PATCHED]) {
        patched(n - PATCHED, data, size);
        return 0;
    }
    if (n > size) return 0;
    uint8_t *section = malloc(n + !n); /* its end is the end of the memory */
    if (!section) return 0;
    memcpy(section, data, n);
    use(section, n, data + n, size - n);
    converse(section, n, data + n, size - n);
    free(section);
    return 0;
}
