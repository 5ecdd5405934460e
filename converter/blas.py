"""Matrix products whose bits do not depend on the number of threads.

A BLAS library rounds float32 products differently with one thread and with several (OpenBLAS 0.3 does). Here
every call of the library runs on one thread, on tiles of a fixed size, and the tiles are spread over threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

TILE = 512  # rows and columns of a tile of a product


@lru_cache(maxsize=1)
def _openblas() -> tuple[Any, Any] | None:
    """(get, set) of the thread count of the OpenBLAS that NumPy's wheel brings; None for another library."""
    folder = Path(np.__file__).parent
    for path in sorted(
        [*folder.with_name("numpy.libs").glob("*openblas*"), *folder.glob(".dylibs/*openblas*")]
    ):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(str(path))
            for prefix in ("scipy_openblas", "openblas"):
                for suffix in ("64_", ""):
                    names = [f"{prefix}_{verb}_num_threads{suffix}" for verb in ("get", "set")]
                    if all(hasattr(library, name) for name in names):
                        get, set_ = (getattr(library, name) for name in names)
                        return get, set_
    return None


class Products:
    """Threads for matrix products: a context manager. `threads` changes the speed only."""

    def __init__(self, threads: int | None = None):
        self.threads = threads or _cpus()

    def __enter__(self) -> Products:
        self._pool = ThreadPoolExecutor(self.threads)
        self._control = _openblas()
        if self._control:
            self._before = self._control[0]()
            self._control[1](1)
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()
        if self._control:
            self._control[1](self._before)

    def each(self, work: Callable[..., None], parts: Iterable[Any]) -> None:
        """work(part) for every part, on the threads; the first exception is raised."""
        parts = list(parts)
        if self.threads == 1 or len(parts) == 1:
            for part in parts:
                work(part)
            return
        for _ in self._pool.map(work, parts):
            pass

    def matmul(self, a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """a[m, k] @ b[k, n]."""
        if out is None:
            out = np.empty((a.shape[0], b.shape[1]), a.dtype)
        into = out

        def work(part: tuple[slice, slice]) -> None:
            np.matmul(a[part[0]], b[:, part[1]], out=into[part])

        self.each(work, ((r, c) for r in spans(a.shape[0]) for c in spans(b.shape[1])))
        return out

    def add_gram(self, total: np.ndarray, a: np.ndarray, b: np.ndarray | None = None) -> None:
        """total[n, k] += a[m, n]^T b[m, k]; without b, a^T a in the upper triangle of tiles only."""
        other = a if b is None else b
        left = np.empty((a.shape[1], a.shape[0]), a.dtype)

        def turn(r: slice) -> None:
            left[r] = a[:, r].T  # a copy: for equal operands NumPy would call another routine

        def work(part: tuple[slice, slice]) -> None:
            total[part] += left[part[0]] @ other[:, part[1]]

        self.each(turn, spans(total.shape[0]))
        pairs = ((r, c) for r in spans(total.shape[0]) for c in spans(total.shape[1]))
        self.each(work, (p for p in pairs if b is not None or p[1].start >= p[0].start))

    def cholesky(self, a: np.ndarray) -> bool:
        """a[n, n] float64 symmetric -> its lower Cholesky factor in place (the upper part is left over).

        Reads the lower triangle. False when a is not positive definite; a is then spoilt.
        """
        n = a.shape[0]
        for c in spans(n, 256):
            rest = slice(c.stop, n)
            try:
                block = np.linalg.cholesky(a[c, c])
            except np.linalg.LinAlgError:
                return False
            a[c, c] = block
            inverse = np.linalg.inv(block).T
            a[rest, c] = a[rest, c] @ inverse if rest.start < n else a[rest, c]

            def work(r: slice, c: slice = c) -> None:
                left = a[r, c].copy()
                a[r, c.stop : r.stop] -= left @ a[c.stop : r.stop, c].T

            self.each(work, [slice(c.stop + s.start, c.stop + s.stop) for s in spans(n - c.stop, 256)])
        return True


def spans(n: int, tile: int = TILE) -> list[slice]:
    """0..n in slices of at most `tile`."""
    return [slice(i, min(i + tile, n)) for i in range(0, n, tile)]


def mirror(a: np.ndarray) -> None:
    """Copy the upper triangle of a square matrix to the lower one."""
    for s in spans(len(a)):
        a[s.stop :, s] = a[s, s.stop :].T
        a[s, s] = np.triu(a[s, s]) + np.triu(a[s, s], 1).T


def _cpus() -> int:
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:
        return max(1, os.cpu_count() or 1)
