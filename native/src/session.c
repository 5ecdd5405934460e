#include "session.h"

#include <string.h>

#include "exec.h"

int hb_new_session(hb_model *m, const hb_session_options *given, hb_session **out) {
    HB_OPTIONS(hb_session_options, given);
    const uint32_t most = m->options.positions;
    *out = NULL;
    if (options.positions > most || options.reserve > most)
        return hb_fail(HB_ERROR_ARGUMENT, "the model holds %u positions", most);
    if (!options.positions) options.positions = most;
    hb_session v = {.model = m, .capacity = options.positions};
    v.page_count = (v.capacity + HB_PAGE - 1) / HB_PAGE;
    hb_block b = {NULL, 0};
    for (int pass = 0;; pass++) {
        b.used = 0;
        hb_session *s = hb_take(&b, 1, sizeof *s);
        v.ids = hb_take(&b, v.capacity, sizeof *v.ids);
        v.pages = hb_take(&b, (size_t)v.page_count * m->file->cache_count, sizeof *v.pages);
        if (!pass) {
            if (!(b.base = hb_allocate(&m->allocator, b.used)))
                return hb_fail(HB_ERROR_MEMORY, "no memory for a session of %u positions", v.capacity);
            continue;
        }
        for (size_t i = 0; i < (size_t)v.page_count * m->file->cache_count; i++) v.pages[i] = NULL;
        *s = v;
        m->session_count++;
        const int status = options.reserve ? hb_reserve_pages(s, 0, options.reserve) : HB_OK;
        if (!status) {
            *out = s;
            return HB_OK;
        }
        hb_truncate_pages(s, 0);
        m->session_count--;
        hb_release(&m->allocator, s);
        return status;
    }
}

int hb_session_create(hb_model *m, const hb_session_options *options, hb_session **out) {
    hb_lock_take(&m->lock);
    const int status = hb_new_session(m, options, out);
    hb_lock_give(&m->lock);
    return status;
}

void hb_session_free(hb_session *s) {
    if (!s) return;
    hb_model *m = s->model;
    hb_lock_take(&m->lock);
    hb_truncate_pages(s, 0);
    m->session_count--;
    hb_release(&m->allocator, s);
    hb_lock_give(&m->lock);
}

uint32_t hb_session_position(const hb_session *s) { return s->length; }
const int32_t *hb_session_ids(const hb_session *s) { return s->ids; }

static int check_items(const hb_model *m, const hb_feed_item *items, uint32_t count) {
    if (!count || count > m->options.sessions)
        return hb_fail(HB_ERROR_ARGUMENT, "%u sessions: a step of this model takes 1 to %u", count,
                       m->options.sessions);
    for (uint32_t i = 0; i < count; i++) {
        const hb_session *s = items[i].session;
        if (!s || s->model != m || !items[i].count || !items[i].ids)
            return hb_fail(HB_ERROR_ARGUMENT,
                           "item %u: a session of this model and at least one token are needed", i);
        for (uint32_t j = 0; j < i; j++)
            if (items[j].session == s)
                return hb_fail(HB_ERROR_ARGUMENT, "items %u and %u are one session", j, i);
        if (items[i].count > s->capacity - s->length)
            return hb_fail(HB_ERROR_POSITION, "%llu tokens do not fit the session's %u positions",
                           (unsigned long long)s->length + items[i].count, s->capacity);
        for (uint32_t t = 0; t < items[i].count; t++)
            if ((uint32_t)items[i].ids[t] >= m->file->vocab_size)
                return hb_fail(HB_ERROR_ID, "token id %d is outside 0..%u", (int)items[i].ids[t],
                               m->file->vocab_size - 1);
    }
    return HB_OK;
}

/* Fills a step with as many rows as fit, item after item; how many. */
static uint32_t fill_step(hb_model *m, const hb_feed_item *items, uint32_t count, hb_step *step) {
    uint32_t rows = 0, picks = 0;
    for (uint32_t i = 0; i < count; i++) {
        const hb_session *s = items[i].session;
        const uint32_t left = items[i].count - m->fed[i], room = m->options.rows - rows;
        const uint32_t n = m->pending[i] = left < room ? left : room;
        for (uint32_t t = 0; t < n; t++) {
            m->ids[rows + t] = items[i].ids[m->fed[i] + t];
            m->positions[rows + t] = (int32_t)(s->length + t);
            m->session_of[rows + t] = (int32_t)i;
        }
        rows += n;
        if (n && n == left && items[i].logits) m->picks[picks++] = (int32_t)rows - 1;
        m->kvs[i] = (hb_kv){(void *const *)s->pages, m->words, s->page_count};
    }
    *step = (hb_step){rows,   picks, m->ids, m->positions, m->session_of, m->picks, (float **)m->slots,
                      m->kvs, count};
    return rows;
}

int hb_feed_locked(hb_model *m, const hb_feed_item *items, uint32_t count) {
    int status = check_items(m, items, count);
    if (status) return status;
    memset(m->fed, 0, count * sizeof *m->fed);
    const size_t width = m->file->slots[m->file->ops[m->file->op_count - 1].out[0]].width;
    const size_t stride =
        m->file->slots[m->file->slots[m->file->ops[m->file->op_count - 1].out[0]].base].width;
    for (hb_step step; fill_step(m, items, count, &step);) {
        for (uint32_t i = 0; i < count && !status; i++) {
            hb_session *s = items[i].session;
            if (m->pending[i]) status = hb_reserve_pages(s, s->length, s->length + m->pending[i]);
        }
        if (status) return status;
        status = hb_execute(m->program, &step, 0, m->file->op_count);
        if (status) return hb_fail(status, "%s", hb_status_text(status));
        for (uint32_t i = 0, pick = 0; i < count; i++) {
            hb_session *s = items[i].session;
            if (!m->pending[i]) continue;
            memcpy(s->ids + s->length, items[i].ids + m->fed[i], m->pending[i] * sizeof *s->ids);
            s->length += m->pending[i], m->fed[i] += m->pending[i];
            if (m->fed[i] == items[i].count && items[i].logits)
                memcpy(items[i].logits, m->logits + pick++ * stride, width * sizeof(float));
        }
    }
    return HB_OK;
}

int hb_feed(hb_session *s, const int32_t *ids, uint32_t count, float *logits) {
    const hb_feed_item item = {sizeof item, s, ids, count, logits};
    if (!s) return hb_fail(HB_ERROR_ARGUMENT, "no session");
    hb_lock_take(&s->model->lock);
    const int status = hb_feed_locked(s->model, &item, 1);
    hb_lock_give(&s->model->lock);
    return status;
}

int hb_feed_many(hb_model *m, const hb_feed_item *items, uint32_t count) {
    if (!m || !items || !count) return hb_fail(HB_ERROR_ARGUMENT, "nothing to feed");
    if (items->size != sizeof *items) return hb_fail(HB_ERROR_ARGUMENT, "hb_feed_item has another size here");
    hb_lock_take(&m->lock);
    const int status = hb_feed_locked(m, items, count);
    hb_lock_give(&m->lock);
    return status;
}

int hb_session_rewind(hb_session *s, uint32_t count) {
    hb_model *m = s->model;
    if (count > s->length)
        return hb_fail(HB_ERROR_ARGUMENT, "cannot rewind %u tokens: %u were fed", count, s->length);
    if (!count) return HB_OK;
    hb_lock_take(&m->lock);
    int status = HB_OK;
    const uint32_t length = s->length - count;
    s->length = length;
    hb_truncate_pages(s, length);
    if (length && !hb_pages_hold(s, length)) { /* a window let go of what is seen again: feed it again */
        const hb_feed_item item = {sizeof item, s, s->ids, length, NULL};
        hb_truncate_pages(s, 0);
        s->length = 0;
        status = hb_feed_locked(m, &item, 1);
    }
    hb_lock_give(&m->lock);
    return status;
}

int hb_session_fork(hb_session *s, hb_session **out) {
    hb_model *m = s->model;
    const hb_session_options options = {sizeof options, s->capacity, 0};
    hb_lock_take(&m->lock);
    const int status = hb_new_session(m, &options, out);
    if (!status) {
        hb_share_pages(s, *out);
        (*out)->length = s->length;
        memcpy((*out)->ids, s->ids, s->length * sizeof *s->ids);
    }
    hb_lock_give(&m->lock);
    return status;
}
