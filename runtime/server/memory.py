"""What the keys and values of all sequences may take, in bytes."""

from __future__ import annotations

from collections.abc import Iterable

from halfbyte.formats import kv_modes
from halfbyte.formats.errors import UsageError
from halfbyte.runtime.kv import KV, PAGE
from halfbyte.runtime.model import CHUNK, Model


class Memory:
    """A budget. `held` never understates: pages given up are noticed when `recount` is called.

    limit: bytes; at least what `full` sequences of the model's whole context take.
    """

    def __init__(self, model: Model, limit: int | None, full: int = 1):
        modes = kv_modes.by_cache(model.kv_mode, len(model.file.caches))
        self._page_bytes = [  # of the first page of each cache, and of the others
            [int(c["kv_heads"]) * m.head_bytes(i, int(c["k_dim"]), int(c["v_dim"])) for i in (0, 1)]
            for m, c in zip(modes, model.file.caches)
        ]
        self.page_bytes = sum(map(max, self._page_bytes))  # a page of every cache
        self._windows = [int(c["window"]) for c in model.file.caches]
        self.context_length = model.context_length
        least = full * self.of(model.context_length)
        if limit is not None and limit < least:
            raise UsageError(
                f"keys and values of one full context take {least} bytes; {limit} are too few for this model"
            )
        self.limit = max(least, _default_limit()) if limit is None else limit
        self.held = 0

    def of(self, length: int) -> int:
        """Bytes of one sequence of `length` tokens."""
        total = 0
        for (first, other), window in zip(self._page_bytes, self._windows):
            seen = min(length, window + CHUNK + PAGE) if window else length
            total += -(-seen // PAGE) * other + max(first, other)
        return total

    def need(self, kv: KV, start: int, end: int) -> int:
        """Bytes that `kv.reserve(end, start)` would allocate."""
        total = 0
        for (first, other), pages in zip(self._page_bytes, kv.pages):
            for i in range(start // PAGE, -(-end // PAGE)):
                page = pages[i] if i < len(pages) else None
                total += (other if i else first) if page is None or page.shared else 0
        return total

    def recount(self, kvs: Iterable[KV]) -> int:
        """Bytes in use by these caches, each page once; becomes `held`."""
        pages = {id(p): p.bytes.nbytes for kv in kvs for row in kv.pages for p in row if p is not None}
        self.held = sum(pages.values())
        return self.held


def _default_limit() -> int:
    """A quarter of the memory that is free now."""
    from halfbyte.devices.cgroup import memory_room
    from halfbyte.devices.probe import memory

    room = memory_room()
    free = memory()[1]
    return (free if room is None else min(free, room) if free else room) // 4
