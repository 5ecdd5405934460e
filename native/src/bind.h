/* Programs, bound: every record with its operands found and its kernel chosen. */
#ifndef HB_BIND_H
#define HB_BIND_H

#include <stdbool.h>

#include "halfbyte_program.h"
#include "kernels/kernels.h"
#include "memory.h"
#include "pool.h"

/* The kernels of one instruction set, by op; LINEAR by family. */
typedef struct hb_kernels {
    hb_quantize_fn *quantize;
    hb_embed_fn *embed;
    hb_rmsnorm_fn *rmsnorm;
    hb_layernorm_fn *layernorm;
    hb_add_fn *add;
    hb_mul_fn *mul;
    hb_unary_fn *unary;
    hb_glu_fn *glu;
    hb_gather_fn *gather;
    hb_hadamard_fn *hadamard;
    hb_rope_fn *rope;
    hb_kv_put_fn *kv_put;
    hb_attend_fn *attend;
    hb_attend_merge_fn *attend_merge;
} hb_kernels;

typedef struct hb_bound {
    hb_op op;
    hb_linear_fn *linear; /* LINEAR */
    bool quantised;       /* LINEAR: x goes in as int8 */
    hb_matrix matrix;     /* LINEAR, EMBED */
    const float *vector[2];
    uint32_t vector_cols;
    const uint32_t *index; /* GATHER */
    uint32_t angles;       /* ROPE: which table of cosines and sines */
    bool by_row;           /* a row of the output needs the same row of the inputs only */
    bool joins;        /* by_row, or the quantising of LINEAR: can follow row by row on the record before */
    bool strips_stand; /* LINEAR: the record before has quantised the same input */
} hb_bound;

/* Cosines and sines of one step, shared by the ROPE records with the same frequencies and factor. */
typedef struct hb_angles {
    const float *inv_freq;
    uint32_t n;
    float mscale;
    float *table; /* [tokens][2][n] */
    bool ready;
} hb_angles;

struct hb_program {
    hb_kernels kernels;
    hb_bound *ops;
    hb_slot *slots;
    hb_cache *caches;
    hb_angles *angles;
    uint32_t op_count, slot_count, cache_count, angles_count;
    size_t strip_bytes;  /* most bytes that a token takes in strips */
    uint32_t vocabulary; /* ids are below it */
    int policy, isa;
    hb_pool *pool;
    hb_allocator allocator;
    size_t scratch_bytes; /* of one thread */
    char *scratch;
    uint32_t tokens; /* rows that the working memory has room for */
    char *working;   /* of steps: */
    uint8_t *strips; /* quantised activations */
    uint32_t *spans; /* first rows of the tasks of ATTEND, and the number of rows */
    float *partial;  /* sums of segments of ATTEND */
    size_t partial_size;
    const _Atomic int *cancelled; /* where a step looks whether to stop, or NULL */
};

/* The kernel table. */
typedef struct hb_kernel_row {
    const char *op, *family;
    int isa;
    const char *name;
    void (*function)(void);
} hb_kernel_row;
extern const hb_kernel_row hb_kernel_rows[];
extern const int hb_kernel_rows_count;

const hb_kernel_row *hb_choose(const char *op, const char *family, int isa);

/* hb_bind with an allocator. Without a pool nothing can run: it is for asking what running would take. The
 * reason of a failure is the thread's last error. */
int hb_bind_with(const hb_allocator *allocator, const hb_op *ops, uint32_t op_count, const hb_slot *slots,
                 uint32_t slot_count, const hb_cache *caches, uint32_t cache_count, const hb_weight *weights,
                 uint32_t weight_count, int policy, int isa, hb_pool *pool, hb_program **out);

/* Makes room for a step of `tokens` rows; false when memory is out. */
bool hb_program_reserve(hb_program *program, uint32_t tokens);

/* Bytes of the program and its tables. */
size_t hb_program_bytes(const hb_program *program);

/* Bytes of working memory for steps of `tokens` rows. */
size_t hb_working_bytes(const hb_program *program, uint32_t tokens);

/* Most values that hb_program_partial is asked for with so many threads, in sessions of so many positions. */
size_t hb_partial_values(const hb_program *program, uint32_t threads, uint32_t positions);

/* Memory for `count` values until the next call; NULL when memory is out. */
float *hb_program_partial(hb_program *program, size_t count);

#endif
