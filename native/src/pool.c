#include "pool.h"

#include <stdatomic.h>
#include <stdbool.h>

#include "cpu.h"
#include "thread.h"

#if !HB_THREADS /* one thread, the caller's */

struct hb_pool {
    hb_allocator allocator;
};

size_t hb_pool_bytes(int threads) { return (void)threads, sizeof(hb_pool); }

hb_pool *hb_pool_create_with(const hb_allocator *allocator, int threads) {
    hb_pool *p = hb_allocate(allocator, hb_pool_bytes(threads));
    if (p) p->allocator = *allocator;
    return p;
}

int hb_pool_threads(const hb_pool *pool) { return (void)pool, 1; }

void hb_pool_free(hb_pool *p) {
    if (!p) return;
    const hb_allocator a = p->allocator;
    hb_release(&a, p);
}

void hb_pool_run(hb_pool *p, hb_task *task, void *context, uint32_t count, uint32_t chunk) {
    (void)p, (void)chunk;
    for (uint32_t i = 0; i < count; i++) task(context, i, 0);
}

#else

/* `state` is one word: the low 16 bits count the workers inside the loop, bit 16 says that it is open, and
 * the rest numbers it. A worker enters by compare-and-swap while the loop is open, so the caller, once it has
 * closed the loop, waits only for those inside: a thread that sleeps or has not been scheduled delays nobody.
 */
enum { INSIDE = 0xffff, OPEN = 0x10000, GENERATION = 0x20000 };
enum { MAX_THREADS = 1024 };

typedef struct {
    hb_pool *pool;
    hb_thread thread;
    uint32_t worker;
} member;

struct hb_pool {
    _Alignas(64) _Atomic uint64_t state;
    _Alignas(64) _Atomic uint32_t next;
    _Alignas(64) _Atomic int sleepers;
    _Atomic bool stop;
    hb_task *task;
    void *context;
    uint32_t count, chunk;
    int threads, spins;
    member *members;
    hb_allocator allocator;
    hb_lock lock;
    hb_signal wake;
};

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void work(hb_pool *p, uint32_t worker) {
    const uint32_t count = p->count, chunk = p->chunk, parts = 4 * (uint32_t)p->threads;
    uint32_t first = atomic_load_explicit(&p->next, memory_order_relaxed);
    while (first < count) {
        const uint32_t share = (count - first) / parts, most = share < chunk ? share : chunk;
        const uint32_t last = first + (most ? most : 1);
        if (!atomic_compare_exchange_weak_explicit(&p->next, &first, last, memory_order_relaxed,
                                                   memory_order_relaxed))
            continue;
        for (uint32_t i = first; i < last; i++) p->task(p->context, i, worker);
        first = atomic_load_explicit(&p->next, memory_order_relaxed);
    }
}

/* Waits until the state differs from `seen` in generation or the pool stops. */
static uint64_t await(hb_pool *p, uint64_t seen) {
    for (int i = 0; i < p->spins; i++) {
        uint64_t now = atomic_load_explicit(&p->state, memory_order_acquire);
        if (now / GENERATION != seen / GENERATION || atomic_load_explicit(&p->stop, memory_order_relaxed))
            return now;
        relax();
    }
    hb_lock_take(&p->lock);
    atomic_fetch_add(&p->sleepers, 1);
    uint64_t now;
    while ((now = atomic_load(&p->state)) / GENERATION == seen / GENERATION && !atomic_load(&p->stop))
        hb_signal_await(&p->wake, &p->lock);
    atomic_fetch_sub(&p->sleepers, 1);
    hb_lock_give(&p->lock);
    return now;
}

static HB_THREAD_MAIN member_main(void *argument) {
    member *me = argument;
    hb_pool *p = me->pool;
    uint64_t seen = 0;
    for (;;) {
        uint64_t now = await(p, seen);
        if (atomic_load(&p->stop)) return 0;
        seen = now;
        bool entered = false;
        while (now / GENERATION == seen / GENERATION && (now & OPEN) && !entered)
            entered = atomic_compare_exchange_weak(&p->state, &now, now + 1);
        if (!entered) continue;
        work(p, me->worker);
        atomic_fetch_sub_explicit(&p->state, 1, memory_order_release);
    }
}

size_t hb_pool_bytes(int threads) { return sizeof(hb_pool) + (size_t)threads * sizeof(member); }

hb_pool *hb_pool_create_with(const hb_allocator *allocator, int threads) {
    if (threads < 1) threads = 1;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    hb_pool *p = hb_allocate(allocator, hb_pool_bytes(threads));
    if (!p) return NULL;
    p->allocator = *allocator;
    atomic_init(&p->state, 0);
    atomic_init(&p->next, 0);
    atomic_init(&p->sleepers, 0);
    atomic_init(&p->stop, false);
    p->threads = 1;
    p->spins = threads <= hb_cpu_count() ? 4000 : 1; /* with more threads than processors, spinning steals */
    p->members = (member *)(p + 1);
    hb_lock_start(&p->lock);
    hb_signal_start(&p->wake);
    for (int i = 1; i < threads; i++) {
        member *m = &p->members[i];
        m->pool = p;
        m->worker = (uint32_t)i;
        if (hb_thread_start(&m->thread, member_main, m)) break; /* fewer threads are still right */
        p->threads = i + 1;
    }
    return p;
}

int hb_pool_threads(const hb_pool *pool) { return pool->threads; }

void hb_pool_free(hb_pool *p) {
    if (!p) return;
    hb_lock_take(&p->lock);
    atomic_store(&p->stop, true);
    hb_signal_all(&p->wake);
    hb_lock_give(&p->lock);
    for (int i = 1; i < p->threads; i++) hb_thread_join(p->members[i].thread);
    hb_signal_end(&p->wake);
    hb_lock_end(&p->lock);
    const hb_allocator a = p->allocator;
    hb_release(&a, p);
}

void hb_pool_run(hb_pool *p, hb_task *task, void *context, uint32_t count, uint32_t chunk) {
    if (chunk < 1) chunk = 1;
    if (p->threads == 1 || count <= chunk) {
        for (uint32_t i = 0; i < count; i++) task(context, i, 0);
        return;
    }
    p->task = task;
    p->context = context;
    p->count = count;
    p->chunk = chunk;
    atomic_store_explicit(&p->next, 0, memory_order_relaxed);
    uint64_t state = atomic_load_explicit(&p->state, memory_order_relaxed);
    atomic_store(&p->state, (state / GENERATION + 1) * GENERATION | OPEN);
    if (atomic_load(&p->sleepers)) {
        hb_lock_take(&p->lock);
        hb_signal_all(&p->wake);
        hb_lock_give(&p->lock);
    }
    work(p, 0);
    state = atomic_fetch_and(&p->state, ~(uint64_t)OPEN);
    for (int i = 0; atomic_load_explicit(&p->state, memory_order_acquire) & INSIDE; i++) {
        if (i < p->spins)
            relax();
        else
            hb_thread_yield();
    }
}

#endif

hb_pool *hb_pool_create(int threads) {
    const hb_allocator heap = hb_allocator_of(NULL);
    return hb_pool_create_with(&heap, threads);
}
