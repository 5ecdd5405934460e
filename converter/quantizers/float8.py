"""8-bit floats: rounding to nearest under a scale of a row, of a block, or of the whole matrix.

E4M3 and E5M2 of the OCP 8-bit Floating Point Specification; the largest weight that shares a scale becomes the
largest finite value, 448 or 57344 (Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433).
"""

from __future__ import annotations

import numpy as np

from halfbyte.formats import encodings

LARGEST = {"f8e4m3": 448.0, "f8e5m2": 57344.0}


def amax(w: np.ndarray, group: int, span: int) -> np.ndarray:
    """float32[rows, groups]: the largest magnitude among those that share a scale with a row's group.

    w float32[rows, cols]; group columns (0: all) of span rows (0: all) share a scale.
    """
    rows, cols = w.shape
    groups, width = encodings.group_count(cols, group), group or cols
    padded = np.zeros((rows, groups * width), np.float32)
    padded[:, :cols] = np.abs(w)
    top = padded.reshape(rows, groups, width).max(axis=2)
    step = span or rows
    for a in range(0, rows, step):
        top[a : a + step] = top[a : a + step].max(axis=0)
    return top


def quantize(w: np.ndarray, encoding: str, group: int, top: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w float32[rows, cols] -> (codes uint8[rows, cols], scales float32[rows, groups]); top as of `amax`."""
    from ml_dtypes import float8_e4m3fn, float8_e5m2

    kind = {"f8e4m3": float8_e4m3fn, "f8e5m2": float8_e5m2}[encoding]
    scales = (top / np.float32(LARGEST[encoding])).astype(np.float32)
    by_column = np.repeat(scales, group or w.shape[1], axis=1)[:, : w.shape[1]]
    values = np.divide(w, by_column, out=np.zeros_like(w), where=by_column > 0)
    return values.astype(kind).view(np.uint8), scales
