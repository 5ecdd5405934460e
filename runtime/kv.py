"""Keys and values of one session, in pages of 64 positions (`runtime.kv_page`, modes: `formats.kv_modes`).

Pages of sliding-window caches are given up once no later position can see them. A fork shares pages; whoever
writes to a shared page first copies it.
"""

from __future__ import annotations

import numpy as np

from halfbyte.formats import kv_modes
from halfbyte.formats.kv_modes import PAGE
from halfbyte.runtime.kv_page import Page, new_page


class KV:
    """The caches of one session.

    `table` uint64[caches, pages] holds the address of every page, 0 where there is none; it is replaced when
    it grows; `words` uint32[caches] the modes as the kernels take them. Positions at or beyond a session's
    length hold stale values that nothing reads.
    """

    def __init__(self, caches: np.ndarray, mode: str):
        self.caches, self.mode = caches, mode
        self.modes = kv_modes.by_cache(mode, len(caches))
        self.words = np.array([m.word for m in self.modes], np.uint32)
        self._windows = bool(np.any(caches["window"]))
        self._ready = -1  # a page that every cache has, to itself
        self.pages: list[list[Page | None]] = [[] for _ in caches]
        self.table = np.zeros((len(caches), 0), np.uint64)
        self.reserve(PAGE)

    @property
    def capacity(self) -> int:
        """Positions that the table has room for."""
        return self.table.shape[1] * PAGE

    def reserve(self, end: int, start: int = 0) -> None:
        """Make positions start <= p < end writable, keeping what lies before `start`.

        What no row at or after `start` can see is given up.
        """
        count = -(-end // PAGE)
        if start // PAGE == count - 1 == self._ready and not self._windows:
            return
        if count > self.table.shape[1]:
            grown = np.zeros((len(self.caches), max(count, 2 * self.table.shape[1])), np.uint64)
            grown[:, : self.table.shape[1]] = self.table
            self.table = grown
        for c, (cache, pages) in enumerate(zip(self.caches, self.pages)):
            pages += [None] * (count - len(pages))
            first = self._first_visible(cache, start) // PAGE
            for i in range(first):
                if pages[i] is not None:
                    self._set(c, i, None)
            for i in range(max(first, start // PAGE), count):
                page = pages[i]
                if page is None or page.shared:
                    shape = int(cache["kv_heads"]), int(cache["k_dim"]), int(cache["v_dim"])
                    fresh = new_page(self.modes[c], i, *shape)
                    if page is not None:
                        fresh.bytes[:] = page.bytes
                    self._set(c, i, fresh)
        self._ready = count - 1

    @staticmethod
    def _first_visible(cache: np.void, position: int) -> int:
        window = int(cache["window"])
        return max(0, position + 1 - window) if window else 0

    def _set(self, cache: int, i: int, page: Page | None) -> None:
        self.pages[cache][i] = page
        self.table[cache, i] = 0 if page is None else page.bytes.ctypes.data

    def first(self, cache: int, length: int) -> int:
        """The first position of a cache that is still held, of `length`."""
        pages = self.pages[cache][: -(-length // PAGE)]
        missing = next((len(pages) - i for i, p in enumerate(reversed(pages)) if p is None), 0)
        return min(missing * PAGE, length)

    def holds(self, length: int) -> bool:
        """Whether all that the position after `length` tokens can see is there."""
        return all(
            self.first(c, length) <= self._first_visible(cache, length) for c, cache in enumerate(self.caches)
        )

    def truncate(self, length: int) -> None:
        """Give up pages that hold nothing of the first `length` positions."""
        self._ready = -1
        for c, pages in enumerate(self.pages):
            for i in range(-(-length // PAGE), len(pages)):
                self._set(c, i, None)
            del pages[-(-length // PAGE) :]

    def fork(self, length: int) -> KV:
        """The first `length` positions for another session, sharing the pages."""
        other = KV.__new__(KV)
        self._ready = other._ready = -1
        other.caches, other.mode, other.modes, other.words = self.caches, self.mode, self.modes, self.words
        other._windows = self._windows
        count = -(-length // PAGE)
        other.table = self.table[:, :count].copy()
        other.pages = [pages[:count] for pages in self.pages]
        for pages in other.pages:
            for page in pages:
                if page is not None:
                    page.shared = True
        return other

    def put(self, cache: int, start: int, k: np.ndarray, v: np.ndarray) -> None:
        """Store k [kv_heads, n, k_dim] and v [kv_heads, n, v_dim] at reserved positions, in the cache's mode."""
        end = start + k.shape[1]
        for at in range(start // PAGE * PAGE, end, PAGE):
            page = self.pages[cache][at // PAGE]
            assert page is not None and not page.shared
            a, z = max(start, at), min(end, at + PAGE)
            page.put(a - at, k[:, a - start : z - start], v[:, a - start : z - start])

    def read(self, cache: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the keys and values of start <= p < end: [kv_heads, end - start, k_dim or v_dim].

        Floats as stored, or float64 of packed modes. Keys of two stages have 2 * k_dim columns (`kv_page.decode`), of
        which the first page has zeros in the second half.
        """
        parts = []
        columns = self.modes[cache].k.stages * int(self.caches[cache]["k_dim"])
        for at in range(start // PAGE * PAGE, end, PAGE):
            page = self.pages[cache][at // PAGE]
            assert page is not None, (cache, at)
            a, z = max(start, at), min(end, at + PAGE)
            k, v = (side[:, a - at : z - at] for side in page.read())
            lacking = columns - k.shape[2]
            parts.append([np.pad(k, ((0, 0), (0, 0), (0, lacking))) if lacking else k, v])
        k, v = (np.concatenate(sides, axis=1) for sides in zip(*parts))
        return k, v

    @property
    def nbytes(self) -> int:
        """Bytes held, shared pages included."""
        return sum(p.bytes.nbytes for pages in self.pages for p in pages if p is not None)
