/* halfbyte: run .hb files in an app. The stable interface: one library, one header, C99 and C++11.
 *
 *     hb_file *file; hb_model *model; hb_session *session;
 *     if (hb_open_path("model.hb", NULL, &file) || hb_model_create(file, NULL, &model) ||
 *         hb_session_create(model, NULL, &session) || hb_feed(session, ids, count, logits))
 *         puts(hb_last_error());
 *
 * Rules. Functions that can fail return HB_OK (0) or a negative HB_ERROR_*, and hb_last_error() says why in
 * one line. Nothing prints, aborts, reads the environment or starts a thread that was not asked for. Handles
 * are opaque. Structs of options begin with their size (set it to sizeof): fields that a later version
 * appends read as zero, and zero always means the default; NULL for a whole struct means all defaults. What
 * is created is freed by the caller, sessions before their model, the model before its file; freeing NULL
 * does nothing.
 *
 * Versions are semantic: within a major version nothing here is removed and no meaning changes. Names that
 * begin with hb_ and are not in this header may change at any time (halfbyte_program.h is such).
 *
 * Threads. hb_last_error is of the calling thread. A file may be read from many threads. Calls on one model
 * and its sessions take turns; one session is used from one thread at a time. hb_cancel may come from
 * anywhere.
 *
 * The Python binding reads this file: lines that begin with # are skipped, the rest are plain declarations.
 */
#ifndef HALFBYTE_H
#define HALFBYTE_H

#include <stddef.h>
#include <stdint.h>

#if !defined(HB_API)
#if defined(_WIN32) && defined(halfbyte_EXPORTS) /* as CMake says while the DLL is built */
#define HB_API __declspec(dllexport)
#elif defined(_WIN32)
#define HB_API
#else
#define HB_API __attribute__((visibility("default")))
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- versions and errors ------------------------------------------------------------------------------- */

enum { HB_VERSION_MAJOR = 1, HB_VERSION_MINOR = 0, HB_VERSION_PATCH = 0 };

/* major * 1000000 + minor * 1000 + patch of the library that is running. */
HB_API uint32_t hb_version(void);

enum {
    HB_OK = 0,
    HB_ERROR_MEMORY = -1,    /* the allocator has no more */
    HB_ERROR_RANGE = -2,     /* records that do not exist (halfbyte_program.h) */
    HB_ERROR_ID = -3,        /* a token id outside the vocabulary */
    HB_ERROR_SESSION = -4,   /* a row of a session that is not in the step (halfbyte_program.h) */
    HB_ERROR_POSITION = -5,  /* more tokens than the session or the model's context holds */
    HB_ERROR_PICK = -6,      /* a picked row that is not in the step (halfbyte_program.h) */
    HB_ERROR_ARGUMENT = -7,  /* a call that can never be right */
    HB_ERROR_FORMAT = -8,    /* a file that is damaged, hostile or not of this format */
    HB_ERROR_IO = -9,        /* the system could not open, read or write */
    HB_ERROR_CANCELLED = -10 /* hb_cancel, or a progress callback that asked for it */
};

/* What a status means, in general. */
HB_API const char *hb_status_text(int status);
/* Why the last call of this thread that failed did, in one line; "" before any. Valid until the next failure.
 */
HB_API const char *hb_last_error(void);

/* ---- memory -------------------------------------------------------------------------------------------- */

/* Where memory comes from. allocate gives at least `bytes` bytes aligned to 16, or NULL; release takes them
 * back. Both are called from the thread that calls the library, one call at a time for each model. */
typedef struct hb_allocator {
    size_t size;
    void *context;
    void *(*allocate)(void *context, size_t bytes);
    void (*release)(void *context, void *memory);
} hb_allocator;

/* An allocator inside `memory`, which must outlive what is taken from it. Not for several threads at once. */
HB_API int hb_arena(void *memory, size_t bytes, hb_allocator *out);

/* SHA-256, which names files and ends session files. */
HB_API void hb_digest(const void *data, size_t bytes, uint8_t digest[32]);

/* ---- files --------------------------------------------------------------------------------------------- */

typedef struct hb_file hb_file;

/* Called now and then; anything but 0 cancels. */
typedef int hb_progress(void *context, uint64_t done, uint64_t total);

typedef struct hb_open_options {
    size_t size;
    const hb_allocator *allocator; /* copied; NULL: malloc and free */
    int verify;                    /* check every byte now, as hb_verify does */
    hb_progress *progress;         /* of that check */
    void *context;
} hb_open_options;

/* Opens and checks a file, mapped read-only where the system can, otherwise read into memory. After this no
 * damage in the file can make the library read or write where it must not. Paths are UTF-8, on Windows too.
 */
HB_API int hb_open_path(const char *path, const hb_open_options *options, hb_file **out);
/* The same for memory that stays the caller's and must stay unchanged; best aligned to 64 bytes, else copied.
 */
HB_API int hb_open_memory(const void *memory, uint64_t bytes, const hb_open_options *options, hb_file **out);
/* The same for `bytes` bytes (0: the rest) at an offset of an open file, such as an Android asset; fd stays
 * open and the caller's. On Windows it is one of the C runtime that the library is linked with. */
HB_API int hb_open_fd(int fd, uint64_t offset, uint64_t bytes, const hb_open_options *options, hb_file **out);
/* Checks every byte against its digest. */
HB_API int hb_verify(const hb_file *file, hb_progress *progress, void *context);
HB_API void hb_close(hb_file *file);

/* The 32 bytes that name the file's content. */
HB_API const uint8_t *hb_file_digest(const hb_file *file);
HB_API uint64_t hb_file_bytes(const hb_file *file);
HB_API uint32_t hb_vocab_size(const hb_file *file);
HB_API uint32_t hb_context_length(const hb_file *file);
/* Metadata by key (SPEC.md section 12): whether it is there and of that type. Texts are not terminated by a
 * zero and belong to the file. */
HB_API int hb_metadata_text(const hb_file *file, const char *key, const char **text, size_t *bytes);
HB_API int hb_metadata_int(const hb_file *file, const char *key, int64_t *value);
HB_API int hb_metadata_float(const hb_file *file, const char *key, double *value);
/* Copies up to `capacity` integers of a list; *count is how many there are. */
HB_API int hb_metadata_ints(const hb_file *file, const char *key, int64_t *values, size_t capacity,
                            size_t *count);

/* ---- models -------------------------------------------------------------------------------------------- */

/* Instruction sets, numbered as they were added; HB_ISA_BEST picks the best that this machine has. From worst
 * to best, on x86: SCALAR, AVX2, AVXVNNI, AVX512VLVNNI (the kernels of AVXVNNI in the encoding of AVX-512,
 * for machines that have only that one), AVX512VNNI; on ARM: SCALAR, NEON, DOTPROD, I8MM. */
enum {
    HB_ISA_BEST = -1,
    HB_ISA_SCALAR = 0,
    HB_ISA_AVX2 = 1,
    HB_ISA_AVX512VNNI = 2,
    HB_ISA_NEON = 3,
    HB_ISA_DOTPROD = 4,
    HB_ISA_I8MM = 5,
    HB_ISA_AVXVNNI = 6,
    HB_ISA_AVX512VLVNNI = 7,
    HB_ISA_COUNT = 8
};

HB_API const char *hb_isa_name(int isa);
HB_API int hb_isa_supported(int isa);

typedef struct hb_model hb_model;

typedef struct hb_model_options {
    size_t size;
    const hb_allocator *allocator; /* copied; NULL: the file's */
    int threads;                   /* 0 or 1: the caller's alone; n: n - 1 more; -1: one a processor */
    const char *isa;               /* no better instruction set than this; NULL: the best of this machine */
    const char *policy;            /* "i8g32", activations of 8 bits per 32 columns, or "f32"; NULL: i8g32 */
    const char *kv; /* a mode of SPEC.md section 10.5, with other modes for some layers (tq3,0=k8v8); NULL or
                       "auto": what was measured on the file, else k8v8, or f16 where that is smaller */
    uint32_t rows;  /* tokens of a step: more is faster for long prompts and takes more memory; 0: 288 */
    uint32_t sessions;  /* sessions of a step; 0: 8 */
    uint32_t positions; /* longest session; 0: the file's context length */
} hb_model_options;

/* Binds a file to this machine. All the memory that steps work in is taken now. */
HB_API int hb_model_create(const hb_file *file, const hb_model_options *options, hb_model **out);
HB_API void hb_model_free(hb_model *model);
HB_API const char *hb_model_kv(const hb_model *model);
HB_API int hb_model_isa(const hb_model *model);
HB_API int hb_model_threads(const hb_model *model);

/* What a file needs, in bytes, before anything is taken. `mapped` is the file, which the system may drop and
 * read again; the others come from the allocator. An arena of `model` + n * `session` bytes holds a model and
 * n sessions of `positions` positions each. */
typedef struct hb_needs {
    size_t size;
    uint64_t mapped;
    uint64_t model;
    uint64_t session;
} hb_needs;

HB_API int hb_fit(const hb_file *file, const hb_model_options *options, uint32_t positions, hb_needs *out);

/* While on, hb_feed and hb_feed_many of the model stop, within a fraction of a step, with HB_ERROR_CANCELLED.
 * From any thread, also while they run. */
HB_API void hb_cancel(hb_model *model, int on);

/* ---- sessions ------------------------------------------------------------------------------------------ */

typedef struct hb_session hb_session;

typedef struct hb_session_options {
    size_t size;
    uint32_t positions; /* most that it will hold; 0: the model's */
    uint32_t reserve; /* positions whose memory is taken now, so that feeding up to there allocates nothing */
} hb_session_options;

/* An empty timeline of tokens. */
HB_API int hb_session_create(hb_model *model, const hb_session_options *options, hb_session **out);
HB_API void hb_session_free(hb_session *session);
/* Tokens fed so far, and the tokens. */
HB_API uint32_t hb_session_position(const hb_session *session);
HB_API const int32_t *hb_session_ids(const hb_session *session);

/* Appends tokens; logits (vocabulary floats, or NULL) are those after the last one. The numbers depend on the
 * tokens only: not on threads, chunks, or other sessions in the step. When it fails the session keeps the
 * chunks that were complete: see hb_session_position. */
HB_API int hb_feed(hb_session *session, const int32_t *ids, uint32_t count, float *logits);

typedef struct hb_feed_item {
    size_t size;
    hb_session *session;
    const int32_t *ids;
    uint32_t count;
    float *logits;
} hb_feed_item;

/* The same for several sessions of one model, each at most once, that share every read of the weights. All
 * items have the size of the first. */
HB_API int hb_feed_many(hb_model *model, const hb_feed_item *items, uint32_t count);

/* Forgets the last `count` tokens. */
HB_API int hb_session_rewind(hb_session *session, uint32_t count);
/* Another session that goes on from here; memory is shared until one of the two writes. */
HB_API int hb_session_fork(hb_session *session, hb_session **out);
/* Tokens and caches to a file, written aside and renamed; the Python runtime reads and writes the same. */
HB_API int hb_session_save(hb_session *session, const char *path);
/* A saved session. HB_ERROR_FORMAT for damage, another model or another kv mode. */
HB_API int hb_session_load(hb_model *model, const char *path, const hb_session_options *options,
                           hb_session **out);
/* The same through the caller: `write` returns 0, or anything else to stop. */
typedef int hb_write(void *context, const void *data, size_t bytes);
HB_API int hb_session_write(hb_session *session, hb_write *write, void *context);
HB_API int hb_session_read(hb_model *model, const void *data, uint64_t bytes,
                           const hb_session_options *options, hb_session **out);

/* ---- sampling ------------------------------------------------------------------------------------------ */

typedef struct hb_sampler hb_sampler;

/* How to choose a token, in this order: penalties, temperature, top-k, top-p, min-p. All zero is greedy. */
typedef struct hb_sampling {
    size_t size;
    double temperature;        /* 0: the highest logit, the lowest id among equals */
    uint32_t top_k;            /* 0: all */
    double top_p;              /* 0 or 1: all */
    double min_p;              /* relative to the most probable */
    double repetition_penalty; /* 0 or 1: none */
    double presence_penalty;
    double frequency_penalty;
    uint32_t penalty_window; /* of the last tokens that count; 0: all */
    uint64_t seed;
} hb_sampling;

/* `allocator` NULL: malloc and free. hb_sample itself allocates nothing. */
HB_API int hb_sampler_create(const hb_sampling *sampling, uint32_t vocab_size, const hb_allocator *allocator,
                             hb_sampler **out);
/* The next token from vocab_size logits; history, oldest first, is what penalties look at. Draws are PCG64's,
 * one a token, the same as the Python runtime's for the same seed. */
HB_API int hb_sample(hb_sampler *sampler, const float *logits, const int32_t *history, uint32_t count,
                     int32_t *id);
HB_API void hb_sampler_free(hb_sampler *sampler);

#ifdef __cplusplus
}
#endif

#endif
