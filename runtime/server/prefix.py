"""Prompts that were seen, with their keys and values: a new prompt continues the one it shares most with.

Entries are forks, so they share pages with the sequences they came from and with each other; a sequence that
goes on from one copies only the page it writes. The least recently used go first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

import numpy as np

from halfbyte.runtime.kv import KV

LEAST = 16  # tokens; shorter prefixes are not worth an entry
MAX_ENTRIES = 512


class Prefixes:
    """A cache of (tokens, keys and values), at most `limit` bytes; a page shared by entries counts once."""

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes = 0
        self.hits = self.misses = 0
        self._entries: OrderedDict[int, tuple[np.ndarray, KV]] = OrderedDict()
        self._uses: Counter[int] = Counter()  # entries that hold a page, by its identity
        self._next = 0

    def __len__(self) -> int:
        return len(self._entries)

    def kvs(self) -> list[KV]:
        """The caches of all entries."""
        return [kv for _, kv in self._entries.values()]

    def find(self, ids: Sequence[int]) -> tuple[KV, int] | None:
        """A fork of the longest known prefix of `ids` and its length, always shorter than `ids`."""
        wanted = np.asarray(ids, np.int32)[:-1]
        shared = {key: common(entry, wanted) for key, (entry, _) in self._entries.items()}
        for key in sorted(shared, key=lambda k: -shared[k]):
            length = shared[key]
            if length < LEAST:
                break
            fork = self._entries[key][1].fork(length)
            if fork.holds(length):  # else a sliding window has let go of what the next position sees
                self._entries.move_to_end(key)
                return fork, length
        return None

    def count(self, length: int) -> None:
        """A prompt continued `length` tokens that were found, or none."""
        self.hits += length > 0
        self.misses += length == 0

    def add(self, ids: Sequence[int], kv: KV) -> None:
        """Remember the first len(ids) positions of `kv`; entries that this one contains are dropped."""
        if len(ids) < LEAST or not self.limit:
            return
        new = np.asarray(ids, np.int32)
        fork = kv.fork(len(new))
        for key, (entry, _) in list(self._entries.items()):
            same = common(entry, new)
            if same == len(entry) and (same == len(new) or fork.fork(same).holds(same)):
                self._drop(key)
        self._entries[self._next] = new, fork
        self._next += 1
        for page in _pages(fork):
            self._uses[id(page)] += 1
            if self._uses[id(page)] == 1:
                self.nbytes += page.bytes.nbytes
        while self._entries and (self.nbytes > self.limit or len(self._entries) > MAX_ENTRIES):
            self.evict()

    def evict(self) -> bool:
        """Forget the entry used longest ago; False when there is none."""
        if not self._entries:
            return False
        self._drop(next(iter(self._entries)))
        return True

    def _drop(self, key: int) -> None:
        _, kv = self._entries.pop(key)
        for page in _pages(kv):
            self._uses[id(page)] -= 1
            if not self._uses[id(page)]:
                del self._uses[id(page)]
                self.nbytes -= page.bytes.nbytes


def common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _pages(kv: KV) -> list:
    return [page for row in kv.pages for page in row if page is not None]
