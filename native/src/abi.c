/* The exported functions that are not defined where they work. */
#include <string.h>

#include "cpu.h"
#include "exec.h"

int hb_abi_version(void) { return HB_ABI_VERSION; }

uint32_t hb_version(void) { return HB_VERSION_MAJOR * 1000000 + HB_VERSION_MINOR * 1000 + HB_VERSION_PATCH; }

const char *hb_isa_name(int isa) {
    switch (isa) {
        case HB_ISA_SCALAR:
            return "scalar";
        case HB_ISA_AVX2:
            return "avx2";
        case HB_ISA_AVX512VNNI:
            return "avx512vnni";
        case HB_ISA_NEON:
            return "neon";
        case HB_ISA_DOTPROD:
            return "dotprod";
        case HB_ISA_I8MM:
            return "i8mm";
        case HB_ISA_AVXVNNI:
            return "avxvnni";
        case HB_ISA_AVX512VLVNNI:
            return "avx512vlvnni";
        default:
            return NULL;
    }
}

int hb_isa_supported(int isa) { return hb_cpu_supports(isa); }

int hb_kernel_count(void) { return hb_kernel_rows_count; }

int hb_kernel_info_at(int index, int isa, hb_kernel_info *out) {
    if (index < 0 || index >= hb_kernel_rows_count) return HB_ERROR_RANGE;
    const hb_kernel_row *r = &hb_kernel_rows[index];
    out->op = r->op;
    out->family = r->family;
    out->isa = hb_isa_name(r->isa);
    out->name = r->name;
    out->supported = hb_cpu_supports(r->isa);
    out->chosen = hb_choose(r->op, r->family, isa == HB_ISA_BEST ? hb_cpu_best() : isa) == r;
    return HB_OK;
}

int hb_run(hb_program *program, const hb_step *step, uint32_t first, uint32_t last) {
    return hb_execute(program, step, first, last);
}

const char *hb_status_text(int status) {
    switch (status) {
        case HB_OK:
            return "ok";
        case HB_ERROR_MEMORY:
            return "out of memory";
        case HB_ERROR_RANGE:
            return "the records asked for do not exist";
        case HB_ERROR_ID:
            return "a token id is outside the vocabulary";
        case HB_ERROR_SESSION:
            return "a row names a session that is not in the step";
        case HB_ERROR_POSITION:
            return "a position is not reserved in its cache";
        case HB_ERROR_PICK:
            return "a picked row is not in the step";
        case HB_ERROR_ARGUMENT:
            return "an argument is wrong";
        case HB_ERROR_FORMAT:
            return "the file is damaged or of another format";
        case HB_ERROR_IO:
            return "the system could not open, read or write";
        case HB_ERROR_CANCELLED:
            return "cancelled";
        default:
            return "unknown status";
    }
}

int hb_quantize(const float *x, uint32_t cols, uint32_t block, int isa, int8_t *q, float *d, int32_t *sums) {
    if (block != 4 && block != 8 && block != 16 && block != 32) return HB_ERROR_ARGUMENT;
    const hb_kernel_row *row = hb_choose("quantize", "any", isa == HB_ISA_BEST ? hb_cpu_best() : isa);
    if (!row) return HB_ERROR_ARGUMENT;
    for (uint32_t c = 0; c < cols; c += 32, q += 32, d++, sums += 32 / block) {
        uint8_t record[32 + 4 + 2 * 4 * 8];
        hb_strips s = hb_strips_layout(record, 1, 32, block);
        ((hb_quantize_fn *)row->function)(x + c, cols - c < 32 ? cols - c : 32, &s, 0);
        memcpy(q, record, 32);
        memcpy(d, record + 32, 4);
        memcpy(sums, record + 36 + 4 * (32 / block), 4 * (32 / block));
    }
    return HB_OK;
}
