"""Choosing the encoding of every matrix for a budget: bits per weight, bytes of the file, or KL from the float model.

Each matrix is measured alone (`allocation.evaluate`), then the encodings are solved for exactly (`allocation.solve`).
A KL bound is met by converting and measuring on held-out text: the prediction, which adds up errors as if they knew
nothing of each other, is corrected by what was found, until the model lies within a tenth below the bound.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfbyte.converter.allocation.solve import solve
from halfbyte.converter.allocation.table import Measured, Table, bytes_of, matrices, store
from halfbyte.converter.builder import Builder
from halfbyte.converter.recipe import Storage
from halfbyte.converter.weights import Weights
from halfbyte.formats import tiles
from halfbyte.formats.errors import UsageError
from halfbyte.formats.metadata import Value

NEAR = 0.02  # bits that the result may be away from --target-bits
LEAST = 0.9  # of a KL bound: below it a smaller file may do
ROUNDS = 8

Progress = Callable[[str, int, int], None]
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def parse_size(text: str | int | None) -> int | None:
    """'1.2G', '800M', '300 kB', '64MiB' or plain bytes -> bytes; numbers and None as they are. Raises UsageError."""
    if not isinstance(text, str):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KkMG]i?)?[Bb]?\s*", text)
    size = 0 if found is None else int(float(found[1]) * UNITS[(found[2] or "").replace("k", "K")])
    if size < 1:
        raise UsageError(f"{text!r} is not a size; write 800M, 1.2G or a number of bytes")
    return size


@dataclass(frozen=True)
class Goal:
    """One of: bits per weight over all matrices, bytes of the whole file, mean KL in nats a token."""

    bits: float | None = None
    nbytes: int | None = None
    kld: float | None = None

    def __bool__(self) -> bool:
        return any(v is not None for v in (self.bits, self.nbytes, self.kld))

    def check(self) -> None:
        """Raises UsageError for two goals at once, or one that is not a positive number."""
        given = [v for v in (self.bits, self.nbytes, self.kld) if v is not None]
        if len(given) > 1:
            raise UsageError("choose one of --target-bits, --max-bytes and --max-kld")
        if any(not (0 < v < np.inf) for v in given):
            raise UsageError(f"a goal must be a positive number, not {given[0]:g}")


class Allocation:
    """The search for one builder. `choose` leaves the builder with the storages found."""

    def __init__(self, b: Builder, measured: dict[str, dict[str, Measured]]):
        self.b, self.measured = b, measured
        self.free = [t for t in matrices(b) if t.name in measured]
        self.weights = sum(t.shape[0] * t.shape[1] for t in matrices(b))
        self.fixed = sum(bytes_of(t) for t in matrices(b) if t.name not in measured)
        self.names = [list(measured[t.name]) for t in self.free]
        self.sizes = [[bytes_of(t, Storage(e)) for e in row] for t, row in zip(self.free, self.names)]
        self.klds = [[measured[t.name][e].kld for e in row] for t, row in zip(self.free, self.names)]

    def apply(self, choice: Sequence[int]) -> None:
        """Give the builder's matrices these options."""
        store(self.b, {t.name: Storage(row[k]) for t, row, k in zip(self.free, self.names, choice)})

    def total(self, values: Sequence[Sequence[float]], choice: Sequence[int]) -> float:
        """The sum of a choice's values."""
        return sum(row[k] for row, k in zip(values, choice))

    def bits(self, choice: Sequence[int]) -> float:
        """Bits per weight over all matrices."""
        return 8 * (self.fixed + self.total(self.sizes, choice)) / self.weights

    def lightest(self) -> list[int]:
        """The smallest option of every matrix."""
        return [int(np.argmin(row)) for row in self.sizes]

    def for_bits(self, bits: float) -> list[int]:
        """At most `bits` a weight; up to NEAR more only if nothing lies within NEAR below."""
        for budget in (bits, bits + NEAR):
            choice = solve(self.sizes, self.klds, budget * self.weights / 8 - self.fixed)
            if choice is not None and self.bits(choice) >= min(bits, self._most()) - NEAR:
                return choice
        if choice is None:
            raise UsageError(
                f"{bits:g} bits is too few: the smallest plan has {self.bits(self.lightest()):.3f}"
            )
        return choice

    def _most(self) -> float:
        return self.bits([int(np.argmax(row)) for row in self.sizes])

    def for_bytes(self, nbytes: int, length: Callable[[], int]) -> list[int]:
        """A file of at most `nbytes`; length() gives that of a file with the builder's present storages."""
        padded = [[tiles.align(n) for n in row] for row in self.sizes]
        lightest = self.lightest()
        self.apply(lightest)
        least = length()
        choice = solve(padded, self.klds, nbytes - (least - self.total(padded, lightest)))
        if choice is None:
            raise UsageError(f"{nbytes} bytes is too few: the smallest file of this model has {least}")
        return choice

    def for_kld(self, bound: float, measure: Callable[[], float]) -> list[int]:
        """Measured KL within LEAST and 1 times the bound; the smallest found below it if nothing lies there."""
        ratio, below, above = (
            1.0,
            np.inf,
            0.0,
        )  # measured over predicted; bytes known to be enough, and too few
        best: list[int] | None = None
        seen: dict[tuple[int, ...], float] = {}
        aim = (1 + LEAST) / 2 * bound
        for _ in range(ROUNDS):
            choice = solve(self.klds, self.sizes, aim / ratio) or [int(np.argmin(row)) for row in self.klds]
            size = self.total(self.sizes, choice)
            if seen and (not above < size < below or tuple(choice) in seen) and np.isfinite(below) and above:
                choice = solve(self.sizes, self.klds, (below + above) / 2) or self.lightest()
                size = self.total(self.sizes, choice)
            if tuple(choice) in seen:
                break
            self.apply(choice)
            found = seen[tuple(choice)] = measure()
            if found <= bound and size < below:
                best, below = choice, size
            elif found > bound:
                above = max(above, size)
            if LEAST * bound <= found <= bound:
                break
            ratio = found / max(self.total(self.klds, choice), 1e-12)
        if best is None:
            raise UsageError(
                f"a mean KL of {bound:g} cannot be reached: the closest was {min(seen.values()):.6f}"
            )
        return best


def choose(
    b: Builder,
    goal: Goal,
    method: str,
    sequences: Sequence[Sequence[int]],
    weights: Weights,
    meta: dict[str, Value],
    folder: Path,
    *,
    held_out: Sequence[Sequence[int]],
    length: Callable[[], int],
    convert: Callable[[Path], None],
    progress: Progress | None = None,
) -> Table:
    """Measure, solve, and leave the builder with the storages chosen; `folder` takes temporary files.

    convert(path) writes a file with the builder's present storages. Raises UsageError for a goal out of reach.
    """
    from halfbyte.converter.allocation import evaluate

    with tempfile.TemporaryDirectory(prefix=".halfbyte-", dir=folder) as temporary:
        scratch = evaluate.Scratch(b, weights, Path(temporary) / "float.hb", meta)
        a = Allocation(b, evaluate.Sensitivity(b, weights, sequences, scratch, method).run(progress))

        def measure() -> float:
            trial = Path(temporary) / "trial.hb"
            convert(trial)
            reference = evaluate.logits(scratch.path, held_out, "f32")
            return evaluate.divergence(reference, evaluate.logits(trial, held_out))

        if goal.bits is not None:
            choice = a.for_bits(goal.bits)
        elif goal.nbytes is not None:
            choice = a.for_bytes(goal.nbytes, length)
        else:
            assert goal.kld is not None
            choice = a.for_kld(goal.kld, measure)
        a.apply(choice)
    return Table.of(b, method, a.measured)
