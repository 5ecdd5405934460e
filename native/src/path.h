/* Files by path. A path is UTF-8 on every system. */
#ifndef HB_PATH_H
#define HB_PATH_H

#include <stdio.h>

/* A descriptor to read a regular file with; a status, with hb_last_error. */
int hb_path_open(const char *path, int *fd);

/* These say why they failed in errno. */
FILE *hb_path_create(const char *path);
int hb_path_replace(const char *from, const char *to); /* 0 when done */
void hb_path_remove(const char *path);

#endif
