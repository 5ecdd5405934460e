/* halfbyte's tokenizer: text to token ids and back, from the section VOCB of a file (SPEC.md section 14).
 *
 * The tables are used where they lie: opening takes memory for a handle of fixed size, and so does nothing in
 * proportion to the vocabulary. The rules are those of halfbyte.h.
 */
#ifndef HALFBYTE_TOKENIZER_H
#define HALFBYTE_TOKENIZER_H

#include "halfbyte.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct hb_tokenizer hb_tokenizer;

/* A tokenizer over `bytes` bytes of a section VOCB, which stay the caller's and must stay unchanged.
 * HB_ERROR_FORMAT for damage or another version. The allocator is copied, and also gives the memory that a
 * call of hb_tokenize works in; NULL: malloc and free. A tokenizer may be used from many threads if it may.
 */
HB_API int hb_tokenizer_open(const void *vocb, size_t bytes, const hb_allocator *allocator,
                             hb_tokenizer **out);
HB_API void hb_tokenizer_free(hb_tokenizer *tokenizer);

/* The highest id + 1, and the token that starts a text or -1. */
HB_API uint32_t hb_tokenizer_size(const hb_tokenizer *tokenizer);
HB_API int32_t hb_tokenizer_bos(const hb_tokenizer *tokenizer);

enum {
    HB_TOKENIZE_SPECIAL = 1, /* control tokens spelled in the text are those tokens; without: plain text, so
                                that what a user types cannot open a turn or end one */
    HB_TOKENIZE_ADD = 2      /* the start token goes in front where the model was trained so, and once */
};

/* The ids of a text in UTF-8, of which at most `capacity` are written; how many there are, or a negative
 * status: HB_ERROR_ARGUMENT for text that is not UTF-8 or that cannot be plain, HB_ERROR_MEMORY. */
HB_API int64_t hb_tokenize(const hb_tokenizer *tokenizer, const char *text, size_t bytes, uint32_t flags,
                           int32_t *ids, size_t capacity);

/* The bytes that a token adds to a text, which belong to the tokenizer; none for an id without a token. They
 * may be a part of a character. */
HB_API int hb_token_bytes(const hb_tokenizer *tokenizer, int32_t id, const char **text, size_t *bytes);
/* Whether a token is a control token, which no text contains. */
HB_API int hb_token_special(const hb_tokenizer *tokenizer, int32_t id);
/* The id of a token by its exact spelling, or -1. */
HB_API int32_t hb_token_id(const hb_tokenizer *tokenizer, const char *text, size_t bytes);

enum { HB_DETOKENIZE_SPECIAL = 1 /* show control tokens */ };

/* A text that arrives token by token. A part of a character is held back until it is whole. Fields are
 * private. */
typedef struct hb_detokenizer {
    const hb_tokenizer *tokenizer;
    uint32_t flags;
    uint32_t started;
    uint32_t held;
    uint8_t bytes[4];
} hb_detokenizer;

HB_API void hb_detokenize_start(hb_detokenizer *stream, const hb_tokenizer *tokenizer, uint32_t flags);
/* The text that is certain once this token is known, in UTF-8: how many bytes it has. If they are more than
 * `capacity` nothing was taken: call again. HB_ERROR_ID for an id outside the vocabulary. */
HB_API int64_t hb_detokenize(hb_detokenizer *stream, int32_t id, char *text, size_t capacity);
/* What is held back, an incomplete character as U+FFFD; the stream starts anew. */
HB_API int64_t hb_detokenize_finish(hb_detokenizer *stream, char *text, size_t capacity);

/* ---- chat ---------------------------------------------------------------------------------------------- */

/* Conversations of an optional system message, then user and assistant in turn, as the model's chat template
 * writes them: the section CHAT of a file (SPEC.md section 15). A template that is not of that shape has
 * none, and one that takes no system message refuses it: HB_ERROR_ARGUMENT says so by name. */
typedef struct hb_message {
    size_t size;
    const char *role; /* "system", "user" or "assistant" */
    const char *content;
    size_t bytes;
} hb_message;

/* The prompt, up to the opening of the assistant's turn: its bytes, of which none are written if they are
 * more than `capacity`. All messages have the size of the first. */
HB_API int64_t hb_chat_render(const void *chat, size_t chat_bytes, const hb_message *messages, uint32_t count,
                              char *text, size_t capacity);
/* The ids of that prompt. Control tokens are those of the template: what a message spells is plain text. */
HB_API int64_t hb_chat_tokenize(const void *chat, size_t chat_bytes, const hb_tokenizer *tokenizer,
                                const hb_message *messages, uint32_t count, int32_t *ids, size_t capacity);

#ifdef __cplusplus
}
#endif

#endif
