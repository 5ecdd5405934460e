package io.halfbyte;

/** What the library said, in one line; {@link #status} is an HB_ERROR_* of halfbyte.h. */
public final class HalfbyteException extends RuntimeException {
    private static final long serialVersionUID = 1;

    public final int status;

    HalfbyteException(int status, String message) {
        super(message);
        this.status = status;
    }
}
