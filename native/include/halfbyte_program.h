/* halfbyte, the experimental half: run a program over weights, activations and caches that the caller owns.
 *
 * This changes with HB_ABI_VERSION, not with hb_version. The Python runtime is built on it; apps want
 * halfbyte.h. Lines that begin with # are skipped by the Python binding; everything else must stay plain
 * declarations. Nothing here takes ownership of memory it is given. */
#ifndef HALFBYTE_PROGRAM_H
#define HALFBYTE_PROGRAM_H

#include "halfbyte.h"
#include "halfbyte_ops.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { HB_ABI_VERSION = 5 };

/* Arithmetic: f32 computes with dequantised weights, i8g32 with int8 activations per 32 columns. */
enum { HB_POLICY_F32 = 0, HB_POLICY_I8G32 = 1 };

/* A tensor: a vector has rows = 1. `data` is 64-byte aligned and `nbytes` long. */
typedef struct hb_weight {
    const void *data;
    uint64_t nbytes;
    uint32_t encoding;
    uint32_t tile;
    uint32_t rows;
    uint32_t cols;
    uint32_t group;
    uint32_t scale_type;
} hb_weight;

/* One session's caches in pages of 64 positions: pages[c * page_count + position / 64] is a page of cache c
 * or NULL, aligned to 64 bytes, head by head (SPEC.md section 10.5). types[c] holds four HB_SIDE_*, from the
 * low byte up: of keys, of values, and of both in the first page. */
typedef struct hb_kv {
    void *const *pages;
    const uint32_t *types;
    uint32_t page_count;
} hb_kv;

/* One pass: `rows` tokens and `picks` picked rows. slot_base[i] is the first value of base slot i, whose
 * rows are its width apart; entries of views are ignored. sessions index `kv`. */
typedef struct hb_step {
    uint32_t rows;
    uint32_t picks;
    const int32_t *ids;
    const int32_t *positions;
    const int32_t *sessions;
    const int32_t *pick_rows;
    float *const *slot_base;
    const hb_kv *kv;
    uint32_t kv_count;
} hb_step;

/* A row of the kernel table. `chosen` says whether dispatch at the given isa picks it. */
typedef struct hb_kernel_info {
    const char *op;
    const char *family;
    const char *isa;
    const char *name;
    int supported;
    int chosen;
} hb_kernel_info;

typedef struct hb_program hb_program;
typedef struct hb_pool hb_pool;

HB_API int hb_abi_version(void);

HB_API int hb_kernel_count(void);
HB_API int hb_kernel_info_at(int index, int isa, hb_kernel_info *out);

/* A pool of `threads` threads, the caller included; NULL when they cannot be had. One run at a time. */
HB_API hb_pool *hb_pool_create(int threads);
HB_API int hb_pool_threads(const hb_pool *pool);
HB_API void hb_pool_free(hb_pool *pool);

/* Binds a verified program to weights. NULL, with the reason in `error`, when something cannot be run. The
 * tables are copied; weights are only pointed to. `isa` is HB_ISA_BEST or a limit:
 * kernels of better instruction sets are not used. */
HB_API hb_program *hb_bind(const hb_op *ops, uint32_t op_count, const hb_slot *slots, uint32_t slot_count,
                           const hb_cache *caches, uint32_t cache_count, const hb_weight *weights,
                           uint32_t weight_count, int policy, int isa, hb_pool *pool, char *error,
                           size_t error_size);

/* Executes records first <= i < last. */
HB_API int hb_run(hb_program *program, const hb_step *step, uint32_t first, uint32_t last);
HB_API void hb_free(hb_program *program);

/* Activations of one row to int8 per 32 columns: q[ceil(cols/32)*32], d[ceil(cols/32)], and the sums of q
 * over every `block` (4, 8, 16 or 32) columns, sums[ceil(cols/32)*32/block]. */
HB_API int hb_quantize(const float *x, uint32_t cols, uint32_t block, int isa, int8_t *q, float *d,
                       int32_t *sums);

#ifdef __cplusplus
}
#endif

#endif
