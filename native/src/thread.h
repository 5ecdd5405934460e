/* Threads, locks and signals of the system: POSIX, Windows, or none at all. */
#ifndef HB_THREAD_H
#define HB_THREAD_H

#if defined(__wasm__) && !defined(__EMSCRIPTEN_PTHREADS__)
#define HB_THREADS 0
#else
#define HB_THREADS 1
#endif

#if !HB_THREADS
typedef int hb_lock;
static inline void hb_lock_start(hb_lock *l) { *l = 0; }
static inline void hb_lock_take(hb_lock *l) { (void)l; }
static inline void hb_lock_give(hb_lock *l) { (void)l; }
static inline void hb_lock_end(hb_lock *l) { (void)l; }

#elif defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
typedef SRWLOCK hb_lock;
static inline void hb_lock_start(hb_lock *l) { InitializeSRWLock(l); }
static inline void hb_lock_take(hb_lock *l) { AcquireSRWLockExclusive(l); }
static inline void hb_lock_give(hb_lock *l) { ReleaseSRWLockExclusive(l); }
static inline void hb_lock_end(hb_lock *l) { (void)l; }

typedef CONDITION_VARIABLE hb_signal;
static inline void hb_signal_start(hb_signal *s) { InitializeConditionVariable(s); }
static inline void hb_signal_await(hb_signal *s, hb_lock *l) { SleepConditionVariableSRW(s, l, INFINITE, 0); }
static inline void hb_signal_all(hb_signal *s) { WakeAllConditionVariable(s); }
static inline void hb_signal_end(hb_signal *s) { (void)s; }

typedef HANDLE hb_thread;
#define HB_THREAD_MAIN DWORD WINAPI
static inline int hb_thread_start(hb_thread *t, LPTHREAD_START_ROUTINE main, void *argument) {
    *t = CreateThread(0, 0, main, argument, 0, 0);
    return !*t;
}
static inline void hb_thread_join(hb_thread t) { WaitForSingleObject(t, INFINITE), CloseHandle(t); }
static inline void hb_thread_yield(void) { SwitchToThread(); }

#else
#include <pthread.h>
#include <sched.h>
typedef pthread_mutex_t hb_lock;
static inline void hb_lock_start(hb_lock *l) { pthread_mutex_init(l, 0); }
static inline void hb_lock_take(hb_lock *l) { pthread_mutex_lock(l); }
static inline void hb_lock_give(hb_lock *l) { pthread_mutex_unlock(l); }
static inline void hb_lock_end(hb_lock *l) { pthread_mutex_destroy(l); }

typedef pthread_cond_t hb_signal;
static inline void hb_signal_start(hb_signal *s) { pthread_cond_init(s, 0); }
static inline void hb_signal_await(hb_signal *s, hb_lock *l) { pthread_cond_wait(s, l); }
static inline void hb_signal_all(hb_signal *s) { pthread_cond_broadcast(s); }
static inline void hb_signal_end(hb_signal *s) { pthread_cond_destroy(s); }

/* What the function of a thread returns; `return 0` ends it. */
typedef pthread_t hb_thread;
#define HB_THREAD_MAIN void *
static inline int hb_thread_start(hb_thread *t, void *(*main)(void *), void *argument) {
    return pthread_create(t, 0, main, argument);
}
static inline void hb_thread_join(hb_thread t) { pthread_join(t, 0); }
static inline void hb_thread_yield(void) { sched_yield(); }
#endif

#endif
