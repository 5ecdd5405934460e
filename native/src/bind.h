/* Programs, bound: every record with its operands found and its kernel chosen. */
#ifndef HB_BIND_H
#define HB_BIND_H

#include <stdbool.h>

#include "halfbyte.h"
#include "kernels/kernels.h"
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
    size_t scratch_bytes; /* of one thread */
    char *scratch;
    uint32_t tokens; /* rows that the strips and the angle tables have room for */
    uint8_t *strips; /* quantised activations */
    uint32_t *spans; /* first rows of the tasks of ATTEND, and the number of rows */
    float *partial;  /* sums of segments of ATTEND */
    size_t partial_size;
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

/* Makes room for a step of `tokens` rows; false when memory is out. */
bool hb_program_reserve(hb_program *program, uint32_t tokens);

/* Memory for `count` values until the next call; NULL when memory is out. */
float *hb_program_partial(hb_program *program, size_t count);

#endif
