/* A pool of threads that runs one loop at a time; the caller takes part. */
#ifndef HB_POOL_H
#define HB_POOL_H

#include <stdint.h>

#include "halfbyte_program.h"
#include "memory.h"

/* `worker` is below hb_pool_threads: it numbers the thread, for its scratch memory. */
typedef void hb_task(void *context, uint32_t index, uint32_t worker);

hb_pool *hb_pool_create_with(const hb_allocator *allocator, int threads);

/* What such a pool allocates. */
size_t hb_pool_bytes(int threads);

/* Calls task for 0 <= index < count in any order; a thread takes up to `chunk` consecutive ones at a time,
 * fewer towards the end, so that a slow one holds the others up for a small part only (guided
 * self-scheduling, Polychronopoulos and Kuck 1987). Up to `chunk` in all stay on the caller. Returns when all
 * are done. */
void hb_pool_run(hb_pool *pool, hb_task *task, void *context, uint32_t count, uint32_t chunk);

#endif
