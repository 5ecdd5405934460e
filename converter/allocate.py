"""Choosing the encoding of every matrix for a budget: bits per weight, bytes of the file, or KL from the float model.

Each matrix is measured alone (`allocation.evaluate`), then the encodings are solved for exactly (`allocation.solve`).
A KL bound is met by converting and measuring on held-out text: the prediction, which adds up errors as if they knew
nothing of each other, is corrected by what was found, until the model lies within a tenth below the bound.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfbyte.converter.allocation.solve import solve
from halfbyte.converter.allocation.table import Measured, Table, bytes_of, matrices, output, store
from halfbyte.converter.builder import Builder
from halfbyte.converter.recipe import RECIPES, Storage, base, head
from halfbyte.converter.weights import Weights
from halfbyte.formats import tiles
from halfbyte.formats.errors import UsageError
from halfbyte.formats.metadata import Value

NEAR = 0.02  # bits that the result may be away from --target-bits
LEAST = 0.9  # of a KL bound: below it a smaller file may do
ROUNDS = 8
PLAIN = "q8"  # the encoding that no method but rounding to nearest knows

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

    def uses(self, choice: Sequence[int], encoding: str) -> bool:
        """Whether a choice has the encoding anywhere."""
        return any(row[k] == encoding for row, k in zip(self.names, choice))

    def without(self, encoding: str) -> dict[str, dict[str, Measured]]:
        """What was measured, less one encoding."""
        return {n: {e: m for e, m in row.items() if e != encoding} for n, row in self.measured.items()}

    def rival(self, solved: Callable[[Allocation], list[int]], bits: float) -> list[int] | None:
        """This allocation's solution if it is about as large."""
        try:
            choice = solved(self)
        except UsageError:
            return None
        return choice if self.bits(choice) >= bits - NEAR else None

    def uniform(self, least: float) -> list[list[int]]:
        """The plans of the recipes, with one encoding for all matrices or all but one, of at least so many bits."""
        common = set.intersection(*map(set, self.names)) if self.names else set()
        plans = [[row.index(e) for row in self.names] for e in sorted(common)]
        last = output(self.b).name
        for name in (n for n in RECIPES if base(n) in common):
            own = {t.name: base(name) for t in self.free}
            if last in own and (lifted := head(name, Storage(base(name))).encoding) in self.measured[last]:
                own[last] = lifted
            plan = [row.index(own[t.name]) for t, row in zip(self.free, self.names)]
            if plan not in plans:
                plans.append(plan)
        return [p for p in plans if self.bits(p) >= least]

    def fits(self, choice: Sequence[int], goal: Goal, length: Callable[[], int]) -> bool:
        """Whether a plan lies within a goal of bits or bytes; leaves the builder with it."""
        self.apply(choice)
        return length() <= goal.nbytes if goal.nbytes is not None else self.bits(choice) <= (goal.bits or 0.0)

    def lightest(self) -> list[int]:
        """The smallest option of every matrix."""
        return [int(np.argmin(row)) for row in self.sizes]

    def check(self, goal: Goal, length: Callable[[], int]) -> None:
        """Raise UsageError for bits or bytes that even the lightest plan exceeds; the builder may be left with that."""
        lightest = self.lightest()
        if goal.bits is not None and self.bits(lightest) > goal.bits + NEAR:
            raise UsageError(
                f"{goal.bits:g} bits is too few: the smallest plan has {self.bits(lightest):.3f}"
            )
        if goal.nbytes is not None:
            self.apply(lightest)
            if (least := length()) > goal.nbytes:
                raise UsageError(
                    f"{goal.nbytes} bytes is too few: the smallest file of this model has {least}"
                )

    def for_bits(self, bits: float) -> list[int]:
        """The best plan of bits - NEAR to bits a weight; where none lies there, of up to NEAR more."""
        least, most = ((bits + d) * self.weights / 8 - self.fixed for d in (-NEAR, 0.0))
        closest = [int(np.argmin(row)) for row in self.klds]
        if self.total(self.sizes, closest) <= least:
            return closest
        best = solve(self.sizes, self.klds, most)
        if best is not None and self.total(self.sizes, best) >= least:
            return best
        near = most + NEAR * self.weights / 8
        # Where steps are coarse the best plan of all may leave more unused than may be.
        for budget in (most, near):
            known = self._filled(least, budget)
            if known is not None:
                return solve(self.sizes, self.klds, budget, least, self.total(self.klds, known)) or known
        return best or solve(self.sizes, self.klds, near) or self.lightest()

    def _filled(self, least: float, most: float) -> list[int] | None:
        """A plan of least..most bytes, found by a growing reward for size."""
        unit = max(map(max, self.klds)) / self.weights
        for k in range(-20, 21):
            costs = [
                list(np.subtract(k_, np.multiply(n, unit * 2.0**k))) for k_, n in zip(self.klds, self.sizes)
            ]
            choice = solve(self.sizes, costs, most)
            if choice is not None and self.total(self.sizes, choice) >= least:
                return choice
        return None

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


def _closest(plans: Sequence[tuple[Allocation, list[int]]], measure: Callable[[], float]) -> tuple:
    """The plan whose conversion is closest to the float model; one alone is not measured."""
    if len(plans) == 1:
        return plans[0]
    found = []
    for a, choice in plans:
        a.apply(choice)
        found.append(measure())
    return plans[int(np.argmin(found))]


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

    unmeasured = dict.fromkeys(evaluate.ENCODINGS, Measured(0.0, 0.0))
    Allocation(b, {t.name: unmeasured for t in matrices(b) if not t.storage.packed}).check(goal, length)
    with tempfile.TemporaryDirectory(prefix=".halfbyte-", dir=folder) as temporary:
        scratch = evaluate.Scratch(b, weights, Path(temporary) / "float.hb", meta)
        s = evaluate.Sensitivity(b, weights, sequences, scratch, method)
        measured = s.run(progress)
        a = Allocation(b, measured)

        def measure(text: Sequence[Sequence[int]], reference: Iterable[np.ndarray]) -> float:
            trial = Path(temporary) / "trial.hb"
            convert(trial)
            return evaluate.divergence(reference, evaluate.logits(trial, text))

        def solved(a: Allocation) -> list[int]:
            return (
                a.for_bytes(goal.nbytes, length) if goal.nbytes is not None else a.for_bits(goal.bits or 0.0)
            )

        if goal.kld is not None:
            choice = a.for_kld(
                goal.kld, lambda: measure(held_out, evaluate.logits(scratch.path, held_out, "f32"))
            )
        else:
            choice = solved(a)
            plans = [(a, choice)]
            if s.small and a.uses(choice, PLAIN):
                # What is rounded plainly cannot make up for errors before it, which no measurement of one matrix
                # shows: try the best plan without.
                rival = Allocation(b, a.without(PLAIN))
                other = rival.rival(solved, a.bits(choice))
                plans += [(rival, other)] if other else []
            if s.small:
                # Nor does any show what later matrices make up for. Where all cost about as much for their size,
                # the best sum gains less than that, and one encoding for all may be better.
                same = (p for p in a.uniform(a.bits(choice) - NEAR) if p != choice)
                plans += [(a, p) for p in same if a.fits(p, goal, length)]
            # on all there is, since plans differ by little
            a, choice = _closest(
                plans, lambda: measure(sequences, evaluate.logits(scratch.path, sequences, "f32"))
            )
        a.apply(choice)
    return Table.of(b, method, measured)
