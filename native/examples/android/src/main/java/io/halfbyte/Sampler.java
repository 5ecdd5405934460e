package io.halfbyte;

/** Draws tokens: the same ones as C and Python for the same seed. */
public final class Sampler implements AutoCloseable {
    private long handle;

    /** temperature 0 is greedy; topK 0, topP 0 or 1, minP 0 and repetitionPenalty 0 or 1 are off. */
    public Sampler(
            int vocabSize, double temperature, int topK, double topP, double minP, double repetitionPenalty, long seed) {
        handle = create(vocabSize, temperature, topK, topP, minP, repetitionPenalty, seed);
    }

    /** The next token; history, oldest first, is what penalties look at. */
    public native int sample(float[] logits, int[] history);

    @Override
    public native void close();

    private static native long create(
            int vocabSize, double temperature, int topK, double topP, double minP, double repetitionPenalty, long seed);
}
