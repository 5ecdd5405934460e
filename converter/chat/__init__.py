"""Chat templates as data."""
