"""The threads of the JIT backend, and the compiled loop that runs a list of tasks on them.

Threads are Python's, parked in a queue between steps. During a step they are inside compiled code
without the interpreter's lock and wait for tasks by spinning, so that a task starts at once. A thread
enters a task by compare-and-swap while it is open; the caller closes it and waits only for those
inside, so a thread that has not been scheduled delays nobody.
"""

from __future__ import annotations

import ctypes
import os
import queue
import sys
import threading
from functools import cache
from typing import Any

import numpy as np

from halfbyte.runtime.backends import jit_tiles as w
from halfbyte.runtime.backends.backend import available_cpus
from halfbyte.runtime.backends.jit_intrinsics import (
    atomic_add,
    atomic_load,
    atomic_store,
    call_function,
    call_kernel,
    compare_swap,
    i64_at,
    keyed,
    pause,
)
from halfbyte.runtime.backends.jit_kernels import compiled

MAX_THREADS = max(8, available_cpus())  # they spin, so more than the processors only cost
# Words of the shared state, each group on a cache line of its own. STATE: the low 16 bits count the
# workers inside the task, OPEN says that they may enter, the rest numbers it.
STATE, NEXT, ARGS, COUNT, CHUNK, TICKET, WORDS = 0, 16, 32, 33, 34, 48, 64
INSIDE, OPEN, SHIFT = 0xFFFF, 0x10000, 17
_SPINS = 4000  # waits before the processor is offered to others


def make_run(key: str) -> Any:
    """run(table, first, last, threads, pool, spins, give_way): tasks first <= i < last, each after the last."""

    def run(table, first, last, threads, pool, spins, give_way):
        keyed(key)
        shared, state = i64_at(pool), pool + STATE * 8
        for task in range(first, last):
            args = table + task * (w.WORDS * 8)
            a = i64_at(args)
            kernel, n, chunk = a[w.KERNEL], a[w.COUNT], a[w.CHUNK]
            if threads == 1 or chunk == 0 or n <= chunk:
                for i in range(n):
                    call_kernel(kernel, args, i, 0)
                continue
            shared[ARGS], shared[COUNT], shared[CHUNK] = args, n, chunk
            atomic_store(pool + NEXT * 8, 0)
            atomic_store(state, ((atomic_load(state) >> SHIFT) + 1) << SHIFT | OPEN)
            i = atomic_add(pool + NEXT * 8, chunk)
            while i < n:
                for j in range(i, min(i + chunk, n)):
                    call_kernel(kernel, args, j, 0)
                i = atomic_add(pool + NEXT * 8, chunk)
            atomic_add(state, -OPEN)
            idle = 0
            while atomic_load(state) & INSIDE:
                idle += 1
                if idle < spins:
                    pause()
                else:
                    call_function(give_way)

    return compiled("void(int64, int64, int64, int64, int64, int64, int64)", run)


def make_serve(key: str) -> Any:
    """serve(pool, ticket, worker, spins, give_way): take part in tasks as long as the ticket is valid."""

    def serve(pool, ticket, worker, spins, give_way):
        keyed(key)
        shared, state = i64_at(pool), pool + STATE * 8
        seen, idle = -1, 0
        while True:
            now = atomic_load(state)
            if atomic_load(pool + TICKET * 8) != ticket:  # read after the state: the swap proves both
                return
            if now & OPEN and now >> SHIFT != seen:
                if compare_swap(state, now, now + 1):
                    seen, idle = now >> SHIFT, 0
                    args, n, chunk = shared[ARGS], shared[COUNT], shared[CHUNK]
                    kernel = i64_at(args)[w.KERNEL]
                    i = atomic_add(pool + NEXT * 8, chunk)
                    while i < n:
                        for j in range(i, min(i + chunk, n)):
                            call_kernel(kernel, args, j, worker)
                        i = atomic_add(pool + NEXT * 8, chunk)
                    atomic_add(state, -1)
            else:
                idle += 1
                if idle < spins:
                    pause()
                else:
                    call_function(give_way)

    return compiled("void(int64, int64, int64, int64, int64)", serve)


@cache
def _give_way() -> int:
    """Address of the system's function that offers the processor to other threads, or 0."""
    name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
    try:
        library = ctypes.CDLL("kernel32" if sys.platform == "win32" else None)
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


class Pool:
    """Threads that start when first asked for and stay. One step at a time."""

    def __init__(self) -> None:
        raw = np.zeros(WORDS + 8, np.int64)
        start = -raw.ctypes.data // 8 % 8
        self._words = raw[start : start + WORDS]
        self._address = self._words.ctypes.data
        self._queues: list[queue.SimpleQueue[tuple[Any, int, int]]] = []
        self._ticket = 0

    def run(self, run: Any, serve: Any, table: int, first: int, last: int, threads: int) -> None:
        """Tasks first <= i < last of the table at this address, on so many threads."""
        self._ticket += 1
        spins = _SPINS if threads <= available_cpus() else 1
        while len(self._queues) < threads - 1:
            self._start()
        self._words[TICKET] = self._ticket
        try:
            for waiting in self._queues[: threads - 1]:
                waiting.put((serve, self._ticket, spins))
            run(table, first, last, threads, self._address, spins, _give_way())
        finally:
            self._words[TICKET] = 0

    def _start(self) -> None:
        waiting: queue.SimpleQueue[tuple[Any, int, int]] = queue.SimpleQueue()
        worker, words, give_way = len(self._queues) + 1, self._words, _give_way()

        def work() -> None:
            while True:
                serve, ticket, spins = waiting.get()
                serve(words.ctypes.data, ticket, worker, spins, give_way)

        threading.Thread(target=work, name=f"halfbyte-jit-{worker}", daemon=True).start()
        self._queues.append(waiting)


_pools: list[Pool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # a child has none of the threads


def pool() -> Pool:
    """The pool of this process."""
    if not _pools:
        _pools.append(Pool())
    return _pools[0]
