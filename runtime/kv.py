"""Keys and values of one session, in pages of 64 positions.

A page of a cache holds, for each head of keys and values, four tiles of 16 positions of keys and then the
values:

    keys    [4][k_dim][16]   a lane of a vector is a position, so scores need no horizontal sum
    values  [64][v_dim]      a lane is a column of the output

Modes are the stored type: `f32` or `f16` (rounded to nearest even when a row is put). Pages of sliding-window
caches are given up once no later position can see them. A fork shares pages; whoever writes to a shared page
first copies it.
"""

from __future__ import annotations

import numpy as np

from halfbyte.formats.errors import UsageError

MODES: dict[str, type[np.floating]] = {"f32": np.float32, "f16": np.float16}
PAGE = 64  # positions of a page
TILE = 16  # positions of a tile of keys
_ALIGN = 64  # bytes


class Page:
    """64 positions of one cache: `keys` [heads, 4, k_dim, 16] and `values` [heads, 64, v_dim] are views of `memory`.

    A page that is `shared` is never written again.
    """

    __slots__ = ("keys", "memory", "shared", "values")

    def __init__(self, heads: int, k_dim: int, v_dim: int, dtype: type[np.floating]):
        words = heads * PAGE * (k_dim + v_dim)
        raw = np.zeros(words * np.dtype(dtype).itemsize + _ALIGN, np.uint8)
        start = -raw.ctypes.data % _ALIGN
        self.memory = raw[start : start + raw.nbytes - _ALIGN].view(dtype)
        by_head = self.memory.reshape(heads, PAGE * (k_dim + v_dim))
        self.keys = by_head[:, : PAGE * k_dim].reshape(heads, PAGE // TILE, k_dim, TILE)
        self.values = by_head[:, PAGE * k_dim :].reshape(heads, PAGE, v_dim)
        self.shared = False


class KV:
    """The caches of one session.

    `table` uint64[caches, pages] holds the address of every page, 0 where there is none; it is replaced when
    it grows. Positions at or beyond a session's length hold stale values that nothing reads.
    """

    def __init__(self, caches: np.ndarray, mode: str):
        if mode not in MODES:
            raise UsageError(f"unknown kv mode {mode!r}; this version has {', '.join(MODES)}")
        self.caches, self.mode = caches, mode
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
                    fresh = Page(
                        int(cache["kv_heads"]), int(cache["k_dim"]), int(cache["v_dim"]), MODES[self.mode]
                    )
                    if page is not None:
                        fresh.memory[:] = page.memory
                    self._set(c, i, fresh)

    @staticmethod
    def _first_visible(cache: np.void, position: int) -> int:
        window = int(cache["window"])
        return max(0, position + 1 - window) if window else 0

    def _set(self, cache: int, i: int, page: Page | None) -> None:
        self.pages[cache][i] = page
        self.table[cache, i] = 0 if page is None else page.memory.ctypes.data

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
        for c, pages in enumerate(self.pages):
            for i in range(-(-length // PAGE), len(pages)):
                self._set(c, i, None)
            del pages[-(-length // PAGE) :]

    def fork(self, length: int) -> KV:
        """The first `length` positions for another session, sharing the pages."""
        other = KV.__new__(KV)
        other.caches, other.mode = self.caches, self.mode
        count = -(-length // PAGE)
        other.table = self.table[:, :count].copy()
        other.pages = [pages[:count] for pages in self.pages]
        for pages in other.pages:
            for page in pages:
                if page is not None:
                    page.shared = True
        return other

    def put(self, cache: int, start: int, k: np.ndarray, v: np.ndarray) -> None:
        """Store k [kv_heads, n, k_dim] and v [kv_heads, n, v_dim] at reserved positions, in the mode's type."""
        end = start + k.shape[1]
        with np.errstate(over="ignore"):
            for at in range(start // TILE * TILE, end, TILE):
                page = self.pages[cache][at // PAGE]
                assert page is not None and not page.shared
                a, z = max(start, at), min(end, at + TILE)
                tile = page.keys[:, at % PAGE // TILE].transpose(0, 2, 1)  # [heads, 16, k_dim]
                tile[:, a - at : z - at] = k[:, a - start : z - start]
                page.values[:, a % PAGE : a % PAGE + z - a] = v[:, a - start : z - start]

    def read(self, cache: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the keys and values of start <= p < end, as stored: [kv_heads, end - start, k_dim or v_dim]."""
        facts = self.caches[cache]
        heads = int(facts["kv_heads"])
        k = np.empty((heads, end - start, int(facts["k_dim"])), MODES[self.mode])
        v = np.empty((heads, end - start, int(facts["v_dim"])), MODES[self.mode])
        for at in range(start // PAGE * PAGE, end, PAGE):
            page = self.pages[cache][at // PAGE]
            assert page is not None, (cache, at)
            a, z = max(start, at), min(end, at + PAGE)
            rows = page.keys.transpose(0, 1, 3, 2).reshape(heads, PAGE, -1)
            k[:, a - start : z - start] = rows[:, a - at : z - at]
            v[:, a - start : z - start] = page.values[:, a - at : z - at]
        return k, v

    @property
    def nbytes(self) -> int:
        """Bytes held, shared pages included."""
        return sum(p.memory.nbytes for pages in self.pages for p in pages if p is not None)
