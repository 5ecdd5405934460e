#include "path.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#include "memory.h"
#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <io.h>
#include <windows.h>

enum { LONGEST = 4096 }; /* of a path, in UTF-16 */

static int widen(const char *path, wchar_t wide[LONGEST]) {
    if (MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, LONGEST)) return 0;
    errno = GetLastError() == ERROR_INSUFFICIENT_BUFFER ? ENAMETOOLONG : EILSEQ;
    return -1;
}

static int mode_of(const char *path, unsigned *mode) {
    wchar_t wide[LONGEST];
    struct _stat64 status;
    if (widen(path, wide) || _wstat64(wide, &status)) return -1;
    *mode = status.st_mode;
    return 0;
}

static int open_file(const char *path) {
    wchar_t wide[LONGEST];
    return widen(path, wide) ? -1 : _wopen(wide, _O_RDONLY | _O_BINARY | _O_NOINHERIT);
}

FILE *hb_path_create(const char *path) {
    wchar_t wide[LONGEST];
    return widen(path, wide) ? NULL : _wfopen(wide, L"wb");
}

int hb_path_replace(const char *from, const char *to) {
    wchar_t before[LONGEST], after[LONGEST];
    if (widen(from, before) || widen(to, after)) return -1;
    if (MoveFileExW(before, after, MOVEFILE_REPLACE_EXISTING)) return 0;
    errno = EACCES;
    return -1;
}

void hb_path_remove(const char *path) {
    wchar_t wide[LONGEST];
    if (!widen(path, wide)) _wremove(wide);
}

#else

static int mode_of(const char *path, unsigned *mode) {
    struct stat status;
    if (stat(path, &status)) return -1;
    *mode = status.st_mode;
    return 0;
}

static int open_file(const char *path) { return open(path, O_RDONLY | O_CLOEXEC); }

FILE *hb_path_create(const char *path) { return fopen(path, "wb"); }

int hb_path_replace(const char *from, const char *to) { return rename(from, to); }

void hb_path_remove(const char *path) { remove(path); }

#endif

int hb_path_open(const char *path, int *fd) {
    unsigned mode;
    if (!path) return hb_fail(HB_ERROR_ARGUMENT, "no path");
    if (mode_of(path, &mode)) return hb_fail(HB_ERROR_IO, "%s: %s", path, strerror(errno));
    /* opening a pipe would wait for its writer */
    if ((mode & S_IFMT) != S_IFREG) return hb_fail(HB_ERROR_FORMAT, "%s: not a regular file", path);
    *fd = open_file(path);
    return *fd < 0 ? hb_fail(HB_ERROR_IO, "%s: %s", path, strerror(errno)) : HB_OK;
}
