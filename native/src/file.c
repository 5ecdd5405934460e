#include "file.h"

#include <string.h>

#include "halfbyte_tokenizer.h"
#include "matrix.h"
#include "sha256.h"

static const uint8_t magic[8] = HB_MAGIC;
static const hb_section_rule known[] = HB_SECTION_TABLE;
enum { KNOWN = sizeof known / sizeof known[0], MUST_UNDERSTAND = 1 };

static bool is_zero(const uint8_t *p, uint64_t bytes) {
    uint8_t any = 0;
    for (uint64_t i = 0; i < bytes; i++) any |= p[i];
    return !any;
}

static bool digest_is(const void *data, uint64_t bytes, const uint8_t digest[32]) {
    uint8_t found[32];
    hb_digest(data, (size_t)bytes, found);
    return !memcmp(found, digest, 32);
}

static const hb_section *section_of(const hb_file *file, const char *kind) {
    for (uint32_t i = 0; i < file->header->sections; i++)
        if (!memcmp(file->sections[i].kind, kind, 4)) return &file->sections[i];
    return NULL;
}

hb_span hb_find_section(const hb_file *file, const char *kind) {
    const hb_section *s = section_of(file, kind);
    return s ? (hb_span){file->map.data + s->offset, s->length} : (hb_span){file->map.data, 0};
}

int hb_read_section(const hb_file *file, const char *kind, hb_span *out) {
    const hb_section *s = section_of(file, kind);
    *out = hb_find_section(file, kind);
    if (s && !digest_is(out->data, out->bytes, s->digest))
        return hb_fail(HB_ERROR_FORMAT, "section %s is damaged (its digest does not match)", kind);
    return HB_OK;
}

static int check_header(hb_file *f) {
    const hb_header *h = f->header = (const hb_header *)f->map.data;
    const uint64_t bytes = f->map.bytes;
    if (memcmp(h->magic, magic, 8))
        return hb_fail(HB_ERROR_FORMAT, "not a .hb file%s",
                       memcmp(h->magic, "GGUF", 4) ? "" : "; convert it first: halfbyte convert");
    if (h->major != HB_FORMAT_MAJOR)
        return hb_fail(HB_ERROR_FORMAT, "format version %u.%u is not readable by this library", h->major,
                       h->minor);
    if (h->length != bytes)
        return hb_fail(HB_ERROR_FORMAT, "truncated or extended: the header says %llu bytes, found %llu",
                       (unsigned long long)h->length, (unsigned long long)bytes);
    if (!h->sections || h->sections > HB_MAX_SECTIONS || 64 + 64 * (uint64_t)h->sections > bytes)
        return hb_fail(HB_ERROR_FORMAT, "%u sections do not fit", h->sections);
    f->sections = (const hb_section *)(f->map.data + 64);
    hb_sha256 s;
    uint8_t found[32];
    hb_sha256_start(&s);
    hb_sha256_add(&s, h, 32);
    hb_sha256_add(&s, f->sections, 64 * (size_t)h->sections);
    hb_sha256_end(&s, found);
    if (memcmp(found, h->digest, 32))
        return hb_fail(HB_ERROR_FORMAT, "the header is damaged (its digest does not match)");
    return h->zero ? hb_fail(HB_ERROR_FORMAT, "a reserved header field is not zero") : HB_OK;
}

static int check_sections(const hb_file *f) {
    uint64_t end = 64 + 64 * (uint64_t)f->header->sections;
    for (uint32_t i = 0; i < f->header->sections; i++) {
        const hb_section *s = &f->sections[i];
        char kind[5] = {0};
        bool is_known = false;
        memcpy(kind, s->kind, 4);
        for (int c = 0; c < 4; c++)
            if (s->kind[c] <= 0x20 || s->kind[c] >= 0x7f)
                return hb_fail(HB_ERROR_FORMAT, "section %u: its kind is not four printable characters", i);
        for (int k = 0; k < KNOWN; k++) is_known |= !memcmp(kind, known[k].kind, 4);
        if (!is_known && s->flags & MUST_UNDERSTAND)
            return hb_fail(HB_ERROR_FORMAT, "section %s must be understood and is not", kind);
        if (s->flags & ~(uint32_t)MUST_UNDERSTAND || s->zero)
            return hb_fail(HB_ERROR_FORMAT, "section %s: a reserved field is not zero", kind);
        for (uint32_t j = 0; j < i; j++)
            if (!memcmp(f->sections[j].kind, kind, 4))
                return hb_fail(HB_ERROR_FORMAT, "section %s appears twice", kind);
        const uint64_t to = memcmp(kind, "DATA", 4) ? HB_ALIGNMENT : HB_DATA_ALIGNMENT;
        if (s->offset != (end + to - 1) / to * to)
            return hb_fail(HB_ERROR_FORMAT, "section %s leaves a hole or overlaps", kind);
        if (s->offset > f->map.bytes || s->length > f->map.bytes - s->offset)
            return hb_fail(HB_ERROR_FORMAT, "section %s lies outside the file", kind);
        end = s->offset + s->length;
    }
    if (end != f->map.bytes) return hb_fail(HB_ERROR_FORMAT, "bytes after the last section");
    for (int k = 0; k < KNOWN; k++)
        if (known[k].required && !section_of(f, known[k].kind))
            return hb_fail(HB_ERROR_FORMAT, "section %s is missing", known[k].kind);
    return HB_OK;
}

static int read_records(const hb_file *f, const char *kind, size_t size, const void **out, uint32_t *count) {
    hb_span s;
    const int status = hb_read_section(f, kind, &s);
    if (status) return status;
    if (s.bytes % size || s.bytes / size > UINT32_MAX)
        return hb_fail(HB_ERROR_FORMAT, "section %s is not a whole number of records", kind);
    *out = s.data, *count = (uint32_t)(s.bytes / size);
    return HB_OK;
}

static bool name_is_valid(const uint8_t *p, uint32_t bytes) {
    const uint8_t *const end = p + bytes;
    if (!hb_utf8_is_valid(p, bytes)) return false;
    while (p < end) {
        const uint32_t c = hb_utf8_next(&p);
        if (c < 0x20 || (c >= 0x7f && c < 0xa0) || c == 0x2028 || c == 0x2029) return false;
    }
    return true;
}

hb_weight hb_weight_of(const hb_file *f, uint32_t i) {
    const hb_tensor *t = &f->tensors[i];
    hb_weight w = {f->data.data + t->offset,
                   t->length,
                   t->encoding,
                   t->tile,
                   t->shape[0],
                   t->shape[1],
                   t->group,
                   t->scale_type};
    if (t->rank == 1) w.rows = 1, w.cols = t->shape[0];
    return w;
}

static int check_tensor(const hb_file *f, uint32_t i) {
    const hb_tensor *t = &f->tensors[i];
    if ((uint64_t)t->name_offset + t->name_length > f->names_length || !t->name_length ||
        t->name_length > 255)
        return hb_fail(HB_ERROR_FORMAT, "tensor %u: its name lies outside the table", i);
    const uint8_t *name = (const uint8_t *)f->names + t->name_offset;
    if (!name_is_valid(name, t->name_length))
        return hb_fail(HB_ERROR_FORMAT, "tensor %u: its name is not printable UTF-8", i);
    const char *why = NULL;
    const hb_encoding *e = hb_find_encoding(t->encoding);
    const bool vector = t->tile == HB_TILE_ROWS && t->rank == 1,
               matrix = t->tile == HB_TILE_P16 && t->rank == 2;
    if (!e)
        why = "unknown encoding";
    else if (e->kind == HB_KIND_INDEX ? !vector : !matrix && !(vector && e->kind == HB_KIND_FLOAT))
        why = "its tile and rank are not known for its encoding";
    for (uint32_t d = 0; !why && d < 4; d++)
        if (d < t->rank ? !t->shape[d] || t->shape[d] > HB_MAX_DIMENSION : t->shape[d] != 0)
            why = "its shape is out of range";
    const uint32_t cols = why ? 0 : t->shape[t->rank - 1];
    if (!why && (!hb_parameters_are_valid(e, t->group, t->scale_type) ||
                 t->group > (cols + HB_COLUMN_PAD - 1) / HB_COLUMN_PAD * HB_COLUMN_PAD))
        why = "its group or scale type is not allowed for its encoding";
    if (!why && (t->zero || !is_zero(t->zero2, 32))) why = "a reserved field is not zero";
    const uint64_t all = f->data.bytes;
    if (!why && (t->offset > all || t->length > all - t->offset)) why = "it lies outside the data";
    if (!why && vector && t->length != (uint64_t)t->shape[0] * e->bits / 8) why = "it has another length";
    if (!why && matrix) {
        const hb_weight w = hb_weight_of(f, i);
        hb_matrix m;
        why = hb_open_matrix(&w, &m);
        if (!why && m.nbytes != t->length) why = "it has another length";
    }
    return why ? hb_fail(HB_ERROR_FORMAT, "tensor %.*s: %s", (int)t->name_length, (const char *)name, why)
               : HB_OK;
}

/* Names in order, by heap sort: *before(a, b)* of two rows of the tensor table. */
static int compare_names(const hb_file *f, uint32_t a, uint32_t b) {
    const hb_tensor *x = &f->tensors[a], *y = &f->tensors[b];
    const uint32_t n = x->name_length < y->name_length ? x->name_length : y->name_length;
    const int order = memcmp(f->names + x->name_offset, f->names + y->name_offset, n);
    return order ? order : (x->name_length > y->name_length) - (x->name_length < y->name_length);
}

static void sift(const hb_file *f, uint32_t *heap, uint32_t at, uint32_t count) {
    for (uint32_t child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && compare_names(f, heap[child], heap[child + 1]) < 0) child++;
        if (compare_names(f, heap[at], heap[child]) >= 0) return;
        const uint32_t swap = heap[at];
        heap[at] = heap[child], heap[child] = swap;
    }
}

static int check_names_differ(const hb_file *f) {
    uint32_t *order = hb_allocate(&f->allocator, (f->tensor_count + 1) * sizeof *order);
    if (!order) return hb_fail(HB_ERROR_MEMORY, "no memory to open the file");
    const uint32_t n = f->tensor_count;
    int status = HB_OK;
    for (uint32_t i = 0; i < n; i++) order[i] = i;
    for (uint32_t i = n / 2; i-- > 0;) sift(f, order, i, n);
    for (uint32_t i = n; i-- > 1;) {
        const uint32_t last = order[0];
        order[0] = order[i], order[i] = last;
        sift(f, order, 0, i);
        if (i + 1 < n && !compare_names(f, order[i], order[i + 1])) status = HB_ERROR_FORMAT;
    }
    if (n > 1 && !compare_names(f, order[0], order[1])) status = HB_ERROR_FORMAT;
    hb_release(&f->allocator, order);
    return status ? hb_fail(status, "a tensor appears twice") : HB_OK;
}

static int check_tensors(hb_file *f) {
    hb_span s;
    int status = hb_read_section(f, "TENS", &s);
    if (status) return status;
    uint32_t count, names;
    if (s.bytes < 64 || !is_zero(s.data + 8, 56))
        return hb_fail(HB_ERROR_FORMAT, "the tensor table is cut off");
    memcpy(&count, s.data, 4), memcpy(&names, s.data + 4, 4);
    if (64 + (uint64_t)count * sizeof(hb_tensor) + names != s.bytes)
        return hb_fail(HB_ERROR_FORMAT, "%u tensors do not fit the tensor table", count);
    f->tensors = (const hb_tensor *)(s.data + 64), f->tensor_count = count;
    f->names = (const char *)(f->tensors + count), f->names_length = names;
    uint64_t end = 0;
    for (uint32_t i = 0; i < count; i++) {
        if ((status = check_tensor(f, i))) return status;
        const hb_tensor *t = &f->tensors[i];
        if (t->offset != (end + 63) / 64 * 64)
            return hb_fail(HB_ERROR_FORMAT, "tensor %.*s: leaves a hole or overlaps", (int)t->name_length,
                           f->names + t->name_offset);
        end = t->offset + t->length;
    }
    if (end != f->data.bytes) return hb_fail(HB_ERROR_FORMAT, "bytes after the last tensor");
    return check_names_differ(f);
}

static int check_sizes(hb_file *f) {
    int64_t vocab, context;
    if (!hb_metadata_int(f, "model.vocab_size", &vocab) ||
        !hb_metadata_int(f, "model.context_length", &context) || vocab < 1 || vocab > INT32_MAX ||
        context < 1 || context > INT32_MAX)
        return hb_fail(HB_ERROR_FORMAT, "metadata model.vocab_size or model.context_length is out of range");
    f->vocab_size = (uint32_t)vocab, f->context_length = (uint32_t)context;
    return HB_OK;
}

static int check(hb_file *f) {
    int status;
    hb_span text;
    if ((status = check_header(f)) || (status = check_sections(f)) ||
        (status = hb_read_section(f, "TMPL", &text)))
        return status;
    if (!hb_utf8_is_valid(text.data, (size_t)text.bytes))
        return hb_fail(HB_ERROR_FORMAT, "section TMPL is not UTF-8");
    f->data = hb_find_section(f, "DATA");
    if ((status = hb_read_section(f, "META", &f->meta)) || (status = hb_check_metadata(f->meta)) ||
        (status = check_sizes(f)) ||
        (status = read_records(f, "SLOT", sizeof *f->slots, (const void **)&f->slots, &f->slot_count)) ||
        (status = read_records(f, "KVCA", sizeof *f->caches, (const void **)&f->caches, &f->cache_count)) ||
        (status = read_records(f, "PROG", sizeof *f->ops, (const void **)&f->ops, &f->op_count)) ||
        (status = check_tensors(f)))
        return status;
    return hb_check_program(f);
}

static int open_mapped(hb_map *map, const hb_allocator *a, const hb_open_options *options, hb_file **out) {
    hb_file *f = hb_allocate(a, sizeof *f);
    int status = f ? HB_OK : hb_fail(HB_ERROR_MEMORY, "no memory to open the file");
    if (f) {
        memset(f, 0, sizeof *f);
        f->allocator = *a, f->map = *map;
        status = check(f);
        if (!status && options->verify) status = hb_verify(f, options->progress, options->context);
    }
    if (status) {
        hb_unmap(map, a);
        hb_release(a, f);
        return status;
    }
    *out = f;
    return HB_OK;
}

int hb_open_path(const char *path, const hb_open_options *given, hb_file **out) {
    HB_OPTIONS(hb_open_options, given);
    const hb_allocator a = hb_allocator_of(options.allocator);
    hb_map map;
    *out = NULL;
    const int status = hb_map_path(path, &a, &map);
    return status ? status : open_mapped(&map, &a, &options, out);
}

int hb_open_memory(const void *memory, uint64_t bytes, const hb_open_options *given, hb_file **out) {
    HB_OPTIONS(hb_open_options, given);
    const hb_allocator a = hb_allocator_of(options.allocator);
    hb_map map;
    *out = NULL;
    const int status = hb_map_memory(memory, bytes, &a, &map);
    return status ? status : open_mapped(&map, &a, &options, out);
}

int hb_open_fd(int fd, uint64_t offset, uint64_t bytes, const hb_open_options *given, hb_file **out) {
    HB_OPTIONS(hb_open_options, given);
    const hb_allocator a = hb_allocator_of(options.allocator);
    hb_map map;
    *out = NULL;
    const int status = hb_map_fd(fd, offset, bytes, &a, &map);
    return status ? status : open_mapped(&map, &a, &options, out);
}

void hb_close(hb_file *f) {
    if (!f) return;
    const hb_allocator a = f->allocator;
    hb_unmap(&f->map, &a);
    hb_release(&a, f);
}

const uint8_t *hb_file_digest(const hb_file *f) { return f->header->digest; }
uint64_t hb_file_bytes(const hb_file *f) { return f->map.bytes; }
uint32_t hb_vocab_size(const hb_file *f) { return f->vocab_size; }
uint32_t hb_context_length(const hb_file *f) { return f->context_length; }

int hb_verify(const hb_file *f, hb_progress *progress, void *context) {
    const uint8_t *const base = f->map.data;
    hb_sha256 all;
    uint8_t found[32];
    uint64_t done = 0, end = 64 + 64 * (uint64_t)f->header->sections;
    hb_sha256_start(&all);
    for (uint32_t i = 0; i < f->tensor_count; i++) hb_sha256_add(&all, f->tensors[i].digest, 32);
    hb_sha256_end(&all, found);
    for (uint32_t i = 0; i < f->header->sections; i++) {
        const hb_section *s = &f->sections[i];
        const bool data = !memcmp(s->kind, "DATA", 4);
        if (!is_zero(base + end, s->offset - end))
            return hb_fail(HB_ERROR_FORMAT, "padding before byte %llu is not zero",
                           (unsigned long long)s->offset);
        if (data ? memcmp(found, s->digest, 32) : !digest_is(base + s->offset, s->length, s->digest))
            return hb_fail(HB_ERROR_FORMAT, "section %.4s is damaged (its digest does not match)",
                           (const char *)s->kind);
        end = s->offset + s->length;
    }
    end = 0;
    for (uint32_t i = 0; i < f->tensor_count; i++) {
        const hb_tensor *t = &f->tensors[i];
        if (!is_zero(f->data.data + end, t->offset - end))
            return hb_fail(HB_ERROR_FORMAT, "padding between tensors is not zero");
        if (!digest_is(f->data.data + t->offset, t->length, t->digest))
            return hb_fail(HB_ERROR_FORMAT, "tensor %.*s is damaged (its digest does not match)",
                           (int)t->name_length, f->names + t->name_offset);
        end = t->offset + t->length, done += t->length;
        if (progress && progress(context, done, f->data.bytes))
            return hb_fail(HB_ERROR_CANCELLED, "the check was cancelled");
    }
    return HB_OK;
}

int hb_file_tokenizer(const hb_file *f, hb_tokenizer **out) {
    hb_span s;
    *out = NULL;
    int status = hb_read_section(f, "VOCB", &s);
    if (!status && !s.bytes)
        status = hb_fail(HB_ERROR_FORMAT,
                         "the file has no tokenizer for C; convert it again, or see halfbyte info");
    return status ? status : hb_tokenizer_open(s.data, (size_t)s.bytes, &f->allocator, out);
}

int hb_file_chat(const hb_file *f, const void **chat, size_t *bytes) {
    hb_span s;
    int status = hb_read_section(f, "CHAT", &s);
    if (!status && !s.bytes)
        status = hb_fail(HB_ERROR_FORMAT, "the file has no chat template of a shape that C knows");
    *chat = s.data, *bytes = (size_t)s.bytes;
    return status;
}
