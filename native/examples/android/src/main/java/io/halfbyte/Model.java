package io.halfbyte;

/** An open file bound to this machine. Close sessions before their model. Calls on one model take turns. */
public final class Model implements AutoCloseable {
    static {
        System.loadLibrary("halfbyte_jni");
    }

    long handle;

    private Model(long handle) {
        this.handle = handle;
    }

    /** Opens a path. threads: 0 for the caller's alone, -1 for one a processor; kv: a mode, or null for the best. */
    public static Model open(String path, int threads, String kv) {
        return new Model(openPath(path, threads, kv));
    }

    /** Opens bytes of an open file, such as an uncompressed asset: AssetFileDescriptor gives all three. */
    public static Model open(int fd, long offset, long length, int threads, String kv) {
        return new Model(openFd(fd, offset, length, threads, kv));
    }

    /** What a file needs in bytes: mapped, for the model, and for a session of so many positions. */
    public static native long[] fit(String path, int threads, String kv, int positions);

    public native int vocabSize();

    public native int contextLength();

    /** The mode of keys and values. */
    public native String kv();

    /** The digest of the file, 32 bytes. */
    public native byte[] digest();

    /** Token ids that end an answer. */
    public native int[] eosIds();

    /** While on, feeding stops within a fraction of a step with HB_ERROR_CANCELLED; from any thread. */
    public native void cancel(boolean on);

    @Override
    public native void close();

    private static native long openPath(String path, int threads, String kv);

    private static native long openFd(int fd, long offset, long length, int threads, String kv);
}
