"""Every matrix quantised in the order of the program, each on the inputs that the ones before it really give.

GPTQ with drift correction: the float model's activations are carried along, and each matrix also makes up for what
its inputs and its residual already miss (arXiv 2504.02692, 2504.09629). Embedding tables come first, so that all the
layers see them quantised; a table that is the output matrix as well is rounded for both uses at once.

A matrix is a unit of work: its planes are handed to the sink block by block and never all held. Matrices that an
earlier run finished are read back instead, and the walk goes on behind them with the same inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from halfbyte.converter.assemble import Sink
from halfbyte.converter.blas import Products, spans
from halfbyte.converter.builder import Builder, Matrix
from halfbyte.converter.calibrate import Calibration, Progress, Statistics
from halfbyte.converter.calibration.cuts import EMBED, LINEAR
from halfbyte.converter.quantizers import gptq
from halfbyte.converter.weights import Weights
from halfbyte.formats import encodings

BLOCK_WEIGHTS = 1 << 24  # weights of a matrix in work at once: 64 MiB as float32

# The loss of an output matrix is e H e^T. As an embedding, an error counts alike in every direction; in units of the
# mean diagonal of H it counts this much, measured on tied models of 0.7 to 7 M weights (benchmarks/LOG.md).
TIED_DAMPING = 0.5
# Tokens on which the float model is looked at for that H, at least, and for every column: enough for its rank, as all
# of them would take a whole pass. On tinystories-656k the KLs from 16384 and from 8192 differ by less than 2 %.
HEAD_TOKENS, HEAD_TOKENS_A_COLUMN = 8192, 4


def quantize(calibration: Calibration, sink: Sink, *, progress: Progress | None = None) -> set[int]:
    """Quantise what `gptq.supports` of a builder's matrices; the indices of the tensors that are whole now.

    Raises UsageError and CheckpointError as calibration and `gptq` do.
    """
    b = calibration.b
    with Products(calibration.threads) as products:
        job = _Job(b, calibration.weights, sink, products)
        todo = job.wanted.keys() - job.done
        if not todo:
            return job.done
        records, _, _ = b.finish()
        tables, heads = (
            {int(r["w"][0]) for r in records if int(r["code"]) == code} for code in (EMBED, LINEAR)
        )
        tied = {job.wanted[i].name for i in tables & heads & todo}
        few = calibration.on(_some(calibration.ids, max(HEAD_TOKENS, HEAD_TOKENS_A_COLUMN * b.hidden)))
        others = {job.wanted[i].name for i in todo - tables}
        efforts = [
            sum(_effort(job.wanted[i]) for i in tables & todo),
            few.effort(only=tied) if tied else 0,
            calibration.effort(drift=True, only=others, visits=_effort),
        ]
        done = 0

        def report(name: str, part: int, _: int) -> None:
            if progress:
                progress(name, done + part, sum(efforts))

        found: dict[str, Statistics] = {}
        if tied:

            def look(t: Matrix, s: Statistics) -> None:
                found[t.name] = s

            few.run(look, only=tied, progress=report)
            done += efforts[1]
        looked_up = np.concatenate(calibration.ids)
        rows: dict[str, np.ndarray] = {}
        for i in sorted(tables & job.wanted.keys()):
            name = job.wanted[i].name
            if i in todo:
                rows[name] = job.code(i, found.pop(name, None), TIED_DAMPING, ids=looked_up)
                done += _effort(job.wanted[i])
                report(name, 0, 0)
            else:
                rows[name] = job.stored(i, looked_up)

        coded = set(rows)

        def embedding(t: Matrix, ids: np.ndarray) -> np.ndarray:
            return rows.pop(t.name) if t.name in coded else calibration.embedding(t, ids)  # looked up once

        def visit(t: Matrix, s: Statistics) -> np.ndarray:
            return job.code(job.index[t.name], s, gptq.DAMPING)

        calibration.run(
            visit,
            drift=True,
            only=others,
            stored=lambda t: job.stored(job.index[t.name]) if job.index[t.name] in job.done else None,
            embedding=embedding,
            visits=_effort,
            progress=report,
        )
        return job.done


def _some(sequences: Sequence[np.ndarray], tokens: int) -> list[list[int]]:
    """The first sequences, of at least so many tokens."""
    out, count = [], 0
    for s in sequences:
        out.append(s.tolist())
        count += len(s)
        if count >= tokens:
            break
    return out


def _effort(t: Matrix) -> int:
    """Multiply-adds of GPTQ: a factorisation, a pass forward, one for drift, and coordinate descent."""
    rows, cols = t.shape
    return cols * cols * (cols // 3 + rows * (gptq.PASSES + gptq.PASSES // 2 + 1))


class _Job:
    """The matrices to do, and those done."""

    def __init__(self, b: Builder, weights: Weights, sink: Sink, products: Products):
        self.weights, self.sink, self.products = weights, sink, products
        self.index = {t.name: i for i, t in enumerate(b.tensors)}
        self.wanted = {
            i: t
            for i, t in enumerate(b.tensors)
            if isinstance(t, Matrix) and not t.storage.packed and gptq.supports(t.storage.encoding)
        }
        self.done = sink.whole & self.wanted.keys()

    def stored(self, i: int, ids: np.ndarray | None = None) -> np.ndarray:
        """float32 of a matrix that is done: all of it, or its rows `ids`."""
        t = self.wanted[i]
        out = np.empty((t.shape[0] if ids is None else len(ids), t.shape[1]), np.float32)
        for block in self._blocks(t):
            self._take(out, ids, block, self.sink.stored(i, block.start, block.stop))
        return out

    @staticmethod
    def _blocks(t: Matrix) -> list[slice]:
        rows, cols = t.shape
        return spans(rows, max(gptq.LANES, BLOCK_WEIGHTS // cols // gptq.LANES * gptq.LANES))

    @staticmethod
    def _take(out: np.ndarray, ids: np.ndarray | None, block: slice, w: np.ndarray) -> None:
        """Rows `block` of a matrix into what is made of all of it, or of its rows `ids`."""
        if ids is None:
            out[block] = w
        else:
            here = (ids >= block.start) & (ids < block.stop)
            out[here] = w[ids[here] - block.start]

    def code(
        self, i: int, s: Statistics | None, damping: float, *, ids: np.ndarray | None = None
    ) -> np.ndarray:
        """Quantise and write a matrix; float32 of the result: all of it, or its rows `ids`.

        Without statistics every column counts alike.
        """
        t = self.wanted[i]
        rows, cols = t.shape
        group = encodings.BY_NAME[t.storage.encoding].group or t.storage.group
        c = gptq.curvature(
            np.eye(cols) if s is None else s.take_hessian(),
            self.products,
            group=group,
            damping=damping,
            overwrite=True,
        )
        out = np.empty((rows if ids is None else len(ids), cols), np.float32)
        for block in self._blocks(t):
            w = self.weights.rows(t, block.start, block.stop)
            missing = None if s is None else s.missing(w, block.start)
            if s is not None and missing is not None:
                # Of what is regressed on `cols` inputs over `count` tokens, a share of cols / count is chance.
                missing = missing * (s.count / (s.count + cols))
            planes = gptq.quantize(w, t.storage.encoding, c, self.products, missing=missing)
            self.sink(i, block.start, planes)
            w = encodings.dequantize(
                t.storage.encoding, planes["codes"], planes["scales"], group, row=planes["row"]
            )
            self._take(out, ids, block, w)
        self.done.add(i)
        return out
