"""What a backend is: it binds a verified file once, then executes steps.

A *step* carries T rows, each with a token id, a position and a session, plus the rows whose
logits are wanted. One session decoding, one prefilling and eight decoding together are the same
call. Backends never see sessions, only their key/value arrays.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from halfbyte.formats.container import File
from halfbyte.formats.errors import UsageError
from halfbyte.formats.ops import BY_CODE
from halfbyte.formats.program import NONE, PICKS
from halfbyte.runtime.arena import Arena
from halfbyte.runtime.kv import KV

# Arithmetic policies: f32 computes with dequantised weights; i8g32 rounds the activations that meet
# integer-coded weights to int8 per 32 columns and uses integer dot products (SPEC.md section 10).
# Every backend has these two; bf16 and f8 are what GPUs multiply fast.
POLICIES = ("f32", "i8g32")
GPU_POLICIES = ("bf16", "f8")


@dataclass
class Step:
    """One pass over the program.

    ids, positions, sessions: int32[T]; sessions index `kvs`; picks: int32[r], rows of the T whose
    logits are returned, in order. Every row's position must already be reserved in its KV, and the
    rows of one session must be in ascending positions.
    """

    ids: np.ndarray
    positions: np.ndarray
    sessions: np.ndarray
    picks: np.ndarray
    kvs: Sequence[KV] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """T."""
        return len(self.ids)


class Backend(ABC):
    """Executes one file's program under one policy. Not thread-safe: the model serialises steps."""

    name = ""
    policies: tuple[str, ...] = POLICIES

    def __init__(self, file: File, policy: str = "i8g32", threads: int | None = None):
        if policy not in self.policies:
            raise UsageError(
                f"unknown arithmetic policy {policy!r}; the {self.name} backend has {', '.join(self.policies)}"
            )
        self.file, self.policy = file, policy
        self.threads = threads or available_cpus()
        self.arena = Arena(file.slots, 1, 1)
        self.result = int(file.program[-1]["out"][0])
        self.bind()

    @abstractmethod
    def bind(self) -> None:
        """Prepare everything that does not change from step to step."""

    @abstractmethod
    def run_range(self, step: Step, first: int, last: int) -> None:
        """Execute records first <= i < last on the arena; `begin` was called for this step."""

    def new_kv(self, mode: str) -> KV:
        """Empty caches for a session."""
        return KV(self.file.caches, mode)

    def begin(self, step: Step) -> None:
        """Make the arena large enough for the step. Growing drops the contents."""
        if not self.arena.fits(step.rows, len(step.picks)):
            tokens, picks = max(step.rows, self.arena.tokens), max(len(step.picks), self.arena.picks)
            self.arena = Arena(self.file.slots, tokens, picks)

    def run(self, step: Step) -> np.ndarray:
        """Execute the step; float32[r, vocab] logits of the picked rows (a copy)."""
        self.begin(step)
        self.run_range(step, 0, len(self.file.program))
        return self.arena.view(self.result, len(step.picks)).copy()

    @cached_property
    def _head(self) -> int:
        """The record that makes the logits: the last matrix of the program."""
        return max(i for i, r in enumerate(self.file.program) if BY_CODE[int(r["code"])].name == "linear")

    @property
    def states_slot(self) -> int:
        """The slot that the logits are made from."""
        return int(self.file.program[self._head]["in"][0])

    def run_to_states(self, step: Step) -> np.ndarray:
        """Execute the step but for its logits; float32[r, width] of the picked rows (a copy)."""
        self.begin(step)
        self.run_range(step, 0, self._head)
        return self.slot(self.states_slot, step).copy()

    def slot(self, i: int, step: Step) -> np.ndarray:
        """float32[T or r, width] view of slot i for this step."""
        rows = len(step.picks) if int(self.file.slots[i]["rows"]) == PICKS else step.rows
        return self.arena.view(i, rows)

    def describe(self) -> dict[str, object]:
        """Facts for `doctor` and `bench`: name, policy, threads and, where known, chosen kernels."""
        return {"backend": self.name, "policy": self.policy, "threads": self.threads}


def available_cpus() -> int:
    """CPUs this process may use."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:
        return max(1, os.cpu_count() or 1)


def operands(record: np.void, name: str) -> list[int | None]:
    """Operand indices of a record, absent ones as None."""
    return [None if int(v) == NONE else int(v) for v in record[name]]
