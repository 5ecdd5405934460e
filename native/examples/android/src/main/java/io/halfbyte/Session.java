package io.halfbyte;

/** A timeline of tokens: feed, go back, branch, save. */
public final class Session implements AutoCloseable {
    private final Model model; // kept alive as long as this
    private long handle;

    /** An empty session of at most so many positions (0: the model's context); reserve: memory taken now. */
    public Session(Model model, int positions, int reserve) {
        this.model = model;
        handle = create(model, positions, reserve);
    }

    private Session(Model model, long handle) {
        this.model = model;
        this.handle = handle;
    }

    /** Appends tokens; logits, of the vocabulary's size or null, receive those after the last one. */
    public native void feed(int[] ids, float[] logits);

    public native int position();

    /** All tokens fed. */
    public native int[] ids();

    /** Forgets the last tokens. */
    public native void rewind(int count);

    /** Another session that goes on from here. */
    public Session fork() {
        return new Session(model, forkHandle());
    }

    public native void save(String path);

    /** A session that this model saved, here or from Python. */
    public static Session load(Model model, String path) {
        return new Session(model, loadHandle(model, path));
    }

    @Override
    public native void close();

    private static native long create(Model model, int positions, int reserve);

    private static native long loadHandle(Model model, String path);

    private native long forkHandle();
}
