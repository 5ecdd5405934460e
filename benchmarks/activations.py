"""Activations of few bits with one scale a token or a tensor, on models with outlier channels: KL from the float model.

    python benchmarks/activations.py DATA [--models tinystories-656k demo] [--bytes 12000]

No policy of the runtime does this: it rounds activations with a scale for every 32 columns, where an outlier spoils
only its neighbours. Here the reference backend gets another LINEAR, in NumPy: `token` takes the largest value of every
token, `tensor` the largest value of a matrix's inputs on calibration text (static). Weights are q8. The outlier
channels are put in without changing the function: `norm` makes some channels of every norm's weight larger and the
columns that read them smaller, `all` also those of the attended values and of the MLP's products. Text for
calibration and for the test are disjoint.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from methods import MODELS, Bench, Inputs, Method

from halfbyte.converter.blas import Products
from halfbyte.converter.builder import Matrix
from halfbyte.converter.calibration.statistics import Statistics
from halfbyte.converter.fold import Fold
from halfbyte.converter.quantizers import _planes, rotation, smoothquant
from halfbyte.runtime.backends.reference import Reference
from halfbyte.runtime.bench import commit, machine_name

CHANNELS, FACTOR = 3, 60.0  # outlier channels of every site, and how much larger they are


@dataclass(frozen=True)
class Rounding:
    """How activations are rounded: integers of `bits`, the scale of each token or of the whole tensor."""

    bits: int
    per: str  # 'token' | 'tensor'

    def __call__(self, x: np.ndarray, largest: float) -> np.ndarray:
        """float32[T, K] rounded and back; `largest` is the largest |x| of the calibration."""
        most = np.float32(2 ** (self.bits - 1) - 1)
        peak = np.abs(x).max(axis=1, keepdims=True) if self.per == "token" else np.float32(largest)
        scale = np.maximum(peak / most, np.float32(1e-30))
        return np.clip(np.rint(x / scale), -most, most) * scale


ROUNDINGS = (Rounding(8, "token"), Rounding(8, "tensor"), Rounding(4, "token"))


class Rounded(Reference):
    """The reference, whose LINEAR rounds its input; `largest` is by the matrix's index."""

    rounding: Rounding
    largest: dict[int, float]

    def linear(self, step, x, matrix, bias):  # type: ignore[no-untyped-def]
        """y = round(x) @ matrix^T + bias"""
        y = self.rounding(x, self.largest[matrix]) @ self._memo(matrix, "values").T
        b = self._weight(bias)
        return y if b is None else y + b


def put_outliers(fold: Fold, kinds: str, seed: int = 0) -> None:
    """Make CHANNELS channels of every site FACTOR times as large, and the columns that read them smaller.

    kinds: 'all', or the kind of sites ('norm', 'value', 'up'), or '' for none.
    """
    rng = np.random.default_rng(seed)
    for site in fold.sites:
        if not site.obstacle and kinds in (site.kind, "all"):
            s = np.ones(site.width)
            s[rng.choice(site.width, min(CHANNELS, site.width), replace=False)] = 1 / FACTOR
            fold.scale(site, s)


def nothing(m: Method) -> None:
    """The model as it is."""


def smooth(m: Method) -> None:
    """SmoothQuant, alpha 0.5."""
    smoothquant.apply(m.fold, m.calibration)


def offline(m: Method) -> None:
    """The rotations that cost nothing at run time."""
    rotation.residual(m.fold)
    rotation.heads(m.fold)


def online(m: Method) -> None:
    """All rotations; the last is an op of the program."""
    offline(m)
    rotation.online(m.fold)


def both(m: Method) -> None:
    """Smoothed, then rotated."""
    smooth(m)
    online(m)


REMEDIES: dict[str, Callable[[Method], None]] = {
    "nothing": nothing,
    "smooth": smooth,
    "R1 R2": offline,
    "R1 R2 R4": online,
    "smooth, R1 R2 R4": both,
}


class Subject:
    """A model with outliers put in and a remedy folded in, weights rounded to q8."""

    def __init__(self, bench: Bench, kinds: str, remedy: str):
        self.bench = bench
        m = Method(bench, "q8", 32)
        put_outliers(m.fold, kinds)
        REMEDIES[remedy](m)
        index = {t.name: i for i, t in enumerate(m.b.tensors)}
        self.largest: dict[int, float] = {}

        def look(t: Matrix, s: Statistics) -> None:
            self.largest[index[t.name]] = float(s.absmax.max())

        m.calibration.run(look, hessians=False)
        matrices = {
            t.name: _planes.decode(_planes.nearest(m.weights.rows(t), "q8"), "q8")
            for t in m.b.tensors if isinstance(t, Matrix)
        }  # fmt: skip
        self.path = bench.write(m.b, matrices)

    def kld(self, rounding: Rounding) -> float:
        """Mean KL from the float model."""
        made = type("Emulated", (Rounded,), {"rounding": rounding, "largest": self.largest})
        with Products(1):  # threads of a BLAS library only wait for each other at these sizes
            return self.bench.measure(self.path, made)["kld_mean"]


def table(data: Path, name: str, nbytes: int) -> None:
    """Print the table of one model."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Inputs.of(data, name), Path(folder))
        bench.text, bench.ids = bench.text[:nbytes], bench.ids[:32]
        print(f"\n**{name}**, weights q8, {CHANNELS} channels of {FACTOR:g}x, mean KL\n")
        print("| outliers | remedy | " + " | ".join(f"int{r.bits} a {r.per}" for r in ROUNDINGS) + " |")
        print("|---|---|" + "---|" * len(ROUNDINGS))
        for kinds in ("", "norm", "all"):
            for remedy in REMEDIES:
                subject = Subject(bench, kinds, remedy)
                cells = [f"{subject.kld(r):.5f}" for r in ROUNDINGS]
                print(f"| {kinds or 'none'} | {remedy} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", default=["tinystories-656k", "demo"], choices=MODELS)
    parser.add_argument("--bytes", type=int, default=12_000, help="of the test text")
    args = parser.parse_args()
    print(f"python benchmarks/activations.py; {machine_name()}, commit {commit()}")
    for name in args.models:
        table(args.data, name, args.bytes)


if __name__ == "__main__":
    main()
