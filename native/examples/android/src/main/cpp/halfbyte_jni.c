/* The Java classes of io.halfbyte over halfbyte.h. A failed call leaves an exception and returns nothing of
 * use. */
#include <jni.h>
#include <stdlib.h>
#include <string.h>

#include "halfbyte.h"

#define JAVA(type, class, name) JNIEXPORT type JNICALL Java_io_halfbyte_##class##_##name

typedef struct bound {
    hb_file *file;
    hb_model *model;
} bound;

static int throws(JNIEnv *env, int status) {
    if (!status || (*env)->ExceptionCheck(env)) return status;
    jclass kind = (*env)->FindClass(env, "io/halfbyte/HalfbyteException");
    jmethodID make = kind ? (*env)->GetMethodID(env, kind, "<init>", "(ILjava/lang/String;)V") : NULL;
    jstring text = make ? (*env)->NewStringUTF(env, hb_last_error()) : NULL;
    jobject error = text ? (*env)->NewObject(env, kind, make, (jint)status, text) : NULL;
    if (error) (*env)->Throw(env, error);
    return status;
}

static void *handle(JNIEnv *env, jobject object) {
    jclass kind = (*env)->GetObjectClass(env, object);
    jlong value = (*env)->GetLongField(env, object, (*env)->GetFieldID(env, kind, "handle", "J"));
    if (!value) (*env)->ThrowNew(env, (*env)->FindClass(env, "java/lang/IllegalStateException"), "closed");
    return (void *)(intptr_t)value;
}

static void *take_handle(JNIEnv *env, jobject object) {
    jfieldID field = (*env)->GetFieldID(env, (*env)->GetObjectClass(env, object), "handle", "J");
    void *value = (void *)(intptr_t)(*env)->GetLongField(env, object, field);
    (*env)->SetLongField(env, object, field, 0);
    return value;
}

/* A copy in UTF-8, NULL for null; freed by the caller. Java's own form differs for characters beyond the
 * first plane, which paths rarely have. */
static char *text_of(JNIEnv *env, jstring text) {
    if (!text) return NULL;
    const char *utf = (*env)->GetStringUTFChars(env, text, NULL);
    char *copy = utf ? malloc(strlen(utf) + 1) : NULL;
    if (copy) strcpy(copy, utf);
    if (utf) (*env)->ReleaseStringUTFChars(env, text, utf);
    return copy;
}

static hb_model_options options_of(jint threads, const char *kv) {
    hb_model_options options;
    memset(&options, 0, sizeof options);
    options.size = sizeof options, options.threads = threads, options.kv = kv;
    return options;
}

static jlong bind(JNIEnv *env, int status, hb_file *file, jint threads, jstring kv) {
    bound *b = calloc(1, sizeof *b);
    char *mode = text_of(env, kv);
    const hb_model_options options = options_of(threads, mode);
    if (!status && b) status = hb_model_create(b->file = file, &options, &b->model);
    free(mode);
    if (!throws(env, status)) return (jlong)(intptr_t)b;
    hb_close(file);
    free(b);
    return 0;
}

JAVA(jlong, Model, openPath)(JNIEnv *env, jclass kind, jstring path, jint threads, jstring kv) {
    (void)kind;
    hb_file *file = NULL;
    char *name = text_of(env, path);
    const int status = hb_open_path(name, NULL, &file);
    free(name);
    return bind(env, status, file, threads, kv);
}

JAVA(jlong, Model, openFd)(JNIEnv *env, jclass kind, jint fd, jlong offset, jlong length, jint threads,
                           jstring kv) {
    (void)kind;
    hb_file *file = NULL;
    const int status = hb_open_fd(fd, (uint64_t)offset, (uint64_t)length, NULL, &file);
    return bind(env, status, file, threads, kv);
}

JAVA(jlongArray, Model, fit)(JNIEnv *env, jclass kind, jstring path, jint threads, jstring kv,
                             jint positions) {
    (void)kind;
    hb_file *file = NULL;
    hb_needs needs = {sizeof needs, 0, 0, 0};
    char *name = text_of(env, path), *mode = text_of(env, kv);
    const hb_model_options options = options_of(threads, mode);
    int status = hb_open_path(name, NULL, &file);
    if (!status) status = hb_fit(file, &options, (uint32_t)positions, &needs);
    hb_close(file);
    free(name), free(mode);
    if (throws(env, status)) return NULL;
    const jlong values[3] = {(jlong)needs.mapped, (jlong)needs.model, (jlong)needs.session};
    jlongArray out = (*env)->NewLongArray(env, 3);
    if (out) (*env)->SetLongArrayRegion(env, out, 0, 3, values);
    return out;
}

JAVA(jint, Model, vocabSize)(JNIEnv *env, jobject self) {
    bound *b = handle(env, self);
    return b ? (jint)hb_vocab_size(b->file) : 0;
}

JAVA(jint, Model, contextLength)(JNIEnv *env, jobject self) {
    bound *b = handle(env, self);
    return b ? (jint)hb_context_length(b->file) : 0;
}

JAVA(jstring, Model, kv)(JNIEnv *env, jobject self) {
    bound *b = handle(env, self);
    return b ? (*env)->NewStringUTF(env, hb_model_kv(b->model)) : NULL;
}

JAVA(jbyteArray, Model, digest)(JNIEnv *env, jobject self) {
    bound *b = handle(env, self);
    jbyteArray out = b ? (*env)->NewByteArray(env, 32) : NULL;
    if (out) (*env)->SetByteArrayRegion(env, out, 0, 32, (const jbyte *)hb_file_digest(b->file));
    return out;
}

JAVA(jintArray, Model, eosIds)(JNIEnv *env, jobject self) {
    bound *b = handle(env, self);
    int64_t ids[16];
    jint values[16];
    size_t count = 0;
    if (!b) return NULL;
    hb_metadata_ints(b->file, "tokenizer.eos_ids", ids, 16, &count);
    if (count > 16) count = 16;
    for (size_t i = 0; i < count; i++) values[i] = (jint)ids[i];
    jintArray out = (*env)->NewIntArray(env, (jsize)count);
    if (out) (*env)->SetIntArrayRegion(env, out, 0, (jsize)count, values);
    return out;
}

JAVA(void, Model, cancel)(JNIEnv *env, jobject self, jboolean on) {
    bound *b = handle(env, self);
    if (b) hb_cancel(b->model, on);
}

JAVA(void, Model, close)(JNIEnv *env, jobject self) {
    bound *b = take_handle(env, self);
    if (!b) return;
    hb_model_free(b->model);
    hb_close(b->file);
    free(b);
}

JAVA(jlong, Session, create)(JNIEnv *env, jclass kind, jobject model, jint positions, jint reserve) {
    (void)kind;
    bound *b = handle(env, model);
    const hb_session_options options = {sizeof options, (uint32_t)positions, (uint32_t)reserve};
    hb_session *s = NULL;
    if (b) throws(env, hb_session_create(b->model, &options, &s));
    return (jlong)(intptr_t)s;
}

JAVA(jlong, Session, loadHandle)(JNIEnv *env, jclass kind, jobject model, jstring path) {
    (void)kind;
    bound *b = handle(env, model);
    hb_session *s = NULL;
    char *name = text_of(env, path);
    if (b) throws(env, hb_session_load(b->model, name, NULL, &s));
    free(name);
    return (jlong)(intptr_t)s;
}

JAVA(jlong, Session, forkHandle)(JNIEnv *env, jobject self) {
    hb_session *s = handle(env, self), *other = NULL;
    if (s) throws(env, hb_session_fork(s, &other));
    return (jlong)(intptr_t)other;
}

JAVA(void, Session, feed)(JNIEnv *env, jobject self, jintArray ids, jfloatArray logits) {
    hb_session *s = handle(env, self);
    jint *from = s ? (*env)->GetIntArrayElements(env, ids, NULL) : NULL;
    jfloat *to = from && logits ? (*env)->GetFloatArrayElements(env, logits, NULL) : NULL;
    if (from) {
        const jsize count = (*env)->GetArrayLength(env, ids);
        throws(env, hb_feed(s, (const int32_t *)from, (uint32_t)count, to));
        (*env)->ReleaseIntArrayElements(env, ids, from, JNI_ABORT);
    }
    if (to) (*env)->ReleaseFloatArrayElements(env, logits, to, 0);
}

JAVA(jint, Session, position)(JNIEnv *env, jobject self) {
    hb_session *s = handle(env, self);
    return s ? (jint)hb_session_position(s) : 0;
}

JAVA(jintArray, Session, ids)(JNIEnv *env, jobject self) {
    hb_session *s = handle(env, self);
    if (!s) return NULL;
    const jsize count = (jsize)hb_session_position(s);
    jintArray out = (*env)->NewIntArray(env, count);
    if (out) (*env)->SetIntArrayRegion(env, out, 0, count, (const jint *)hb_session_ids(s));
    return out;
}

JAVA(void, Session, rewind)(JNIEnv *env, jobject self, jint count) {
    hb_session *s = handle(env, self);
    if (s) throws(env, hb_session_rewind(s, (uint32_t)count));
}

JAVA(void, Session, save)(JNIEnv *env, jobject self, jstring path) {
    hb_session *s = handle(env, self);
    char *name = text_of(env, path);
    if (s && name) throws(env, hb_session_save(s, name));
    free(name);
}

JAVA(void, Session, close)(JNIEnv *env, jobject self) { hb_session_free(take_handle(env, self)); }

JAVA(jlong, Sampler, create)(JNIEnv *env, jclass kind, jint vocab, jdouble temperature, jint top_k,
                             jdouble top_p, jdouble min_p, jdouble repetition, jlong seed) {
    (void)kind;
    hb_sampling how;
    hb_sampler *s = NULL;
    memset(&how, 0, sizeof how);
    how.size = sizeof how, how.temperature = temperature, how.top_k = (uint32_t)top_k, how.top_p = top_p;
    how.min_p = min_p, how.repetition_penalty = repetition, how.seed = (uint64_t)seed;
    throws(env, hb_sampler_create(&how, (uint32_t)vocab, NULL, &s));
    return (jlong)(intptr_t)s;
}

JAVA(jint, Sampler, sample)(JNIEnv *env, jobject self, jfloatArray logits, jintArray history) {
    hb_sampler *s = handle(env, self);
    jfloat *from = s ? (*env)->GetFloatArrayElements(env, logits, NULL) : NULL;
    jint *past = from && history ? (*env)->GetIntArrayElements(env, history, NULL) : NULL;
    int32_t id = 0;
    if (from) {
        const jsize count = past ? (*env)->GetArrayLength(env, history) : 0;
        throws(env, hb_sample(s, from, (const int32_t *)past, (uint32_t)count, &id));
        (*env)->ReleaseFloatArrayElements(env, logits, from, JNI_ABORT);
    }
    if (past) (*env)->ReleaseIntArrayElements(env, history, past, JNI_ABORT);
    return id;
}

JAVA(void, Sampler, close)(JNIEnv *env, jobject self) { hb_sampler_free(take_handle(env, self)); }
