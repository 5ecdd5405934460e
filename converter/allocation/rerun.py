"""The float model put by at a layer's start, so that a changed matrix costs the run of what comes after it alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from halfbyte.converter.calibration.cuts import live_slots, used
from halfbyte.formats import ops
from halfbyte.formats.container import File

PUT, ATTEND = (ops.BY_NAME[name].code for name in ("kv_put", "attend"))


class Rerun:
    """Sequences of token ids through a file under policy f32. The file may change behind the point that was reached.

    Between the layers little is live: float32[tokens, hidden] is held, of all sequences. What is computed does not
    depend on the point: a row's results depend on nothing but the row and its cache.
    """

    def __init__(self, path: Path, sequences: Sequence[Sequence[int]]):
        self.path, self.sequences = path, sequences
        file = File(path)
        self._first: dict[str, int] = {}  # record that uses a matrix first
        for i, record in enumerate(file.program):
            for w in used(record["w"]):
                self._first.setdefault(file.tensors[w].name, i)
        self._live = live_slots(file.program, file.slots)
        widths = [sum(int(file.slots[s]["width"]) for s in live) for live in self._live]
        own = [True] * len(file.program)  # no cache that is written before this record is read at it or later
        written: dict[int, int] = {}
        for i, record in enumerate(file.program):
            code, cache = int(record["code"]), int(record["attr"][0])  # the first attribute of both
            if code == PUT:
                written[cache] = i
            elif code == ATTEND:
                for between in range(written.get(cache, -1) + 1, i + 1):
                    own[between] = False
        # As narrow as behind the embedding: between layers.
        self._points = [i for i, n in enumerate(widths) if i == 0 or (own[i] and n <= widths[1])]
        self._at = 0
        # By sequence and first token: the values of the live slots.
        self._kept: dict[tuple[int, int], list[np.ndarray]] = {}

    def reach(self, matrix: str) -> None:
        """Put by what is live where the layer of a matrix starts. Up to there the file must be the float model's."""
        to = max(i for i in self._points if i <= self._first[matrix])
        if to < self._at:
            self._at, self._kept = 0, {}
        if to > self._at:
            kept = {}
            for key, backend, step in self._steps(to):
                kept[key] = [backend.slot(s, step).copy() for s in self._live[to]]
            self._at, self._kept = to, kept

    def logits(self) -> Iterator[np.ndarray]:
        """float32[rows, vocab] after every token of the sequences, a few rows at a time, of the file as it is now."""
        for _, backend, step in self._steps(None):
            yield backend.slot(backend.result, step).copy()

    def _steps(self, to: int | None) -> Iterator[tuple]:
        """Run from the point to record `to` or the end: (sequence, first token), the backend and the step it ran."""
        from halfbyte.runtime.backends.backend import Step
        from halfbyte.runtime.model import CHUNK, load

        model = load(self.path, policy="f32")
        backend, rows = model.backend, min(CHUNK, max(16, (1 << 22) // model.vocab_size))
        for s, ids in enumerate(self.sequences):
            kv = model.new_kv()
            for start in range(0, len(ids), rows):
                part = np.asarray(ids[start : start + rows], np.int32)
                order = np.arange(len(part), dtype=np.int32)
                kv.reserve(start + len(part), start)
                step = Step(part, order + start, np.zeros(len(part), np.int32), order, [kv])
                backend.begin(step)
                for slot, values in zip(self._live[self._at], self._kept.get((s, start), ())):
                    backend.slot(slot, step)[:] = values
                backend.run_range(step, self._at, len(model.file.program) if to is None else to)
                yield (s, start), backend, step
