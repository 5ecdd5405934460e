/* What a model needs of this device, before anything is taken. */
#include <inttypes.h>
#include <stdio.h>

#include "halfbyte.h"

int main(int argc, char **argv) {
    hb_file *file = NULL;
    hb_needs needs = {sizeof needs, 0, 0, 0};
    if (argc != 2 || hb_open_path(argv[1], NULL, &file) ||
        hb_fit(file, NULL, hb_context_length(file), &needs)) {
        fprintf(stderr, "embed: %s\n", argc == 2 ? hb_last_error() : "give a .hb file");
        return 2;
    }
    printf("%" PRIu64 " bytes mapped, %" PRIu64 " for the model, %" PRIu64 " for a full session\n",
           needs.mapped, needs.model, needs.session);
    hb_close(file);
    return 0;
}
