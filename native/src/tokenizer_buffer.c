/* The memory of one call. */
#include "tokenizer.h"

bool hb_room(hb_encoding *e, hb_buffer *b, size_t bytes) {
    if (b->size >= bytes) return true;
    const size_t half = b->size / 2, size = bytes > SIZE_MAX - half - 64 ? bytes : bytes + half + 64;
    uint8_t *p = hb_allocate(&e->t->allocator, size);
    if (!p) {
        e->status = HB_ERROR_MEMORY;
        return false;
    }
    if (b->used) memcpy(p, b->p, b->used);
    hb_release(&e->t->allocator, b->p);
    b->p = p, b->size = size;
    return true;
}

bool hb_append(hb_encoding *e, hb_buffer *b, const void *p, size_t n) {
    if (b->size - b->used < n && !hb_room(e, b, b->used + n)) return false;
    if (n) memcpy(b->p + b->used, p, n);
    b->used += n;
    return true;
}
