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
# Tokens on which the float model is looked at for that H: enough for its rank, as all of them would take a whole pass.
HEAD_TOKENS = 16384


def quantize(
    b: Builder,
    weights: Weights,
    sequences: Sequence[Sequence[int]],
    sink: Sink,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> set[int]:
    """Quantise what `gptq.supports` of the builder's matrices; the indices of the tensors that are whole now.

    Raises UsageError and CheckpointError as calibration and `gptq` do.
    """
    with Products(threads) as products:
        job = _Job(b, weights, sink, products)
        if job.done == job.wanted.keys():
            return job.done
        records, _, _ = b.finish()
        tables, heads = (
            {int(r["w"][0]) for r in records if int(r["code"]) == code} for code in (EMBED, LINEAR)
        )
        calibration = Calibration(b, weights, sequences, threads=threads)
        looked_up = np.concatenate(calibration.ids)
        rows: dict[str, np.ndarray] = {}
        for i in sorted(tables & job.done):
            rows[job.wanted[i].name] = job.stored(i, looked_up)
        for i in sorted(tables & job.wanted.keys() - heads - job.done):
            rows[job.wanted[i].name] = job.code(i, None, TIED_DAMPING, ids=looked_up)
        tied = tables & heads & job.wanted.keys() - job.done
        if tied:
            few, count = [], 0
            for s in calibration.ids:
                few.append(s.tolist())
                count += len(s)
                if count >= HEAD_TOKENS:
                    break
            found: dict[int, Statistics] = {}

            def look(t: Matrix, s: Statistics) -> None:
                found[job.index[t.name]] = s

            Calibration(b, weights, few, threads=threads).run(
                look,
                only={b.tensors[i].name for i in tied},
                progress=progress,
            )
            for i in sorted(tied):
                rows[job.wanted[i].name] = job.code(i, found.pop(i), TIED_DAMPING, ids=looked_up)

        def visit(t: Matrix, s: Statistics) -> np.ndarray | None:
            i = job.index[t.name]
            return None if i not in job.wanted or i in job.done else job.code(i, s, gptq.DAMPING)

        calibration.run(
            visit,
            drift=True,
            only={t.name for i, t in job.wanted.items() if i not in job.done},
            stored=lambda t: job.stored(job.index[t.name]) if job.index[t.name] in job.done else None,
            embedding=lambda t, ids: rows[t.name] if t.name in rows else calibration.embedding(t, ids),
            progress=progress,
        )
        return job.done


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
        hessian = np.eye(cols) if s is None else s.hessian
        assert hessian is not None
        group = encodings.BY_NAME[t.storage.encoding].group or t.storage.group
        c = gptq.curvature(hessian, self.products, group=group, damping=damping)
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
