/* Memory by way of the caller's allocator, and blocks that are laid out before they are taken. */
#ifndef HB_MEMORY_H
#define HB_MEMORY_H

#include "halfbyte.h"

/* `given` with its unknown tail read as zero; NULL is malloc and free. */
hb_allocator hb_allocator_of(const hb_allocator *given);

/* `bytes` bytes aligned to 64, not cleared, or NULL. */
void *hb_allocate(const hb_allocator *a, size_t bytes);
void hb_release(const hb_allocator *a, void *memory);

/* What hb_allocate(bytes) takes of an arena, its own words included. */
size_t hb_allocation_cost(size_t bytes);

/* A block: with base NULL, taking only measures. Each part starts on a cache line. */
typedef struct hb_block {
    char *base;
    size_t used;
} hb_block;

static inline void *hb_take(hb_block *b, size_t count, size_t size) {
    const size_t at = (b->used + 63) / 64 * 64;
    b->used = at + count * size;
    return b->base ? b->base + at : NULL;
}

/* Sets the thread's last error, and gives back `status`. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int hb_fail(int status, const char *format, ...);

/* Copies a struct of options whose first field is its size: what the caller's version lacks is zero. */
#define HB_OPTIONS(type, given) \
    type options = {0};         \
    hb_copy_options(&options, sizeof options, given)
void hb_copy_options(void *to, size_t size, const void *given);

#endif
