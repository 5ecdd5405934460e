"""The float weights of a program's matrices, as their checkpoint and the methods' edits make them.

A method that replaces weights before they are quantised (scales folded into a neighbour, a rotation, a
clipping) registers an edit here; calibration and `assemble` both read through it, so both see the change.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from halfbyte.converter.builder import Builder, Matrix
from halfbyte.converter.checkpoints.checkpoint import Packed
from halfbyte.formats.errors import CheckpointError

# edit(block float32[n, cols], number of its first row) -> float32[n, cols]
Edit = Callable[[np.ndarray, int], np.ndarray]


class Weights:
    """Rows of the matrices of a builder, read from its checkpoint a block at a time."""

    def __init__(self, b: Builder):
        self.checkpoint = b.checkpoint
        self._edits: dict[str, list[Edit]] = {}

    def edit(self, name: str, change: Edit) -> None:
        """Apply `change` to every block of rows of the matrix `name` from now on, after earlier edits."""
        self._edits.setdefault(name, []).append(change)

    def edited(self, t: Matrix) -> bool:
        """Whether the matrix differs from its checkpoint (codes that arrived quantised then no longer hold)."""
        return t.name in self._edits

    def stored(self, t: Matrix, start: int, stop: int) -> list[np.ndarray | Packed]:
        """Rows start..stop of the stacked sources, as the checkpoint holds them (edits are not applied)."""
        parts: list[np.ndarray | Packed] = []
        base = 0
        for name in t.sources:
            n = self.checkpoint.shape(name)[0]
            a, z = max(start - base, 0), min(stop - base, n)
            if a < z:
                parts.append(self.checkpoint.read_rows(name, a, z))
            base += n
        return parts

    def rows(self, t: Matrix, start: int = 0, stop: int | None = None) -> np.ndarray:
        """float32[stop - start, cols], edits applied. Raises CheckpointError for values that are not finite."""
        parts = self.stored(t, start, t.shape[0] if stop is None else stop)
        w = np.concatenate([p.dequantize() if isinstance(p, Packed) else p.astype(np.float32) for p in parts])
        for change in self._edits.get(t.name, ()):
            w = np.ascontiguousarray(change(w, start), np.float32)
        check_finite(w, t)
        return w


def check_finite(values: np.ndarray, t: Matrix) -> None:
    """Raise CheckpointError for NaN and infinity."""
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"tensor {' + '.join(t.sources)} holds values that are not finite (NaN or infinity)"
        )
