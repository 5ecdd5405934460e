/* A mutex, or nothing where there are no threads. */
#ifndef HB_LOCK_H
#define HB_LOCK_H

#if defined(__wasm__) && !defined(__EMSCRIPTEN_PTHREADS__)
#define HB_THREADS 0
#else
#define HB_THREADS 1
#endif

#if HB_THREADS
#include <pthread.h>
typedef pthread_mutex_t hb_lock;
static inline void hb_lock_start(hb_lock *l) { pthread_mutex_init(l, 0); }
static inline void hb_lock_take(hb_lock *l) { pthread_mutex_lock(l); }
static inline void hb_lock_give(hb_lock *l) { pthread_mutex_unlock(l); }
static inline void hb_lock_end(hb_lock *l) { pthread_mutex_destroy(l); }
#else
typedef int hb_lock;
static inline void hb_lock_start(hb_lock *l) { *l = 0; }
static inline void hb_lock_take(hb_lock *l) { (void)l; }
static inline void hb_lock_give(hb_lock *l) { (void)l; }
static inline void hb_lock_end(hb_lock *l) { (void)l; }
#endif

#endif
