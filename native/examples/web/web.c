/* What the page calls: one model, one conversation, in terms of numbers and bytes in the module's memory.
 *
 * A module of WebAssembly without a main and without imports (CMake target web). Functions that can fail
 * return a negative HB_ERROR_*, and web_error() says why. The page feeds a prompt in parts and asks for one
 * token at a time, so that it can stop between them. */
#include <stdlib.h>
#include <string.h>

#include "halfbyte.h"
#include "halfbyte_tokenizer.h"

#define EXPORT(name) __attribute__((export_name(#name), used)) name

enum { MESSAGES = 256, TEXT = 1 << 14, ROWS = 32 };
enum { ENDED = -100, FULL = -101 }; /* of web_next: the text ended, the context is full */

static void *data;
static hb_file *file;
static hb_tokenizer *tokenizer;
static hb_model *model;
static hb_session *session;
static hb_sampler *sampler;
static hb_detokenizer stream;
static hb_message messages[MESSAGES];
static uint32_t message_count, prompt_count, room;
static int32_t *prompt, pending;
static float *logits;
static char text[TEXT];
static const char *found; /* the result of calls that give a text */

/* Bytes for a file or a message, aligned as files should be; web_give_back for messages. */
void *EXPORT(web_take)(size_t bytes) { return aligned_alloc(64, (bytes + 64) / 64 * 64); }
void EXPORT(web_give_back)(void *memory) { free(memory); }

const char *EXPORT(web_error)(void) { return hb_last_error(); }
const char *EXPORT(web_text)(void) { return found; }

void EXPORT(web_close)(void) {
    hb_sampler_free(sampler), sampler = NULL;
    hb_session_free(session), session = NULL;
    hb_model_free(model), model = NULL;
    hb_tokenizer_free(tokenizer), tokenizer = NULL;
    hb_close(file), file = NULL;
    free(prompt), prompt = NULL;
    free(logits), logits = NULL;
    free(data), data = NULL;
}

/* Opens a file in memory of web_take, which then is the model's, and checks every byte. */
int EXPORT(web_open)(void *memory, size_t bytes, uint32_t positions) {
    const hb_open_options open = {.size = sizeof open, .verify = 1};
    hb_model_options options = {.size = sizeof options, .rows = ROWS, .sessions = 1};
    int status;
    web_close();
    data = memory;
    if ((status = hb_open_memory(data, bytes, &open, &file)) ||
        (status = hb_file_tokenizer(file, &tokenizer)))
        return status;
    room = hb_context_length(file);
    if (positions && positions < room) room = positions;
    options.positions = room;
    if ((status = hb_model_create(file, &options, &model)) ||
        (status = hb_session_create(model, NULL, &session)))
        return status;
    prompt = malloc(room * sizeof *prompt);
    logits = malloc(hb_vocab_size(file) * sizeof *logits);
    return prompt && logits ? HB_OK : HB_ERROR_MEMORY;
}

/* The length of a text of the metadata, or -1; web_text() is where it is. */
int EXPORT(web_metadata)(const char *key) {
    size_t bytes;
    return hb_metadata_text(file, key, &found, &bytes) ? (int)bytes : -1;
}

uint32_t EXPORT(web_room)(void) { return room; }

/* Whether the model chats; others continue a text. */
int EXPORT(web_chats)(void) {
    const void *chat;
    size_t bytes;
    return !hb_file_chat(file, &chat, &bytes);
}

int EXPORT(web_sampling)(double temperature, uint32_t top_k, double top_p, double seed) {
    const hb_sampling how = {.size = sizeof how,
                             .temperature = temperature,
                             .top_k = top_k,
                             .top_p = top_p,
                             .seed = (uint64_t)seed};
    hb_sampler_free(sampler), sampler = NULL;
    return hb_sampler_create(&how, hb_vocab_size(file), NULL, &sampler);
}

/* Forgets the messages of the conversation, then takes them anew one by one: role 0 to 2 is system, user or
 * assistant. */
void EXPORT(web_start)(void) {
    while (message_count) free((void *)messages[--message_count].content);
}

int EXPORT(web_message)(uint32_t role, char *content, size_t bytes) {
    static const char *const roles[3] = {"system", "user", "assistant"};
    if (message_count == MESSAGES || role > 2) return HB_ERROR_ARGUMENT;
    messages[message_count++] = (hb_message){sizeof *messages, roles[role], content, bytes};
    return HB_OK;
}

/* Makes the prompt of the messages, a conversation or, where the model does not chat, the last one's text.
 * What the session holds of it already stays. How many tokens it has. */
int EXPORT(web_prompt)(void) {
    const void *chat;
    size_t bytes;
    int64_t count;
    if (!message_count) return HB_ERROR_ARGUMENT;
    const hb_message *last = &messages[message_count - 1];
    if (!hb_file_chat(file, &chat, &bytes))
        count = hb_chat_tokenize(chat, bytes, tokenizer, messages, message_count, prompt, room);
    else
        count = hb_tokenize(tokenizer, last->content, last->bytes, HB_TOKENIZE_ADD, prompt, room);
    if (count < 0) return (int)count;
    if (count > room || !count) return count ? FULL : HB_ERROR_ARGUMENT;
    prompt_count = (uint32_t)count;
    const uint32_t held = hb_session_position(session);
    const int32_t *ids = hb_session_ids(session);
    uint32_t same = 0; /* the last token is fed again for its logits */
    while (same < held && same + 1 < prompt_count && ids[same] == prompt[same]) same++;
    const int status = hb_session_rewind(session, held - same);
    hb_detokenize_start(&stream, tokenizer, 0);
    pending = -1;
    return status ? status : (int)prompt_count;
}

/* Feeds some more of the prompt; how many tokens are left. */
int EXPORT(web_feed)(void) {
    const uint32_t at = hb_session_position(session);
    const uint32_t left = prompt_count - at, count = left < ROWS ? left : ROWS;
    const int status = hb_feed(session, prompt + at, count, logits);
    return status ? status : (int)(left - count);
}

/* The next token's text: its bytes, at web_text(). ENDED or FULL when there is none. */
int EXPORT(web_next)(void) {
    int64_t ends[16];
    size_t end_count = 0;
    int status;
    if (pending >= 0) {
        if (hb_session_position(session) == room) return FULL;
        if ((status = hb_feed(session, &pending, 1, logits))) return status;
    }
    status = hb_sample(sampler, logits, hb_session_ids(session), hb_session_position(session), &pending);
    if (status) return status;
    hb_metadata_ints(file, "tokenizer.eos_ids", ends, 16, &end_count);
    for (size_t i = 0; i < end_count && i < 16; i++)
        if (ends[i] == pending) return ENDED;
    found = text;
    return (int)hb_detokenize(&stream, pending, text, TEXT);
}

/* What a text that ended held back. */
int EXPORT(web_finish)(void) {
    found = text;
    return (int)hb_detokenize_finish(&stream, text, TEXT);
}
