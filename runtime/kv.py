"""Keys and values of one session: plain arrays per cache, grown by doubling.

Modes are the stored type: `f32` or `f16` (rounded to nearest even when a row is put).
"""

from __future__ import annotations

import numpy as np

from halfbyte.formats.errors import UsageError

MODES: dict[str, type[np.floating]] = {"f32": np.float32, "f16": np.float16}
_FIRST_CAPACITY = 64


class KV:
    """The caches of one session.

    `k[c]` and `v[c]` are [kv_heads, capacity, dim]; positions at or beyond a session's length hold
    stale rows that nothing reads. Backends write through these arrays, so they are refetched every
    step (growing replaces them).
    """

    def __init__(self, caches: np.ndarray, mode: str):
        if mode not in MODES:
            raise UsageError(f"unknown kv mode {mode!r}; this version has {', '.join(MODES)}")
        self.caches, self.mode = caches, mode
        self.capacity = 0
        self.k: list[np.ndarray] = []
        self.v: list[np.ndarray] = []
        self.reserve(_FIRST_CAPACITY)

    def reserve(self, positions: int) -> None:
        """Make room for positions 0 .. positions-1, keeping what is there."""
        if positions <= self.capacity:
            return
        capacity = max(_FIRST_CAPACITY, self.capacity)
        while capacity < positions:
            capacity *= 2
        for arrays, field in ((self.k, "k_dim"), (self.v, "v_dim")):
            fresh = []
            for i, c in enumerate(self.caches):
                a = np.zeros((int(c["kv_heads"]), capacity, int(c[field])), MODES[self.mode])
                if arrays:
                    a[:, : self.capacity] = arrays[i]
                fresh.append(a)
            arrays[:] = fresh
        self.capacity = capacity

    def copy(self, length: int) -> KV:
        """An independent copy of the first `length` positions."""
        other = KV(self.caches, self.mode)
        other.reserve(max(length, 1))
        for mine, theirs in ((self.k, other.k), (self.v, other.v)):
            for a, b in zip(mine, theirs):
                b[:, :length] = a[:, :length]
        return other

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(a.nbytes for a in (*self.k, *self.v))
