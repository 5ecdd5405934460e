#include "map.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <io.h>
#include <windows.h>
#define HB_MMAP 1
#define close _close
#define read(fd, to, bytes) _read(fd, to, (unsigned)(bytes))
#define lseek _lseeki64
#define fstat _fstat64
typedef struct _stat64 file_status;
typedef int64_t file_offset; /* off_t may have 32 bits there */
#else
#include <unistd.h>
#if defined(__wasm__) && !defined(__EMSCRIPTEN__)
#define HB_MMAP 0
#else
#include <sys/mman.h>
#define HB_MMAP 1
#endif
typedef struct stat file_status;
typedef off_t file_offset;
#endif

#include "memory.h"
#include "path.h"

#if HB_MMAP
/* `bytes` bytes from `offset`, a multiple of 65536, or NULL. */
static void *map_part(int fd, uint64_t offset, size_t bytes) {
#if defined(_WIN32)
    const HANDLE section = CreateFileMappingW((HANDLE)_get_osfhandle(fd), NULL, PAGE_READONLY, 0, 0, NULL);
    if (!section) return NULL;
    void *at = MapViewOfFile(section, FILE_MAP_READ, (DWORD)(offset >> 32), (DWORD)offset, bytes);
    CloseHandle(section); /* the view keeps what it needs */
    return at;
#else
    void *at = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, (file_offset)offset);
    return at == MAP_FAILED ? NULL : at;
#endif
}
#endif

static int read_all(int fd, uint64_t offset, uint64_t bytes, const hb_allocator *a, hb_map *out) {
    if (bytes > SIZE_MAX / 2) return hb_fail(HB_ERROR_MEMORY, "the file does not fit into memory");
    char *to = out->copy = hb_allocate(a, (size_t)bytes);
    if (!to) return hb_fail(HB_ERROR_MEMORY, "no memory for %llu bytes", (unsigned long long)bytes);
    if (lseek(fd, (file_offset)offset, SEEK_SET) < 0)
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
        /* a multiple of every page size that matters, and what Windows asks for */
        const uint64_t page = 1 << 16, skip = offset % page;
        out->mapping_bytes = (size_t)(bytes + skip);
        out->mapping = map_part(fd, offset - skip, out->mapping_bytes);
        if (out->mapping) {
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
    int fd;
    memset(out, 0, sizeof *out);
    int result = hb_path_open(path, &fd);
    if (result) return result;
    result = hb_map_fd(fd, 0, 0, a, out);
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
#if defined(_WIN32)
    if (map->mapping) UnmapViewOfFile(map->mapping);
#elif HB_MMAP
    if (map->mapping) munmap(map->mapping, map->mapping_bytes);
#endif
    hb_release(a, map->copy);
    memset(map, 0, sizeof *map);
}
