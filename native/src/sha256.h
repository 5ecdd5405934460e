/* SHA-256 (FIPS 180-4). */
#ifndef HB_SHA256_H
#define HB_SHA256_H

#include <stddef.h>
#include <stdint.h>

typedef struct hb_sha256 {
    uint32_t state[8];
    uint64_t bytes;
    uint8_t block[64];
} hb_sha256;

void hb_sha256_start(hb_sha256 *s);
void hb_sha256_add(hb_sha256 *s, const void *data, size_t bytes);
void hb_sha256_end(hb_sha256 *s, uint8_t digest[32]);

#endif
