#include "memory.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINE = 64 };

static _Thread_local char last_error[256];

const char *hb_last_error(void) { return last_error; }

int hb_fail(int status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    for (char *c = last_error; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 0x7f) *c = '?'; /* errors are one line */
    return status;
}

void hb_copy_options(void *to, size_t size, const void *given) {
    size_t known;
    if (!given) return;
    memcpy(&known, given, sizeof known);
    memcpy(to, given, known < size ? known : size);
}

static void *heap_allocate(void *context, size_t bytes) {
    (void)context;
    return malloc(bytes);
}

static void heap_release(void *context, void *memory) {
    (void)context;
    free(memory);
}

hb_allocator hb_allocator_of(const hb_allocator *given) {
    hb_allocator a = {sizeof a, NULL, heap_allocate, heap_release};
    if (given && given->allocate && given->release) a = *given;
    return a;
}

/* The word before what the library sees holds what the allocator gave. */
void *hb_allocate(const hb_allocator *a, size_t bytes) {
    if (bytes > SIZE_MAX - 2 * LINE) return NULL;
    char *raw = a->allocate(a->context, bytes + LINE + sizeof raw);
    if (!raw) return NULL;
    char *p = raw + sizeof raw;
    p += (LINE - (uintptr_t)p % LINE) % LINE;
    memcpy(p - sizeof raw, &raw, sizeof raw);
    return p;
}

void hb_release(const hb_allocator *a, void *memory) {
    char *raw;
    if (!memory) return;
    memcpy(&raw, (char *)memory - sizeof raw, sizeof raw);
    a->release(a->context, raw);
}

/* ---- arenas ---- */

/* Chunks follow each other to the end of the arena; each begins with this, on a cache line. */
typedef struct chunk {
    size_t bytes; /* this line included */
    size_t taken;
} chunk;

typedef struct arena {
    size_t bytes; /* of all chunks */
} arena;

size_t hb_allocation_cost(size_t bytes) {
    return LINE + (bytes + LINE + sizeof(char *) + LINE - 1) / LINE * LINE;
}

static chunk *next_chunk(chunk *c) { return (chunk *)((char *)c + c->bytes); }

/* The first free chunk that is large enough; free neighbours become one on the way. */
static void *arena_allocate(void *context, size_t bytes) {
    arena *a = context;
    chunk *c = (chunk *)((char *)a + LINE), *const end = (chunk *)((char *)c + a->bytes);
    if (bytes > a->bytes) return NULL;
    const size_t need = LINE + (bytes + LINE - 1) / LINE * LINE;
    for (; c < end; c = next_chunk(c)) {
        if (c->taken) continue;
        while (next_chunk(c) < end && !next_chunk(c)->taken) c->bytes += next_chunk(c)->bytes;
        if (c->bytes < need) continue;
        if (c->bytes > need) {
            chunk *rest = (chunk *)((char *)c + need);
            rest->bytes = c->bytes - need, rest->taken = 0;
            c->bytes = need;
        }
        c->taken = 1;
        return (char *)c + LINE;
    }
    return NULL;
}

static void arena_release(void *context, void *memory) {
    (void)context;
    ((chunk *)((char *)memory - LINE))->taken = 0;
}

int hb_arena(void *memory, size_t bytes, hb_allocator *out) {
    const size_t skip = (LINE - (uintptr_t)memory % LINE) % LINE;
    if (!memory || !out) return hb_fail(HB_ERROR_ARGUMENT, "an arena needs memory");
    if (bytes < skip + 3 * LINE)
        return hb_fail(HB_ERROR_MEMORY, "%llu bytes are too few for an arena", (unsigned long long)bytes);
    arena *a = (arena *)((char *)memory + skip);
    a->bytes = (bytes - skip) / LINE * LINE - LINE;
    chunk *first = (chunk *)((char *)a + LINE);
    first->bytes = a->bytes, first->taken = 0;
    *out = (hb_allocator){sizeof *out, a, arena_allocate, arena_release};
    return HB_OK;
}
