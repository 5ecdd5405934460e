"""How much of a model's answers each matrix costs: KL at the logits with one matrix quantised and the others float.

The linearity theorem (HIGGS, arXiv 2411.17525) says that small errors add up: KL(model) is about the sum over matrices
of sensitivity * relative squared error, so each matrix can be measured alone. What is put in is not Gaussian noise
but the very error that the method makes there. A scratch file holds the float model; one matrix at a time is written
over and put back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from halfbyte.converter.allocation.rerun import Rerun
from halfbyte.converter.allocation.table import Measured, matrices
from halfbyte.converter.assemble import assemble_float
from halfbyte.converter.blas import Products, spans
from halfbyte.converter.builder import Builder, Matrix
from halfbyte.converter.calibrate import Calibration, Progress, Statistics
from halfbyte.converter.calibration.cuts import EMBED, LINEAR
from halfbyte.converter.quantizers import _planes, gptq
from halfbyte.converter.sequential import TIED_DAMPING
from halfbyte.converter.weights import Weights
from halfbyte.formats import encodings, tiles
from halfbyte.formats.errors import UsageError
from halfbyte.formats.metadata import Value

ENCODINGS = ("q8", "q6", "q5", "q4", "q3", "q2")  # to choose from, most bits first
PROBE = "q4"  # what alone is measured in large models; the others follow by their relative error
SMALL = 50_000_000  # weights up to which every encoding is measured, and the scratch file is f32 (else bf16)
TOKENS = 4096  # to measure on, at most
LOGITS = 1 << 26  # numbers of the float model's logits that are kept: fewer tokens for large vocabularies
LOOK = 1 << 20  # weights that a relative error is estimated on
BLOCK = 1 << 24  # weights in work at once


def logits(path: Path, sequences: Sequence[Sequence[int]], policy: str | None = None) -> Iterator[np.ndarray]:
    """float32[rows, vocab] after every token of the sequences, a few rows at a time."""
    from halfbyte.runtime.model import load

    model = load(path, policy=policy)
    rows = max(16, (1 << 22) // model.vocab_size)
    for ids in sequences:
        session = model.session()
        for start in range(0, len(ids), rows):
            yield session.feed_all(ids[start : start + rows])


def divergence(reference: Iterable[np.ndarray], other: Iterable[np.ndarray]) -> float:
    """Mean KL(reference || other) of logits, in nats a token: log E[e^-d] + E[d] with d the difference, E under P."""
    total, count = 0.0, 0
    for p, q in zip(reference, other):
        weight = np.exp(p - p.max(axis=1, keepdims=True))
        weight /= weight.sum(axis=1, keepdims=True)
        d = p - q
        d -= np.einsum("tv,tv->t", weight, d)[:, None]
        total += float(np.log(np.einsum("tv,tv->t", weight, np.exp(-d, dtype=np.float64))).sum())
        count += len(p)
    return total / count


class Scratch:
    """A file of the float model whose matrices can be written over."""

    def __init__(self, b: Builder, weights: Weights, path: Path, meta: dict[str, Value]):
        from halfbyte.formats.container import File

        self.path, self.weights = path, weights
        small = sum(t.shape[0] * t.shape[1] for t in matrices(b)) <= SMALL
        self.encoding = "f32" if small else "bf16"
        assemble_float(b, path, meta, b"", weights, self.encoding)
        self.offsets = {t.name: t.offset for t in File(path).tensors}

    def write(self, t: Matrix, row: int, w: np.ndarray) -> None:
        """Rows from `row` on (a multiple of 16) of a matrix."""
        data = tiles.pack_groups(encodings.float_to_bits(w, self.encoding))
        with self.path.open("r+b") as file:
            file.seek(self.offsets[t.name] + row * t.shape[1] * data.dtype.itemsize)
            file.write(data.tobytes())

    def restore(self, t: Matrix) -> None:
        """The float weights again."""
        for s in _blocks(t):
            self.write(t, s.start, self.weights.rows(t, s.start, s.stop))


def _blocks(t: Matrix) -> list[slice]:
    return spans(t.shape[0], max(tiles.PANEL, BLOCK // t.shape[1] // gptq.LANES * gptq.LANES))


class Sensitivity:
    """Measures all matrices of a builder that are to be quantised; `run` gives what each encoding costs."""

    def __init__(
        self, b: Builder, weights: Weights, sequences: Sequence[Sequence[int]], scratch: Scratch, method: str
    ):
        self.b, self.weights, self.sequences, self.scratch, self.method = (
            b,
            weights,
            sequences,
            scratch,
            method,
        )
        records, _, _ = b.finish()
        used = {code: {int(r["w"][0]) for r in records if int(r["code"]) == code} for code in (EMBED, LINEAR)}
        self.tables = {b.tensors[i].name for i in used[EMBED]}
        self.lookups = [b.tensors[i] for i in sorted(used[EMBED] - used[LINEAR])]
        tokens = min(TOKENS, LOGITS // b.vocab)
        length = max(2, min(len(max(sequences, key=len)), tokens))
        few = np.unique(np.linspace(0, len(sequences) - 1, max(1, tokens // length)).astype(int))
        self.text = [list(sequences[i][:length]) for i in few]
        self.model = Rerun(scratch.path, self.text)
        self.reference = list(self.model.logits())
        self.learns = method in ("gptq", "autoround")  # whose errors are about the same
        self.small = scratch.encoding == "f32"
        self.found: dict[str, dict[str, Measured]] = {}

    def run(self, progress: Progress | None = None) -> dict[str, dict[str, Measured]]:
        """By matrix and encoding; more bits never count as worse. Packed matrices are left out."""
        wanted = [t for t in matrices(self.b) if not t.storage.packed]
        if not wanted:
            raise UsageError("every matrix arrived quantised, so there is nothing to choose; see --recipe q8")
        with Products() as products:

            def visit(t: Matrix, s: Statistics | None) -> None:
                if t not in wanted or t.name in self.found:
                    return
                self.found[t.name] = self._matrix(t, s, products)
                if progress:
                    progress(f"sensitivity of {t.name}", len(self.found), len(wanted))

            for t in self.lookups:
                assert isinstance(t, Matrix)
                visit(t, None)
            calibration = Calibration(self.b, self.weights, self.sequences)
            calibration.run(visit, hessians=self.learns, only={t.name for t in wanted})
        return self.found

    def _matrix(self, t: Matrix, s: Statistics | None, products: Products) -> dict[str, Measured]:
        out: dict[str, Measured] = {}
        self.model.reach(t.name)
        look = self.weights.rows(t, 0, max(tiles.PANEL, min(t.shape[0], LOOK // t.shape[1])))
        for name in ENCODINGS if self.small else (PROBE,):
            out[name] = self._encoding(t, s, name, products)
        if not self.small:
            one = out.pop(PROBE)
            errors = {n: _relative(look, _planes.decode(_planes.nearest(look, n), n)) for n in ENCODINGS}
            scale = 1 / (errors[PROBE] or 1.0)
            out = {n: Measured(one.kld * e * scale, one.error * e * scale) for n, e in errors.items()}
        self.scratch.restore(t)
        kld = np.maximum.accumulate([out[n].kld for n in ENCODINGS])
        return {n: Measured(float(k), out[n].error) for n, k in zip(ENCODINGS, kld)}

    def _encoding(self, t: Matrix, s: Statistics | None, name: str, products: Products) -> Measured:
        importance = None if s is None or t.name in self.tables else s.square
        feedback = gptq.supports(name) and self.learns
        if feedback:
            hessian = np.eye(t.shape[1]) if s is None else s.hessian
            assert hessian is not None
            damping = TIED_DAMPING if t.name in self.tables else gptq.DAMPING
            c = gptq.curvature(hessian, products, damping=damping)
        off = norm = 0.0
        for block in _blocks(t):
            w = self.weights.rows(t, block.start, block.stop)
            planes = (
                gptq.quantize(w, name, c, products)
                if feedback
                else _planes.nearest(w, name, importance=importance)
            )
            read = _planes.decode(planes, name)
            self.scratch.write(t, block.start, read)
            off += float(((w - read) ** 2).sum(dtype=np.float64))
            norm += float((w**2).sum(dtype=np.float64))
        kld = divergence(self.reference, self.model.logits())
        return Measured(kld, off / norm if norm else 0.0)


def _relative(w: np.ndarray, read: np.ndarray) -> float:
    return float(((w - read) ** 2).sum(dtype=np.float64) / max(float((w**2).sum(dtype=np.float64)), 1e-30))
