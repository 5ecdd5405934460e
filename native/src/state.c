/* Session files: the same bytes as the Python runtime's (runtime/session.py). */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "map.h"
#include "path.h"
#include "session.h"
#include "sha256.h"

static const uint8_t magic[8] = {0x89, 'h', 'b', 's', '\r', '\n', 0x1a, '\n'};
enum { VERSION = 3, HEAD = 8 + 32 + 4 + 8 + 4 };

typedef struct writer {
    hb_write *write;
    void *context;
    hb_sha256 digest;
    int status;
} writer;

static void put(writer *w, const void *data, size_t bytes) {
    if (w->status || !bytes) return;
    hb_sha256_add(&w->digest, data, bytes);
    if (w->write(w->context, data, bytes)) w->status = HB_ERROR_IO;
}

static int write_session(hb_session *s, writer *w) {
    const hb_model *m = s->model;
    const uint32_t version = VERSION, kv_bytes = (uint32_t)strlen(m->kv),
                   pages = (s->length + HB_PAGE - 1) / HB_PAGE;
    const uint64_t position = s->length;
    uint8_t digest[32];
    hb_sha256_start(&w->digest);
    put(w, magic, 8), put(w, m->file->header->digest, 32), put(w, &version, 4), put(w, &position, 8);
    put(w, &kv_bytes, 4), put(w, m->kv, kv_bytes), put(w, s->ids, s->length * sizeof *s->ids);
    for (uint32_t c = 0; c < m->file->cache_count; c++) {
        const uint64_t first = hb_first_held(s, c, s->length) / HB_PAGE;
        put(w, &first, 8);
        for (uint32_t i = (uint32_t)first; i < pages; i++) {
            void *page = s->pages[(size_t)c * s->page_count + i];
            const size_t bytes = hb_page_bytes(&m->file->caches[c], m->words[c], i);
            if (s->length >= (i + 1) * HB_PAGE) {
                put(w, page, bytes);
                continue;
            }
            void *copy = hb_allocate(&m->allocator, bytes);
            if (!copy) return hb_fail(HB_ERROR_MEMORY, "no memory to save a session");
            memcpy(copy, page, bytes);
            hb_clear_positions(&m->file->caches[c], m->words[c], i, s->length - i * HB_PAGE, copy);
            put(w, copy, bytes);
            hb_release(&m->allocator, copy);
        }
    }
    hb_sha256_end(&w->digest, digest);
    if (!w->status && w->write(w->context, digest, 32)) w->status = HB_ERROR_IO;
    return w->status ? hb_fail(w->status, "the session could not be written") : HB_OK;
}

int hb_session_write(hb_session *s, hb_write *write, void *context) {
    writer w = {write, context, {{0}, 0, {0}}, HB_OK};
    hb_lock_take(&s->model->lock);
    const int status = write_session(s, &w);
    hb_lock_give(&s->model->lock);
    return status;
}

static int write_file(void *context, const void *data, size_t bytes) {
    return fwrite(data, 1, bytes, context) != bytes;
}

int hb_session_save(hb_session *s, const char *path) {
    const size_t n = strlen(path);
    char *aside = hb_allocate(&s->model->allocator, n + 6);
    if (!aside) return hb_fail(HB_ERROR_MEMORY, "no memory to save a session");
    memcpy(aside, path, n);
    memcpy(aside + n, ".part", 6);
    FILE *f = hb_path_create(aside);
    int status = f ? hb_session_write(s, write_file, f) : HB_ERROR_IO;
    if (f && fclose(f) && !status) status = HB_ERROR_IO;
    if (!status && hb_path_replace(aside, path)) status = HB_ERROR_IO;
    if (status) {
        if (status == HB_ERROR_IO) hb_fail(status, "%s: cannot write: %s", path, strerror(errno));
        hb_path_remove(aside);
    }
    hb_release(&s->model->allocator, aside);
    return status;
}

/* The pages of every cache from p; whether they are exactly what is there. */
static int read_pages(hb_session *s, const uint8_t *p, const uint8_t *end, uint32_t position) {
    const hb_model *m = s->model;
    const uint32_t pages = (position + HB_PAGE - 1) / HB_PAGE;
    for (uint32_t c = 0; c < m->file->cache_count; c++) {
        uint64_t first;
        if (end - p < 8) return 0;
        memcpy(&first, p, 8), p += 8;
        if (first > position / HB_PAGE) return 0;
        for (uint32_t i = 0; i < pages; i++) {
            void *page = s->pages[(size_t)c * s->page_count + i];
            const size_t bytes = hb_page_bytes(&m->file->caches[c], m->words[c], i);
            if (i < first) continue;
            if ((size_t)(end - p) < bytes || !page) return 0;
            memcpy(page, p, bytes), p += bytes;
        }
    }
    return p == end && hb_pages_hold(s, position);
}

static int read_session(hb_model *m, const uint8_t *data, uint64_t bytes, const hb_session_options *given,
                        hb_session **out) {
    uint32_t version, kv_bytes;
    uint64_t position;
    uint8_t found[32];
    if (bytes < HEAD + 32 || memcmp(data, magic, 8)) return hb_fail(HB_ERROR_FORMAT, "not a session file");
    memcpy(&version, data + 40, 4), memcpy(&position, data + 44, 8), memcpy(&kv_bytes, data + 52, 4);
    if (version != VERSION)
        return hb_fail(HB_ERROR_FORMAT, "session version %u is not readable here", version);
    hb_digest(data, (size_t)bytes - 32, found);
    if (memcmp(found, data + bytes - 32, 32))
        return hb_fail(HB_ERROR_FORMAT, "the session is damaged (its digest does not match)");
    if (memcmp(data + 8, m->file->header->digest, 32))
        return hb_fail(HB_ERROR_FORMAT, "the session belongs to another model file");
    if (kv_bytes > bytes - 32 - HEAD || kv_bytes != strlen(m->kv) || memcmp(data + HEAD, m->kv, kv_bytes))
        return hb_fail(HB_ERROR_FORMAT, "the session was saved with another kv mode than %s", m->kv);
    const uint8_t *p = data + HEAD + kv_bytes, *const end = data + bytes - 32;
    if (position > m->options.positions || position > (uint64_t)(end - p) / 4)
        return hb_fail(HB_ERROR_FORMAT, "the session does not fit the model");
    int status = hb_new_session(m, given, out);
    if (status) return status;
    hb_session *s = *out;
    bool fits = position <= s->capacity;
    if (fits) {
        memcpy(s->ids, p, (size_t)position * 4);
        for (uint32_t i = 0; i < position; i++) fits = fits && (uint32_t)s->ids[i] < m->file->vocab_size;
        status = hb_reserve_pages(s, 0, (uint32_t)position);
    }
    if (!status && (!fits || !read_pages(s, p + position * 4, end, (uint32_t)position)))
        status = hb_fail(HB_ERROR_FORMAT, "the session does not fit the model");
    if (!status) s->length = (uint32_t)position;
    return status;
}

int hb_session_read(hb_model *m, const void *data, uint64_t bytes, const hb_session_options *options,
                    hb_session **out) {
    *out = NULL;
    hb_lock_take(&m->lock);
    const int status = read_session(m, data, bytes, options, out);
    hb_lock_give(&m->lock);
    if (status) hb_session_free(*out), *out = NULL;
    return status;
}

int hb_session_load(hb_model *m, const char *path, const hb_session_options *options, hb_session **out) {
    hb_map map;
    *out = NULL;
    int status = hb_map_path(path, &m->allocator, &map);
    if (status) return status;
    status = hb_session_read(m, map.data, map.bytes, options, out);
    hb_unmap(&map, &m->allocator);
    return status;
}
