/* Models bound to a machine, their pages of keys and values, and sessions. */
#ifndef HB_SESSION_H
#define HB_SESSION_H

#include <stdatomic.h>

#include "bind.h"
#include "file.h"
#include "thread.h"

/* Before the bytes of a page, on a cache line of its own. */
typedef struct hb_page_head {
    struct hb_page_head *next; /* of the free pages of its class */
    size_t bytes;
    uint32_t references; /* sessions that share it */
} hb_page_head;

enum { HB_MOST_CLASSES = 64 }; /* page sizes that are kept for reuse; others go back to the allocator */

typedef struct hb_page_class {
    size_t bytes;
    hb_page_head *free;
} hb_page_class;

struct hb_model {
    const hb_file *file;
    hb_allocator allocator;
    hb_model_options options;
    hb_pool *pool;
    hb_program *program;
    char *kv;        /* the mode's name, after this struct */
    uint32_t *words; /* of every cache: its sides (hb_kv.types) */
    hb_weight *weights;
    float **slots; /* where base slots begin */
    float *logits; /* of the last record */
    int32_t *ids, *positions, *session_of, *picks;
    hb_kv *kvs;
    uint32_t *fed, *pending; /* of the items of hb_feed_many: ids done, and in this step */
    hb_page_class classes[HB_MOST_CLASSES];
    uint32_t class_count;
    uint32_t session_count; /* alive */
    hb_lock lock;
    _Atomic int cancelled;
};

struct hb_session {
    hb_model *model;
    int32_t *ids;
    void **pages; /* [caches][page_count] */
    uint32_t length, capacity, page_count;
};

/* The word of each of `count` caches for a mode's name. */
int hb_parse_kv(const char *mode, uint32_t count, uint32_t *words);
/* The name of the mode that "auto" means for a file: what KVMD says, else k8v8, or a float mode. */
int hb_automatic_kv(const hb_file *file, int policy, char *name, size_t size);
/* Bytes of page `index` of a cache. */
size_t hb_page_bytes(const hb_cache *cache, uint32_t word, uint32_t index);

/* Makes positions from <= p < to of a session writable; gives up what no row from `from` on can see. */
int hb_reserve_pages(hb_session *s, uint32_t from, uint32_t to);
/* Lets a new session of the same capacity share the pages of another. */
void hb_share_pages(const hb_session *s, hb_session *with);
/* Gives up the pages that hold nothing of the first `length` positions. */
void hb_truncate_pages(hb_session *s, uint32_t length);
/* Whether all that the position after `length` tokens can see is there. */
bool hb_pages_hold(const hb_session *s, uint32_t length);
/* The first position of a cache that is still held. */
uint32_t hb_first_held(const hb_session *s, uint32_t cache, uint32_t length);
/* Zeroes the positions from `start` on of a page. */
void hb_clear_positions(const hb_cache *cache, uint32_t word, uint32_t index, uint32_t start, void *page);
void hb_release_free_pages(hb_model *m);

/* hb_session_create and hb_feed for callers that hold the model's lock. */
int hb_new_session(hb_model *m, const hb_session_options *options, hb_session **out);
int hb_feed_locked(hb_model *m, const hb_feed_item *items, uint32_t count);

#endif
