#include <string.h>

#include "session.h"

enum { LINE = 64 };

size_t hb_page_bytes(const hb_cache *c, uint32_t word, uint32_t index) {
    return c->kv_heads * hb_page_of(word, index, c->k_dim, c->v_dim).head_bytes;
}

static hb_page_head *head_of(void *page) { return (hb_page_head *)((char *)page - LINE); }

static hb_page_class *class_of(hb_model *m, size_t bytes) {
    for (uint32_t i = 0; i < m->class_count; i++)
        if (m->classes[i].bytes == bytes) return &m->classes[i];
    if (m->class_count == HB_MOST_CLASSES) return NULL;
    m->classes[m->class_count] = (hb_page_class){bytes, NULL};
    return &m->classes[m->class_count++];
}

static void *new_page(hb_model *m, size_t bytes) {
    hb_page_class *k = class_of(m, bytes);
    hb_page_head *h = k ? k->free : NULL;
    if (h)
        k->free = h->next;
    else
        h = hb_allocate(&m->allocator, LINE + bytes);
    if (!h) return NULL;
    *h = (hb_page_head){NULL, bytes, 1};
    return memset((char *)h + LINE, 0, bytes);
}

static void drop_page(hb_model *m, void **page) {
    hb_page_head *h = *page ? head_of(*page) : NULL;
    *page = NULL;
    if (!h || --h->references) return;
    hb_page_class *k = class_of(m, h->bytes);
    if (k)
        h->next = k->free, k->free = h;
    else
        hb_release(&m->allocator, h);
}

void hb_release_free_pages(hb_model *m) {
    for (uint32_t i = 0; i < m->class_count; i++)
        while (m->classes[i].free) {
            hb_page_head *h = m->classes[i].free;
            m->classes[i].free = h->next;
            hb_release(&m->allocator, h);
        }
}

static uint32_t first_visible(const hb_cache *c, uint32_t position) {
    return c->window && position + 1 > c->window ? position + 1 - c->window : 0;
}

int hb_reserve_pages(hb_session *s, uint32_t from, uint32_t to) {
    hb_model *m = s->model;
    const uint32_t count = (to + HB_PAGE - 1) / HB_PAGE;
    for (uint32_t c = 0; c < m->file->cache_count; c++) {
        const hb_cache *cache = &m->file->caches[c];
        void **pages = s->pages + (size_t)c * s->page_count;
        const uint32_t visible = first_visible(cache, from) / HB_PAGE;
        const uint32_t start = visible > from / HB_PAGE ? visible : from / HB_PAGE;
        for (uint32_t i = visible; i-- > 0 && pages[i];) drop_page(m, &pages[i]);
        for (uint32_t i = start; i < count; i++) {
            if (pages[i] && head_of(pages[i])->references == 1) continue;
            const size_t bytes = hb_page_bytes(cache, m->words[c], i);
            void *fresh = new_page(m, bytes);
            if (!fresh)
                return hb_fail(HB_ERROR_MEMORY, "no memory for the keys and values of position %u",
                               i * HB_PAGE);
            if (pages[i]) memcpy(fresh, pages[i], bytes);
            drop_page(m, &pages[i]);
            pages[i] = fresh;
        }
    }
    return HB_OK;
}

void hb_truncate_pages(hb_session *s, uint32_t length) {
    for (uint32_t c = 0; c < s->model->file->cache_count; c++)
        for (uint32_t i = (length + HB_PAGE - 1) / HB_PAGE; i < s->page_count; i++)
            drop_page(s->model, &s->pages[(size_t)c * s->page_count + i]);
}

void hb_share_pages(const hb_session *s, hb_session *with) {
    for (size_t i = 0; i < (size_t)s->page_count * s->model->file->cache_count; i++)
        if ((with->pages[i] = s->pages[i])) head_of(s->pages[i])->references++;
}

uint32_t hb_first_held(const hb_session *s, uint32_t cache, uint32_t length) {
    void **pages = s->pages + (size_t)cache * s->page_count;
    uint32_t i = (length + HB_PAGE - 1) / HB_PAGE;
    while (i > 0 && pages[i - 1]) i--;
    return i * HB_PAGE < length ? i * HB_PAGE : length;
}

bool hb_pages_hold(const hb_session *s, uint32_t length) {
    for (uint32_t c = 0; c < s->model->file->cache_count; c++)
        if (hb_first_held(s, c, length) > first_visible(&s->model->file->caches[c], length)) return false;
    return true;
}

/* In a plane of p16 panels, the field of `bits` bits of row r and column k. */
static void clear_field(uint8_t *plane, uint32_t bits, uint32_t cols, uint32_t r, uint32_t k) {
    const uint32_t span = 32 / bits, at = k / span, within = k % span;
    uint8_t *panel = plane + (size_t)(r / 16) * cols * 16 * bits / 8;
    const uint32_t mask = ((1u << bits) - 1) << within / 4 * bits;
    panel[(at * 16 + r % 16) * 4 + within % 4] &= (uint8_t)~mask;
}

/* The same for codes of any width: per panel, the plane of the low bits and then that of the highest. */
static void clear_code(uint8_t *codes, uint32_t bits, uint32_t cols, uint32_t r, uint32_t k) {
    const uint32_t low = bits == 3 ? 2 : bits == 1 ? 0 : bits;
    uint8_t *panel = codes + (size_t)(r / 16) * cols * 16 * bits / 8;
    if (low) clear_field(panel, low, cols, r % 16, k);
    if (bits > low) clear_field(panel + cols * 16 * low / 8, 1, cols, r % 16, k);
}

void hb_clear_positions(const hb_cache *c, uint32_t word, uint32_t index, uint32_t start, void *page) {
    const hb_page kind = hb_page_of(word, index, c->k_dim, c->v_dim);
    const uint32_t k_cols = (c->k_dim + 31) / 32 * 32, v_rows = (c->v_dim + 15) / 16 * 16;
    for (uint32_t head = 0; head < c->kv_heads; head++) {
        uint8_t *p = (uint8_t *)page + head * kind.head_bytes;
        for (uint32_t at = start; at < HB_PAGE; at++) {
            if (kind.packed) {
                for (uint32_t k = 0; k < k_cols; k++) clear_code(p, kind.k->bits, k_cols, at, k);
                for (uint32_t r = 0; r < v_rows; r++)
                    clear_code(p + kind.values, kind.v->bits, HB_PAGE, r, at);
                p[kind.k_scales + at] = p[kind.v_scales + at] = 0;
                if (!(kind.k->rest > 0)) continue;
                for (uint32_t k = 0; k < k_cols; k++) clear_code(p + kind.signs, 1, k_cols, at, k);
                p[kind.sign_scales + at] = 0;
                continue;
            }
            const size_t size = kind.k->bits / 8; /* keys [4][k_dim][16], values [64][v_dim] */
            for (uint32_t k = 0; k < c->k_dim; k++)
                memset(p + ((size_t)(at / 16 * c->k_dim + k) * 16 + at % 16) * size, 0, size);
            memset(p + kind.values + (size_t)at * c->v_dim * size, 0, c->v_dim * size);
        }
    }
}
