"""GPTQ: rounding that spends each column's error in the columns still to come.

For weights w, inputs with second moments H and a result w_hat, the loss is (w - w_hat) H (w - w_hat)^T a row.
With H = U diag(D) U^T, U unit upper triangular, that is the sum over columns of D_k (target_k - w_hat_k)^2 where
target_k = w_k + sum_{j<k} (w_j - w_hat_j) U_jk: rounding the targets in order is GPTQ (arXiv 2210.17323) in the
form of LDLQ (arXiv 2307.13304), without an inverse. Here:

* columns are taken group by group, the groups with the largest second moments first and the columns inside a group
  likewise (group-aware act-order, arXiv 2505.14638): scales stay contiguous and nothing is permuted at run time;
* the scale of a group is searched on its targets, every column weighted by D_k, the loss that remains after the
  columns to come have done their best;
* afterwards, passes of coordinate descent over codes and sub-scales lower the same loss further.

Rows are independent. Results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from halfbyte.converter.blas import Products, spans
from halfbyte.converter.quantizers import _feedback, rtn
from halfbyte.converter.quantizers._scales import scales_of
from halfbyte.formats import encodings
from halfbyte.formats.errors import CheckpointError, UsageError

LANES = 128  # rows of one unit of work
BLOCK = 128  # columns between two matrix products
DAMPING = 0.01  # of the mean diagonal of H
PASSES = 4  # of coordinate descent


@dataclass(frozen=True)
class Curvature:
    """The second moments of a matrix's inputs, damped, permuted and factorised: shared by all rows.

    order   int64[cols]  column of the matrix at each place
    groups  int64[groups + 1]  first place of each group
    number  int64[groups]  which group of the matrix stands there
    h       float32[cols, cols]  damped H in that order
    u       float32[cols, cols]  unit upper factor
    d       float32[cols]  D
    """

    order: np.ndarray
    groups: np.ndarray
    number: np.ndarray
    h: np.ndarray
    u: np.ndarray
    d: np.ndarray


def curvature(
    hessian: np.ndarray,
    products: Products,
    *,
    group: int = 32,
    damping: float = DAMPING,
    act_order: bool = True,
    overwrite: bool = False,
) -> Curvature:
    """Prepare mean(x x^T) float64[cols, cols] for `quantize`. group: columns that share a scale, 0 for the row.

    Damping is added to the diagonal and grows tenfold until the factorisation succeeds. overwrite: work in the memory
    of `hessian`, which is spoilt then (of 8192 columns it has half a gigabyte).
    """
    cols = len(hessian)
    width = group or cols
    diagonal = np.diagonal(hessian).copy()
    mean = float(diagonal.mean())
    if not np.isfinite(mean):
        raise CheckpointError("the activations are not finite: calibration cannot use them")
    mean = mean if mean > 0 else 1.0
    starts = list(range(0, cols, width))
    if act_order:
        peaks = [diagonal[a : a + width].max() for a in starts]
        number = np.argsort(-np.array(peaks), kind="stable")
        order = np.concatenate(
            [a + np.argsort(-diagonal[a : a + width], kind="stable") for a in (starts[n] for n in number)]
        )
    else:
        number, order = np.arange(len(starts)), np.arange(cols)
    sizes = [min(starts[n] + width, cols) - starts[n] for n in number]
    damp = damping * mean
    work = hessian if overwrite else hessian.copy()
    _permute(work, order[::-1])  # reversed: its lower factor is our upper one
    work[np.diag_indices(cols)] += damp
    h = np.ascontiguousarray(work[::-1, ::-1], np.float32)
    while not products.cholesky(work):
        damp = max(damp, 1e-8 * mean) * 10
        work[:] = h[::-1, ::-1]  # a failed attempt leaves nothing of it
        work[np.diag_indices(cols)] = diagonal[order[::-1]] + damp
        np.fill_diagonal(h, np.diagonal(work)[::-1])
    root = np.diagonal(work)[::-1].copy()
    u = np.zeros((cols, cols), np.float32)
    for s in spans(cols):  # column j of u is row cols-1-j of the factor, over its diagonal
        u[:, s] = np.triu(work[::-1, ::-1][:, s], -s.start) / root[s]
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    return Curvature(order, bounds, number, h, u, (root**2).astype(np.float32))


def _permute(a: np.ndarray, order: np.ndarray) -> None:
    """a[n, n] -> a[order][:, order], in place."""
    for s in spans(len(a)):
        a[:, s] = a[order, s]
    for s in spans(len(a)):
        a[s] = a[s][:, order]


@lru_cache
def tables(encoding: str) -> tuple[np.ndarray, np.ndarray]:
    """(level float32, code uint8 or int8) over half units, see `_feedback`; for integer levels within -256..255."""
    e = encodings.BY_NAME[encoding]
    levels = np.asarray(e.levels if e.levels is not None else range(-127, 128) if e.signed else range(256))
    codes = levels.astype(np.int8) if e.signed else np.arange(len(levels), dtype=np.uint8)
    y = np.arange(-_feedback.HALF, _feedback.HALF) / 2 + 0.25  # the middle of each half unit: never a tie
    nearest = np.abs(y[:, None] - levels).argmin(axis=1)
    return levels[nearest].astype(np.float32), codes[nearest]


def supports(encoding: str) -> bool:
    """Whether `quantize` knows the encoding: the q family, and integers with float scales, minima or zero points."""
    return encodings.BY_NAME[encoding].row_scale or encoding in rtn.AFFINE


def quantize(
    w: np.ndarray,
    encoding: str,
    c: Curvature,
    products: Products,
    *,
    missing: np.ndarray | None = None,
    passes: int = PASSES,
    scale_type: str = "f16",
) -> dict[str, np.ndarray]:
    """w[rows, cols] -> the planes of an encoding: codes uint8[rows, cols] (int8 for i8) and, of every group, scales.

    The q family has scales uint8[rows, groups] and row uint8[rows]. The others have float32 scales and mins that
    `scale_type` holds exactly, and uint8 zeros, as `rtn.quantize_affine` gives them; their groups are those of the
    curvature.

    missing[rows, cols]: mean(y x^T), y being what the outputs miss because their inputs, or the residual that they
    are added to, already deviate from the float model. The part of y that is linear in x is made up for: the target
    becomes w + missing H^-1, which is exact where GPTAQ (arXiv 2504.02692) approximates.

    passes: of coordinate descent after rounding. Raises UsageError for an encoding that `supports` does not know,
    CheckpointError for scales that do not fit their type.
    """
    if not supports(encoding):
        raise UsageError(f"gptq does not know encoding {encoding}")
    if scale_type not in encodings.FLOAT_BYTES:
        raise UsageError(f"gptq does not know scales {scale_type}")
    rows, cols = w.shape
    e = encodings.BY_NAME[encoding]
    out: dict[str, np.ndarray] = {"codes": np.zeros((rows, cols), np.int8 if e.signed else np.uint8)}
    if e.row_scale:
        out |= {
            "scales": np.zeros((rows, len(c.number)), np.uint8),
            "row": np.zeros(rows, np.uint8),
        }
    else:
        out["scales"] = np.zeros((rows, len(c.number)), np.float32)
        if e.offset:
            out[f"{e.offset}s"] = np.zeros(
                (rows, len(c.number)), np.float32 if e.offset == "min" else np.uint8
            )

    def work(s: slice) -> None:
        lanes = _Rows(w[s], None if missing is None else missing[s], encoding, scale_type, c)
        lanes.round()
        for _ in range(passes):
            if not lanes.descend():
                break
        lanes.store({name: plane[s] for name, plane in out.items()})

    products.each(work, spans(rows, LANES))
    return out


class _Rows:
    """A few rows on their way: arrays [cols, lanes] in the order of the curvature, scaled below 1."""

    def __init__(
        self, w: np.ndarray, missing: np.ndarray | None, encoding: str, scale_type: str, c: Curvature
    ):
        self.c = c
        self.level, self.code = tables(encoding)
        self.scales = scales_of(encoding, self.level, scale_type)
        target = np.asarray(w, np.float32)
        if missing is not None:
            target = target + self._solve(missing).T
        peak = np.abs(target).max(axis=1)
        self.dead = peak < self.scales.smallest
        # An exact power of two brings every row below 1, so that no square over- or underflows.
        exponent = np.where(self.dead, 0, np.ceil(np.log2(np.where(self.dead, 1, peak)))).astype(np.int64)
        self.w = np.ascontiguousarray(np.ldexp(target, -exponent[:, None].astype(np.int32)).T[c.order])
        self.w[:, self.dead] = 0
        self.scales.begin(self.w, c.d, c.groups, exponent)
        self.q = np.empty_like(self.w)
        self.error = np.empty_like(self.w)

    def _solve(self, missing: np.ndarray) -> np.ndarray:
        """[cols, lanes] in the matrix's order: missing H^-1, by H = U D U^T."""
        c = self.c
        y = np.ascontiguousarray(missing.T[c.order], np.float32)
        blocks = spans(len(y), BLOCK)
        for s in reversed(blocks):
            if s.stop < len(y):
                y[s] -= c.u[s, s.stop :] @ y[s.stop :]
            _feedback.solve_block(np.ascontiguousarray(c.u[s, s]), y[s], False)
        y /= c.d[:, None]
        for s in blocks:
            if s.start:
                y[s] -= c.u[: s.start, s].T @ y[: s.start]
            _feedback.solve_block(np.ascontiguousarray(c.u[s, s]), y[s], True)
        out = np.empty_like(y)
        out[c.order] = y
        return out

    def _blocks(self) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
        """Blocks of about BLOCK columns, and their groups with the columns of each."""
        starts, g = self.c.groups.tolist(), 0
        while g < len(self.c.number):
            h = g + 1
            while h < len(self.c.number) and starts[h + 1] - starts[g] <= BLOCK:
                h += 1
            yield slice(starts[g], starts[h]), [(i, slice(starts[i], starts[i + 1])) for i in range(g, h)]
            g = h

    def round(self) -> None:
        """Scales and codes, group after group, every error fed forward."""
        u, scales = self.c.u, self.scales
        for block, groups in self._blocks():
            target = self.w[block].copy()
            if block.start:
                target += u[: block.start, block].T @ self.error[: block.start]
            for g, s in groups:
                part = target[s.start - block.start : s.stop - block.start]
                before = slice(block.start, s.start)
                if before.start < before.stop:
                    part += np.ascontiguousarray(u[before, s].T) @ self.error[before]
                scales.search(g, part, self.c.d[s])
                _feedback.round_group(
                    self.w[s], part, np.ascontiguousarray(u[s, s]), scales.s[g], scales.m[g], scales.shift[g],
                    self.level, self.q[s], self.error[s],
                )  # fmt: skip

    def descend(self) -> int:
        """One pass over scales and codes that lowers e H e^T; how many of them moved."""
        h, scales, moved = self.c.h, self.scales, 0
        gradient = h @ self.error
        for block, groups in self._blocks():
            change = np.zeros((block.stop - block.start, self.w.shape[1]), np.float32)
            for g, s in groups:
                own, part = change[s.start - block.start : s.stop - block.start], gradient[s]
                square = np.ascontiguousarray(h[s, s])
                moved += scales.refit(g, square, part, self.q[s], self.error[s], own)
                moved += _feedback.descend_group(
                    square, part, scales.s[g], scales.m[g], scales.shift[g],
                    self.level, self.q[s], self.error[s], own,
                )  # fmt: skip
                after = slice(s.stop, block.stop)
                if after.start < after.stop:
                    gradient[after] += np.ascontiguousarray(h[s, after].T) @ own
            if block.stop < len(self.w):
                gradient[block.stop :] += h[block.stop :, block] @ change
        return moved

    def store(self, out: dict[str, np.ndarray]) -> None:
        """Codes and scales in the matrix's own order."""
        c = self.c
        shift = np.repeat(self.scales.shift, np.diff(c.groups), axis=0)
        index = (2 * (self.q - shift)).astype(np.int64) + _feedback.HALF
        out["codes"][:, c.order] = self.code[index].T
        for name, values in self.scales.planes(c.number, self.dead):
            out[name][:] = values
