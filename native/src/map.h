/* A file as bytes: mapped read-only where the system can, else read into memory. */
#ifndef HB_MAP_H
#define HB_MAP_H

#include "halfbyte.h"

typedef struct hb_map {
    const uint8_t *data; /* aligned to 64 */
    uint64_t bytes;
    void *mapping; /* what to unmap, or NULL */
    size_t mapping_bytes;
    void *copy; /* what to release, or NULL */
} hb_map;

int hb_map_path(const char *path, const hb_allocator *a, hb_map *out);
int hb_map_fd(int fd, uint64_t offset, uint64_t bytes, const hb_allocator *a, hb_map *out);
int hb_map_memory(const void *memory, uint64_t bytes, const hb_allocator *a, hb_map *out);
void hb_unmap(hb_map *map, const hb_allocator *a);

#endif
