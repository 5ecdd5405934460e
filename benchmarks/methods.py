"""What each quantisation method gains over searched round-to-nearest at equal bits, on held-out text.

    python benchmarks/methods.py DATA [--models tinystories-656k ...] [--encodings q4 i4:128] [--also NAME=FOLDER ...]

DATA is the folder of real models and texts. Calibration and test text are disjoint parts. Every matrix but the
embedding gets the encoding; the (tied) embedding stays q8 in every row, so rows of a table have equal bits. Weights
are decoded to f32 and run under policy f32: the figures are of the weights alone. `--also` adds a row for a folder of
decoded weights that another tool wrote.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import halfbyte
import halfbyte.runtime.bench
from halfbyte.converter import models
from halfbyte.converter.blas import Products
from halfbyte.converter.builder import Builder, Matrix, Vector
from halfbyte.converter.calibrate import Calibration
from halfbyte.converter.calibration.statistics import Statistics
from halfbyte.converter.checkpoints import open_checkpoint
from halfbyte.converter.fold import Fold
from halfbyte.converter.quantizers import _planes, autoround, awq, bias, gptq, rotation, smoothquant
from halfbyte.converter.recipe import recipe
from halfbyte.converter.weights import Weights
from halfbyte.formats.writer import TensorSpec, Writer
from halfbyte.runtime.bench import commit, machine_name
from halfbyte.runtime.evaluate import evaluate, windows

# model: source, tokenizer, text, (test bytes from, to), (calibration bytes from, to), window
MODELS: dict[str, tuple[str, str | None, str, tuple[int, int], tuple[int, int], int]] = {
    "stories260K": (
        "stories260K/stories260K.legacy_f32.bin", "stories260K/tok512.bin", "text/tinystories.txt",
        (200_000, 250_000), (0, 150_000), 256,
    ),
    "tinystories-656k": (
        "tinystories-656k", None, "text/tinystories.txt", (180_000, 250_000), (0, 170_000), 512,
    ),
    "demo": ("", None, "text/tinystories.txt", (180_000, 250_000), (0, 170_000), 512),
    "reference-7m": (
        "reference-7m", None, "reference-7m/heldout.txt", (0, 40_000), (300_000, 420_000), 512,
    ),
}  # fmt: skip


DEMO = Path(halfbyte.runtime.bench.__file__).parent / "demo_model"


@dataclass(frozen=True)
class Inputs:
    """A model, a text to measure on and one to calibrate on, in windows of `ctx` tokens."""

    source: Path
    tokenizer: Path | None
    text: str
    calibration: str
    ctx: int

    @classmethod
    def of(cls, data: Path, name: str) -> Inputs:
        """One of MODELS."""
        source, tokenizer, file, test, calibration, ctx = MODELS[name]
        raw = (data / file).read_bytes()
        text, other = (
            raw[a:z].decode("utf-8", "ignore").replace("<|endoftext|>", "\n\n")
            for a, z in (test, calibration)
        )
        where = data / source if source else DEMO
        return cls(where, None if tokenizer is None else data / tokenizer, text, other, ctx)


class Bench:
    """One model: its float file, calibration ids and test text."""

    def __init__(self, inputs: Inputs, folder: Path):
        self.source, self.tokenizer, self.ctx = inputs.source, inputs.tokenizer, inputs.ctx
        self.text, self.calibration_text = inputs.text, inputs.calibration
        self.folder = folder
        self.reference = halfbyte.load(self.convert(self.source, "f32"), policy="f32")
        self.ids = windows(self.reference.tokenizer, self.calibration_text, self.ctx)

    def convert(self, source: Path, name: str) -> Path:
        """The f32 file of a checkpoint."""
        return halfbyte.convert(
            source, self.folder / f"{name}.hb", recipe="f32", tokenizer=self.tokenizer, context=None
        )

    def builder(self) -> Builder:
        """A fresh program."""
        b = Builder(open_checkpoint(self.source, self.tokenizer), recipe("f32"))
        models.build(b)
        return b

    def write(self, b: Builder, matrices: dict[str, np.ndarray]) -> Path:
        """An f32 file of a program, with the weights given by name and the others as they are read."""
        path, weights = self.folder / "candidate.hb", Weights(b)
        records, slots, caches = b.finish()
        with Writer(
            path, meta=dict(self.reference.file.metadata), slots=slots, caches=caches, program=records,
            tensors=[TensorSpec(t.name, "f32", t.shape) for t in b.tensors],
            tokenizer=self.reference.file.section("TOKN"), template="",
        ) as writer:  # fmt: skip
            from halfbyte.formats import tiles

            for i, t in enumerate(b.tensors):
                if isinstance(t, Vector):
                    writer.write(i, "values", 0, t.values)
                else:
                    w = matrices[t.name] if t.name in matrices else weights.rows(t)
                    writer.write(i, "values", 0, tiles.pack_groups(w))
        return path

    def measure(self, path: Path, make: Callable | None = None) -> dict:
        """KL and nll of a file against the float model; `make` replaces the backend."""
        model = halfbyte.load(path, policy="f32", kv="f32", backend="reference" if make else None)
        if make:
            model.backend = make(model.file, "f32")
        return evaluate(model, self.text, ctx=self.ctx, against=self.reference)


class Method:
    """What happens before and while the matrices are quantised, one after another on the quantised prefix."""

    def __init__(self, bench: Bench, encoding: str, group: int):
        self.bench, self.encoding, self.group = bench, encoding, group
        self.b = bench.builder()
        self.fold = Fold(self.b)
        self.weights = Weights(self.b)
        self.calibration = Calibration(self.b, self.weights, bench.ids)

    def coder(self, w: np.ndarray, importance: np.ndarray) -> np.ndarray:
        """Searched round-to-nearest and back."""
        planes = _planes.nearest(w, self.encoding, self.group, "f16", np.ascontiguousarray(importance))
        return _planes.decode(planes, self.encoding, self.group)

    def run(
        self,
        planes: Callable[[np.ndarray, Statistics], _planes.Planes],
        correct: bool = False,
        drift: bool = False,
    ) -> dict[str, np.ndarray]:
        """Decoded matrices; embeddings are q8. `correct` adds mean-bias corrections to the program.

        drift: the statistics also hold what outputs miss, which GPTQ makes up for.
        """
        embeddings = {r.weights[0] for r in self.b._records if r.op == "embed"}
        matrices: dict[str, np.ndarray] = {}
        shifts: dict[int, np.ndarray] = {}
        for i in embeddings:
            t = self.b.tensors[i]
            assert isinstance(t, Matrix)
            matrices[t.name] = _planes.decode(_planes.nearest(self.weights.rows(t), "q8"), "q8")

        def visit(t: Matrix, s: Statistics) -> np.ndarray:
            if t.name not in matrices:
                w = self.weights.rows(t)
                if t.name == "lm_head":  # untied by a rotation: q8 like the embedding
                    matrices[t.name] = _planes.decode(_planes.nearest(w, "q8"), "q8")
                    return matrices[t.name]
                read = matrices[t.name] = _planes.decode(planes(w, s), self.encoding, self.group)
                if correct:
                    shifts[self.b.tensors.index(t)] = bias.correction(w, read, s.mean)
            return matrices[t.name]

        self.calibration.run(visit, drift=drift)
        for i, values in shifts.items():
            bias.apply(self.fold, i, values)
        return matrices

    # ---- how a matrix is quantised --------------------------------------------------------------

    def plain(self, w: np.ndarray, s: Statistics) -> _planes.Planes:
        """Searched round-to-nearest without data."""
        return _planes.nearest(w, self.encoding, self.group)

    def weighted(self, w: np.ndarray, s: Statistics) -> _planes.Planes:
        """The same, columns weighted by their mean square."""
        return _planes.nearest(w, self.encoding, self.group, "f16", s.square)

    def clipped(self, w: np.ndarray, s: Statistics) -> _planes.Planes:
        """AWQ's clip search, then the same."""
        with Products() as products:
            w = awq.clip(w, s.hessian, self.coder, products, self.group)
        return self.weighted(w, s)

    def learned(self, w: np.ndarray, s: Statistics, **options: int) -> _planes.Planes:
        """Learned rounding."""
        return autoround.quantize(w, self.encoding, s.hessian, group=self.group, **options)

    def gptq(self, w: np.ndarray, s: Statistics, **options: int) -> _planes.Planes:
        """Error feedback and descent; what the outputs miss is made up for as in `sequential.quantize`."""
        missing = s.missing(w)
        if missing is not None:
            missing = missing * (s.count / (s.count + w.shape[1]))
        with Products() as products:
            c = gptq.curvature(s.hessian, products, group=32)
            return gptq.quantize(w, self.encoding, c, products, missing=missing, **options)

    def both(self, w: np.ndarray, s: Statistics) -> _planes.Planes:
        """GPTQ, and learned rounding from there."""
        return self.learned(w, s, start=self.gptq(w, s))


def rows(encoding: str) -> list[tuple[str, Callable[[Method], None], str, dict]]:
    """(name, what is folded first, how matrices are quantised, options)."""

    def none(m: Method) -> None:
        pass

    def scaled(m: Method) -> None:
        awq.apply(m.fold, m.calibration, m.coder)

    def turned(m: Method) -> None:
        rotation.residual(m.fold)
        rotation.heads(m.fold)

    out: list[tuple[str, Callable[[Method], None], str, dict]] = [
        ("rtn, searched", none, "plain", {}),
        ("rtn, weighted by mean square", none, "weighted", {}),
        ("awq: scales", scaled, "weighted", {}),
        ("awq: clip", none, "clipped", {}),
        ("awq: scales and clip", scaled, "clipped", {}),
        ("smoothquant 0.5, rtn", lambda m: smoothquant.apply(m.fold, m.calibration) and None, "weighted", {}),
        ("rotation R2, rtn", lambda m: rotation.heads(m.fold) and None, "weighted", {}),
        ("rotation R1 R2, rtn", turned, "weighted", {}),
        ("mean-bias correction, rtn", none, "weighted", {"correct": True}),
        ("autoround: SignSGD alone", none, "learned", {"sweeps": 0}),
        ("autoround: descent alone", none, "learned", {"iterations": 0}),
        ("autoround", none, "learned", {}),
        ("awq scales, autoround", scaled, "learned", {}),
        ("rotation R1 R2, autoround", turned, "learned", {}),
        ("autoround, mean-bias correction", none, "learned", {"correct": True}),
    ]
    if encoding == "q4":
        out += [
            ("gptq (no descent)", none, "gptq", {"passes": 0}),
            ("gptq", none, "gptq", {}),
            ("gptq, drift", none, "gptq", {"drift": True}),
            ("awq scales, gptq", scaled, "gptq", {}),
            ("gptq, autoround from there", none, "both", {}),
        ]
    return out


def weights_table(
    data: Path, name: str, encoding: str, group: int, also: list[str], only: list[str] | None = None
) -> None:
    """Print one table; `only` names its methods."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Inputs.of(data, name), Path(folder))
        print(f"\n**{name}, {encoding}" + (f" group {group}" if encoding != "q4" else "") + "**\n")
        print("| method | nll | KL mean | KL p99 | top-1 % | KL against rtn |\n|---|---|---|---|---|---|")
        base = None

        def line(label: str, path: Path) -> None:
            nonlocal base
            r = bench.measure(path)
            base = base or r["kld_mean"]
            print(
                f"| {label} | {r['nll_per_token']:.5f} | {r['kld_mean']:.6f} | {r['kld_p99']:.5f} |"
                f" {100 * r['top1_agreement']:.2f} | {100 * (r['kld_mean'] / base - 1):+.1f} % |",
                flush=True,
            )

        for label, prepare, how, options in rows(encoding):
            if only and label not in only:
                continue
            m = Method(bench, encoding, group)
            prepare(m)
            correct, drift = (bool(options.pop(o, False)) for o in ("correct", "drift"))
            quantise = getattr(m, how)
            matrices = m.run(lambda w, s, q=quantise, o=options: q(w, s, **o), correct, drift)
            line(label, bench.write(m.b, matrices))
        for pair in also:
            label, _, where = pair.partition("=")
            b = Builder(open_checkpoint(Path(where), None), recipe("f32"))
            models.build(b)
            m = Method(bench, encoding, group)
            embeddings = {b.tensors[r.weights[0]].name for r in b._records if r.op == "embed"}  # type: ignore[index]
            weights = Weights(b)
            matrices = {
                t.name: weights.rows(t) if t.name not in embeddings
                else _planes.decode(_planes.nearest(m.weights.rows(t), "q8"), "q8")
                for t in b.tensors if isinstance(t, Matrix)
            }  # fmt: skip
            line(label, bench.write(m.b, matrices))


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--encodings", nargs="+", default=["q4"], help="q4, or i4:GROUP, a4:GROUP, z4:GROUP")
    parser.add_argument(
        "--only", nargs="+", metavar="METHOD", help="rows of the table, by name; the first is the base"
    )
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=FOLDER")
    args = parser.parse_args()
    print(f"python benchmarks/methods.py; {machine_name()}, commit {commit()}")
    for name in args.models:
        for encoding in args.encodings:
            kind, _, group = encoding.partition(":")
            weights_table(args.data, name, kind, int(group or 32), args.also, args.only)


if __name__ == "__main__":
    main()
