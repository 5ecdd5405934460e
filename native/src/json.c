#include "json.h"

#include <stdlib.h>
#include <string.h>

static hb_json skip_space(hb_json v) {
    while (v.p < v.end && (*v.p == ' ' || *v.p == '\t' || *v.p == '\n' || *v.p == '\r')) v.p++;
    return v;
}

/* Behind the value that starts at v.p; NULL when it does not end. */
static const char *value_end(hb_json v) {
    const char *p = v.p;
    int depth = 0;
    for (bool first = true; p < v.end; first = false) {
        if (*p == '"') {
            for (p++; p < v.end && *p != '"'; p++)
                if (*p == '\\') p++;
            if (p >= v.end) return NULL;
            p++;
            if (!depth) return p;
            continue;
        }
        if (*p == '{' || *p == '[') {
            depth++;
        } else if (*p == '}' || *p == ']') {
            if (!depth) return first ? NULL : p;
            if (!--depth) return p + 1;
        } else if (!depth &&
                   (*p == ',' || *p == ':' || *p == ' ' || *p == '\n' || *p == '\t' || *p == '\r')) {
            return first ? NULL : p;
        }
        p++;
    }
    return depth ? NULL : p;
}

static bool take_value(hb_json *rest, hb_json *value) {
    *rest = skip_space(*rest);
    const char *end = rest->p < rest->end ? value_end(*rest) : NULL;
    if (!end) return false;
    *value = (hb_json){rest->p, end};
    rest->p = end;
    return true;
}

static bool take_mark(hb_json *rest, char mark) {
    *rest = skip_space(*rest);
    if (rest->p >= rest->end || *rest->p != mark) return false;
    rest->p++;
    return true;
}

hb_json hb_json_first(hb_json v) {
    v = skip_space(v);
    if (v.p < v.end && (*v.p == '{' || *v.p == '['))
        v.p++;
    else
        v.p = v.end;
    return v;
}

bool hb_json_item(hb_json *rest, hb_json *item) {
    if (!take_value(rest, item)) return false;
    take_mark(rest, ',');
    return true;
}

bool hb_json_pair(hb_json *rest, hb_json *key, hb_json *value) {
    return take_value(rest, key) && take_mark(rest, ':') && hb_json_item(rest, value);
}

bool hb_json_get(hb_json object, const char *name, hb_json *value) {
    hb_json key;
    const size_t n = strlen(name);
    for (hb_json at = hb_json_first(object); hb_json_pair(&at, &key, value);)
        if ((size_t)(key.end - key.p) == n + 2 && !memcmp(key.p + 1, name, n)) return true;
    return false;
}

bool hb_json_text(hb_json v, char *to, size_t size) {
    const size_t n = (size_t)(v.end - v.p);
    if (n < 2 || *v.p != '"' || n - 2 >= size || memchr(v.p, '\\', n)) return false;
    memcpy(to, v.p + 1, n - 2);
    to[n - 2] = 0;
    return true;
}

double hb_json_number(hb_json v) {
    char text[64];
    const size_t n = (size_t)(v.end - v.p);
    if (n >= sizeof text) return 1e300;
    memcpy(text, v.p, n);
    text[n] = 0;
    return strtod(text, NULL);
}
