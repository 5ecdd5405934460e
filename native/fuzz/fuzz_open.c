/* Files: whatever the bytes are, opening them is refused or what was opened can be used.
 *
 * Digests are made right first, as the mutations of a fuzzer never would, so that what lies behind them is
 * reached. */
#include <stdlib.h>
#include <string.h>

#include "halfbyte_program.h"
#include "sha256.h"

static void make_right(uint8_t *data, size_t bytes) {
    hb_header *h = (hb_header *)data;
    hb_section *sections = (hb_section *)(data + 64);
    hb_sha256 s;
    if (bytes < 64 || h->sections > HB_MAX_SECTIONS || 64 + 64 * (size_t)h->sections > bytes) return;
    h->length = bytes;
    for (uint32_t i = 0; i < h->sections; i++) {
        const hb_section *t = &sections[i];
        if (t->offset > bytes || t->length > bytes - t->offset || !memcmp(t->kind, "DATA", 4)) continue;
        hb_digest(data + t->offset, t->length, sections[i].digest);
    }
    hb_sha256_start(&s);
    hb_sha256_add(&s, data, 32);
    hb_sha256_add(&s, sections, 64 * (size_t)h->sections);
    hb_sha256_end(&s, h->digest);
}

int LLVMFuzzerTestOneInput(const uint8_t *given, size_t bytes) {
    hb_file *file = NULL;
    hb_model *model = NULL;
    hb_session *session = NULL;
    uint8_t *data = aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
    if (!data) return 0;
    memcpy(data, given, bytes);
    make_right(data, bytes);
    if (!hb_open_memory(data, bytes, NULL, &file)) {
        const hb_model_options options = {.size = sizeof options, .rows = 4, .sessions = 1, .positions = 80};
        hb_needs needs = {.size = sizeof needs};
        const int32_t ids[5] = {0};
        hb_verify(file, NULL, NULL);
        if (!hb_fit(file, &options, 1, &needs) && needs.model + needs.session < 1 << 26 &&
            !hb_model_create(file, &options, &model) && !hb_session_create(model, NULL, &session))
            hb_feed(session, ids, 5, NULL);
        hb_session_free(session);
        hb_model_free(model);
        hb_close(file);
    }
    free(data);
    return 0;
}
