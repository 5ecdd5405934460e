#include "map.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#if defined(_WIN32)
#include <io.h>
#define HB_MMAP 0
#define open _open
#define close _close
#define read(fd, to, bytes) _read(fd, to, (unsigned)(bytes))
#define lseek _lseeki64
#define fstat _fstat64
#define HB_OPEN_FLAGS (_O_RDONLY | _O_BINARY)
typedef struct _stat64 file_status;
#else
#include <unistd.h>
#if defined(__wasm__) && !defined(__EMSCRIPTEN__)
#define HB_MMAP 0
#else
#include <sys/mman.h>
#define HB_MMAP 1
#endif
#define HB_OPEN_FLAGS (O_RDONLY | O_CLOEXEC)
typedef struct stat file_status;
#endif

#include "memory.h"

static int read_all(int fd, uint64_t offset, uint64_t bytes, const hb_allocator *a, hb_map *out) {
    if (bytes > SIZE_MAX / 2) return hb_fail(HB_ERROR_MEMORY, "the file does not fit into memory");
    char *to = out->copy = hb_allocate(a, (size_t)bytes);
    if (!to) return hb_fail(HB_ERROR_MEMORY, "no memory for %llu bytes", (unsigned long long)bytes);
    if (lseek(fd, (off_t)offset, SEEK_SET) < 0)
        return hb_fail(HB_ERROR_IO, "cannot seek: %s", strerror(errno));
    for (uint64_t at = 0; at < bytes;) {
        const uint64_t want = bytes - at < 1 << 30 ? bytes - at : 1 << 30;
        const int64_t got = (int64_t)read(fd, to + at, (size_t)want);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0)
            return hb_fail(HB_ERROR_IO, "cannot read: %s", got ? strerror(errno) : "the file ends early");
        at += (uint64_t)got;
    }
    out->data = (const uint8_t *)to, out->bytes = bytes;
    return HB_OK;
}

int hb_map_fd(int fd, uint64_t offset, uint64_t bytes, const hb_allocator *a, hb_map *out) {
    file_status status;
    memset(out, 0, sizeof *out);
    if (fstat(fd, &status)) return hb_fail(HB_ERROR_IO, "cannot read: %s", strerror(errno));
    if ((status.st_mode & S_IFMT) != S_IFREG) return hb_fail(HB_ERROR_FORMAT, "not a regular file");
    const uint64_t all = (uint64_t)status.st_size;
    if (offset > all || bytes > all - offset) return hb_fail(HB_ERROR_ARGUMENT, "the file ends before that");
    if (!bytes) bytes = all - offset;
    if (bytes < 64)
        return hb_fail(HB_ERROR_FORMAT, "%llu bytes is too short for a .hb file", (unsigned long long)bytes);
    int result = HB_ERROR_IO;
#if HB_MMAP
    if (offset % 64 == 0 && bytes <= SIZE_MAX / 2) {
        const uint64_t page = 1 << 16; /* a multiple of every page size that matters */
        const uint64_t skip = offset % page;
        out->mapping_bytes = (size_t)(bytes + skip);
        out->mapping = mmap(NULL, out->mapping_bytes, PROT_READ, MAP_SHARED, fd, (off_t)(offset - skip));
        if (out->mapping == MAP_FAILED) {
            out->mapping = NULL;
        } else {
            out->data = (const uint8_t *)out->mapping + skip, out->bytes = bytes;
            return HB_OK;
        }
    }
#endif
    result = read_all(fd, offset, bytes, a, out);
    if (result) hb_unmap(out, a);
    return result;
}

int hb_map_path(const char *path, const hb_allocator *a, hb_map *out) {
    file_status status;
    memset(out, 0, sizeof *out);
    if (!path) return hb_fail(HB_ERROR_ARGUMENT, "no path");
#if defined(_WIN32)
    if (_stat64(path, &status)) return hb_fail(HB_ERROR_IO, "%s: %s", path, strerror(errno));
#else
    if (stat(path, &status)) return hb_fail(HB_ERROR_IO, "%s: %s", path, strerror(errno));
#endif
    /* opening a pipe would wait for its writer */
    if ((status.st_mode & S_IFMT) != S_IFREG) return hb_fail(HB_ERROR_FORMAT, "%s: not a regular file", path);
    const int fd = open(path, HB_OPEN_FLAGS);
    if (fd < 0) return hb_fail(HB_ERROR_IO, "%s: %s", path, strerror(errno));
    const int result = hb_map_fd(fd, 0, 0, a, out);
    close(fd);
    return result;
}

int hb_map_memory(const void *memory, uint64_t bytes, const hb_allocator *a, hb_map *out) {
    memset(out, 0, sizeof *out);
    if (!memory) return hb_fail(HB_ERROR_ARGUMENT, "no memory to open");
    if (bytes < 64)
        return hb_fail(HB_ERROR_FORMAT, "%llu bytes is too short for a .hb file", (unsigned long long)bytes);
    out->data = memory, out->bytes = bytes;
    if ((uintptr_t)memory % 64 == 0) return HB_OK;
    out->copy = bytes <= SIZE_MAX / 2 ? hb_allocate(a, (size_t)bytes) : NULL;
    if (!out->copy) return hb_fail(HB_ERROR_MEMORY, "no memory for %llu bytes", (unsigned long long)bytes);
    memcpy(out->copy, memory, (size_t)bytes);
    out->data = out->copy;
    return HB_OK;
}

void hb_unmap(hb_map *map, const hb_allocator *a) {
#if HB_MMAP
    if (map->mapping) munmap(map->mapping, map->mapping_bytes);
#endif
    hb_release(a, map->copy);
    memset(map, 0, sizeof *map);
}
