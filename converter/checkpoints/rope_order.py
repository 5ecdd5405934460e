"""The two orders of the rows of a query or key projection under rotary position embedding.

Half-split (Hugging Face): within a head, row i is rotated together with row i + head_dim / 2.
Interleaved (Meta, llama2.c, GGUF's llama): row 2i is rotated together with row 2i + 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from halfbyte.converter.checkpoints.checkpoint import Packed


def interleaved_rows(start: int, stop: int, head_dim: int) -> np.ndarray:
    """Where the half-split rows start..stop are found in interleaved order (int64 [stop - start])."""
    head, within = np.divmod(np.arange(start, stop, dtype=np.int64), head_dim)
    half, pair = np.divmod(within, head_dim // 2)
    return head * head_dim + 2 * pair + half


def read_half_split(
    read: Callable[[int, int], np.ndarray | Packed], start: int, stop: int, head_dim: int
) -> np.ndarray | Packed:
    """Half-split rows start..stop of a matrix that `read(first, last)` gives in interleaved order.

    Reads at most the heads that the rows belong to.
    """
    if start == stop:
        return read(start, stop)
    rows = interleaved_rows(start, stop, head_dim)
    first, last = int(rows.min()), int(rows.max()) + 1
    stored = read(first, last)
    return stored.take(rows - first) if isinstance(stored, Packed) else stored[rows - first]
