/* An open, checked file: SPEC.md sections 2 to 4 and 9. */
#ifndef HB_FILE_H
#define HB_FILE_H

#include <stdbool.h>

#include "halfbyte_program.h"
#include "map.h"
#include "memory.h"

typedef struct hb_span {
    const uint8_t *data;
    uint64_t bytes;
} hb_span;

struct hb_file {
    hb_allocator allocator;
    hb_map map;
    const hb_header *header;
    const hb_section *sections;
    hb_span meta, data;
    const hb_op *ops;
    const hb_slot *slots;
    const hb_cache *caches;
    const hb_tensor *tensors;
    const char *names;
    uint32_t op_count, slot_count, cache_count, tensor_count, names_length;
    uint32_t vocab_size, context_length;
};

/* The bytes of a section other than DATA; empty when it is absent. */
hb_span hb_find_section(const hb_file *file, const char *kind);
/* The same after checking its digest; HB_ERROR_FORMAT when it is damaged. */
int hb_read_section(const hb_file *file, const char *kind, hb_span *out);

hb_weight hb_weight_of(const hb_file *file, uint32_t tensor);

/* The value of a metadata key, and its HB_META_* type; 0 when it is absent. */
int hb_find_metadata(const hb_file *file, const char *key, hb_span *value);
/* Refuses what section 4 forbids, and known keys of another type. */
int hb_check_metadata(hb_span meta);

bool hb_utf8_is_valid(const uint8_t *p, size_t bytes);
/* The next code point of valid UTF-8. */
uint32_t hb_utf8_next(const uint8_t **p);

/* Refuses any program that could read or write outside its operands (SPEC.md 9.2, 5 and 6). */
int hb_check_program(const hb_file *file);

#endif
