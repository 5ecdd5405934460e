/* Session files: whatever the bytes are, loading them is refused or the session can be used.
 *
 * $HB_FUZZ_MODEL is the model. The model's digest and the file's own are made right first. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "halfbyte.h"

int LLVMFuzzerTestOneInput(const uint8_t *given, size_t bytes) {
    static hb_file *file;
    static hb_model *model;
    hb_session *session = NULL;
    if (!model) {
        const hb_model_options options = {.size = sizeof options, .rows = 4, .sessions = 1, .kv = "tq3"};
        if (hb_open_path(getenv("HB_FUZZ_MODEL"), NULL, &file) || hb_model_create(file, &options, &model)) {
            fprintf(stderr, "%s\n", hb_last_error());
            exit(2);
        }
    }
    uint8_t *data = malloc(bytes + 1);
    if (!data) return 0;
    memcpy(data, given, bytes);
    if (bytes > 40 + 32) {
        memcpy(data + 8, hb_file_digest(file), 32);
        hb_digest(data, bytes - 32, data + bytes - 32);
    }
    if (!hb_session_read(model, data, bytes, NULL, &session)) {
        const int32_t id = 1;
        hb_feed(session, &id, 1, NULL);
        hb_session_rewind(session, hb_session_position(session) / 2);
        hb_session_free(session);
    }
    free(data);
    return 0;
}
