/* The pool with a thread that is held up: everything else must be done without it. One line, 0 when right. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "pool.h"

enum { COUNT = 1000, CHUNK = 32, THREADS = 3 };

typedef struct {
    _Atomic int calls[COUNT];
    _Atomic int done, by_slow, left;
    pthread_t slow;
    _Atomic int known; /* whether `slow` is */
} work;

/* Worker 1 stops in its first task until only what it holds itself is left. */
static void task(void *context, uint32_t index, uint32_t worker) {
    work *w = context;
    atomic_fetch_add(&w->calls[index], 1);
    if (worker == 1) {
        if (atomic_fetch_add(&w->by_slow, 1) == 0)
            while (atomic_load(&w->done) < COUNT - CHUNK) sched_yield();
    } else {
        while (!atomic_load(&w->by_slow)) sched_yield(); /* else the others might be done before it begins */
    }
    atomic_fetch_add(&w->done, 1);
}

int main(void) {
    hb_pool *pool = hb_pool_create(THREADS);
    if (!pool || hb_pool_threads(pool) != THREADS) return 1;
    for (int round = 0; round < 100; round++) {
        work w = {0};
        hb_pool_run(pool, task, &w, COUNT, CHUNK);
        for (int i = 0; i < COUNT; i++)
            if (atomic_load(&w.calls[i]) != 1) return printf("index %d ran %d times\n", i, w.calls[i]), 1;
        if (atomic_load(&w.by_slow) > CHUNK) return printf("the slow thread ran %d\n", w.by_slow), 1;
    }
    hb_pool_free(pool);
    puts("ok");
    return 0;
}
