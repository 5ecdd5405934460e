#include <string.h>

#include "file.h"

typedef struct entry {
    const uint8_t *key, *value;
    uint32_t type, key_bytes, value_bytes;
} entry;

static const hb_key_rule keys[] = HB_KEY_TABLE;

uint32_t hb_utf8_next(const uint8_t **at) {
    const uint8_t *p = *at;
    const int more = *p < 0x80 ? 0 : *p < 0xe0 ? 1 : *p < 0xf0 ? 2 : 3;
    uint32_t c = more ? *p & (0x3fu >> more) : *p;
    for (int i = 1; i <= more; i++) c = c << 6 | (p[i] & 63);
    *at = p + more + 1;
    return c;
}

bool hb_utf8_is_valid(const uint8_t *p, size_t bytes) {
    const uint8_t *const end = p + bytes;
    while (p < end) {
        if (*p < 0x80) {
            p++;
            continue;
        }
        if (*p < 0xc2 || *p > 0xf4) return false;
        const int more = *p < 0xe0 ? 1 : *p < 0xf0 ? 2 : 3;
        if (end - p <= more) return false;
        for (int i = 1; i <= more; i++)
            if ((p[i] & 0xc0) != 0x80) return false;
        const uint32_t c = hb_utf8_next(&p);
        if (c < (more == 2 ? 0x800u : more == 3 ? 0x10000u : 0x80u) || c > 0x10ffff || c - 0xd800 < 0x800)
            return false;
    }
    return true;
}

static bool value_is_valid(const entry *e) {
    const uint8_t *v = e->value;
    switch (e->type) {
        case HB_META_BOOL:
            return e->value_bytes == 1 && *v <= 1;
        case HB_META_INT:
        case HB_META_FLOAT:
            return e->value_bytes == 8;
        case HB_META_STR:
            return hb_utf8_is_valid(v, e->value_bytes);
        case HB_META_BYTES:
            return true;
        case HB_META_INTS:
            return e->value_bytes % 8 == 0;
        case HB_META_FLOATS: /* an empty list is stored as ints */
            return e->value_bytes && e->value_bytes % 8 == 0;
        case HB_META_STRS: {
            uint32_t at = 0, n;
            while (at < e->value_bytes) {
                if (e->value_bytes - at < 4) return false;
                memcpy(&n, v + at, 4);
                at += 4;
                if (n > e->value_bytes - at || !hb_utf8_is_valid(v + at, n)) return false;
                at += n;
            }
            return e->value_bytes > 0;
        }
        default:
            return false;
    }
}

/* The entry at *at, which moves behind it; false when it is cut off or its padding is not zero. */
static bool next_entry(hb_span meta, uint64_t *at, entry *e) {
    uint16_t type, key_bytes;
    const uint8_t *p = meta.data + *at;
    if (meta.bytes - *at < 8) return false;
    memcpy(&type, p, 2), memcpy(&key_bytes, p + 2, 2), memcpy(&e->value_bytes, p + 4, 4);
    e->type = type, e->key_bytes = key_bytes, e->key = p + 8, e->value = e->key + key_bytes;
    *at += 8;
    if ((uint64_t)key_bytes + e->value_bytes > meta.bytes - *at) return false;
    *at += (uint64_t)key_bytes + e->value_bytes;
    for (; *at % 8; ++*at)
        if (*at >= meta.bytes || meta.data[*at]) return false;
    return true;
}

static int compare(const uint8_t *a, size_t n, const uint8_t *b, size_t m) {
    const int order = memcmp(a, b, n < m ? n : m);
    return order ? order : n < m ? -1 : n > m;
}

int hb_check_metadata(hb_span meta) {
    entry e, last = {0};
    uint32_t seen = 0;
    for (uint64_t at = 0; at < meta.bytes; last = e) {
        if (!next_entry(meta, &at, &e) || !e.key_bytes || !hb_utf8_is_valid(e.key, e.key_bytes) ||
            !value_is_valid(&e))
            return hb_fail(HB_ERROR_FORMAT, "metadata is damaged");
        if (last.key && compare(last.key, last.key_bytes, e.key, e.key_bytes) >= 0)
            return hb_fail(HB_ERROR_FORMAT, "metadata keys are not sorted and unique");
        for (uint32_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
            if (compare((const uint8_t *)keys[i].key, strlen(keys[i].key), e.key, e.key_bytes)) continue;
            seen |= 1u << i;
            /* an empty list has the type ints, whatever it is a list of */
            if (e.type != keys[i].type)
                return hb_fail(HB_ERROR_FORMAT, "metadata %s is of another type", keys[i].key);
        }
    }
    for (uint32_t i = 0; i < sizeof keys / sizeof keys[0]; i++)
        if (keys[i].required && !(seen >> i & 1))
            return hb_fail(HB_ERROR_FORMAT, "metadata lacks %s", keys[i].key);
    return HB_OK;
}

int hb_find_metadata(const hb_file *file, const char *key, hb_span *value) {
    entry e;
    for (uint64_t at = 0; at < file->meta.bytes && next_entry(file->meta, &at, &e);) {
        if (compare((const uint8_t *)key, strlen(key), e.key, e.key_bytes)) continue;
        *value = (hb_span){e.value, e.value_bytes};
        return (int)e.type;
    }
    return 0;
}

int hb_metadata_text(const hb_file *file, const char *key, const char **text, size_t *bytes) {
    hb_span v;
    if (hb_find_metadata(file, key, &v) != HB_META_STR) return 0;
    *text = (const char *)v.data, *bytes = (size_t)v.bytes;
    return 1;
}

int hb_metadata_int(const hb_file *file, const char *key, int64_t *value) {
    hb_span v;
    const int type = hb_find_metadata(file, key, &v);
    if (type == HB_META_BOOL) *value = *v.data;
    if (type == HB_META_INT) memcpy(value, v.data, 8);
    return type == HB_META_BOOL || type == HB_META_INT;
}

int hb_metadata_float(const hb_file *file, const char *key, double *value) {
    hb_span v;
    if (hb_find_metadata(file, key, &v) != HB_META_FLOAT) return 0;
    memcpy(value, v.data, 8);
    return 1;
}

int hb_metadata_ints(const hb_file *file, const char *key, int64_t *values, size_t capacity, size_t *count) {
    hb_span v;
    if (hb_find_metadata(file, key, &v) != HB_META_INTS) return 0;
    *count = (size_t)(v.bytes / 8);
    const size_t n = *count < capacity ? *count : capacity;
    if (n) memcpy(values, v.data, n * 8);
    return 1;
}
