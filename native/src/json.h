/* Walking JSON in place: no tree, no memory. What is not JSON reads as absent. */
#ifndef HB_JSON_H
#define HB_JSON_H

#include <stdbool.h>
#include <stddef.h>

/* A value, or the rest of an object or a list. */
typedef struct hb_json {
    const char *p, *end;
} hb_json;

/* What comes first in an object or a list. */
hb_json hb_json_first(hb_json container);
/* The next pair of an object or item of a list; false at its end. */
bool hb_json_pair(hb_json *rest, hb_json *key, hb_json *value);
bool hb_json_item(hb_json *rest, hb_json *item);
/* The value of an object's key. */
bool hb_json_get(hb_json object, const char *key, hb_json *value);
/* A string without escapes, with a zero; false for anything else or when it does not fit. */
bool hb_json_text(hb_json value, char *to, size_t size);
double hb_json_number(hb_json value);

#endif
