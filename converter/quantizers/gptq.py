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
from halfbyte.converter.quantizers import _feedback
from halfbyte.formats import encodings
from halfbyte.formats.errors import CheckpointError, UsageError

LANES = 128  # rows of one unit of work
BLOCK = 128  # columns between two matrix products
DAMPING = 0.01  # of the mean diagonal of H
PASSES = 4  # of coordinate descent

# Where the best scale of a group lies, as a multiple of the scale that puts its largest value on the negative or the
# positive end of the level table; by bits of a code.
WINDOWS = {
    2: ((0.5, 1.4), (0.5, 1.4)),
    3: ((0.75, 1.35), (0.75, 1.3)),
    4: ((0.90, 1.24), (0.90, 1.16)),
    5: ((0.93, 1.12), (0.93, 1.1)),
    6: ((0.95, 1.08), (0.95, 1.08)),
}
RATIOS = (0.95, 1.01, 1.08)
SMALLEST_ROW = 2.0**-57


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
    """(level float32, code uint8) over half units, see `_feedback`; for integer levels within -256..255."""
    e = encodings.BY_NAME[encoding]
    if e.levels is not None:
        levels = np.asarray(e.levels)
    else:
        levels = np.arange(-127, 128) if e.signed else np.arange(256)
    y = np.arange(-_feedback.HALF, _feedback.HALF) / 2 + 0.25  # the middle of each half unit: never a tie
    nearest = np.abs(y[:, None] - levels).argmin(axis=1)
    return levels[nearest].astype(np.float32), nearest.astype(np.uint8)


def supports(encoding: str) -> bool:
    """Whether `quantize` knows the encoding: those with sub-scales under a row scale."""
    return encodings.BY_NAME[encoding].row_scale


def quantize(
    w: np.ndarray,
    encoding: str,
    c: Curvature,
    products: Products,
    *,
    missing: np.ndarray | None = None,
    passes: int = PASSES,
) -> dict[str, np.ndarray]:
    """w[rows, cols] -> codes uint8[rows, cols], scales uint8[rows, groups], row uint8[rows] of a table encoding.

    missing[rows, cols]: mean(y x^T), y being what the outputs miss because their inputs, or the residual that they
    are added to, already deviate from the float model. The part of y that is linear in x is made up for: the target
    becomes w + missing H^-1, which is exact where GPTAQ (arXiv 2504.02692) approximates.

    passes: of coordinate descent after rounding. Raises UsageError for an encoding that `supports` does not know.
    """
    if not supports(encoding):
        raise UsageError(f"gptq does not know encoding {encoding}")
    rows, cols = w.shape
    out = {
        "codes": np.zeros((rows, cols), np.uint8),
        "scales": np.zeros((rows, len(c.number)), np.uint8),
        "row": np.zeros(rows, np.uint8),
    }

    def work(s: slice) -> None:
        lanes = _Rows(w[s], None if missing is None else missing[s], encoding, c)
        lanes.round()
        for _ in range(passes):
            if not lanes.descend():
                break
        lanes.store({name: plane[s] for name, plane in out.items()})

    products.each(work, spans(rows, LANES))
    return out


class _Rows:
    """A few rows on their way: arrays [cols, lanes] in the order of the curvature, scaled below 1."""

    def __init__(self, w: np.ndarray, missing: np.ndarray | None, encoding: str, c: Curvature):
        e = encodings.BY_NAME[encoding]
        self.c = c
        self.level, self.code = tables(encoding)
        self.table_shift = np.float32(e.shift)
        self.windows = np.array(WINDOWS[e.bits], np.float32)
        target = np.asarray(w, np.float32)
        if missing is not None:
            target = target + self._solve(missing).T
        peak = np.abs(target).max(axis=1)
        self.dead = peak < SMALLEST_ROW
        # An exact power of two brings every row below 1, so that no square over- or underflows.
        self.exponent = np.where(self.dead, 0, np.ceil(np.log2(np.where(self.dead, 1, peak)))).astype(
            np.int64
        )
        self.w = np.ascontiguousarray(np.ldexp(target, -self.exponent[:, None].astype(np.int32)).T[c.order])
        self.w[:, self.dead] = 0
        groups, lanes = len(c.number), len(w)
        d, sqq = np.empty((groups, lanes), np.float32), np.empty((groups, lanes), np.float32)
        ratios = np.array(RATIOS, np.float32)
        _feedback.free_scales(self.w, c.d, c.groups, self.level, self.table_shift, ratios, d, sqq)
        self.row, self.scale = np.empty(lanes, np.uint8), np.empty(lanes, np.float32)
        _feedback.row_scales(d, sqq, self.exponent, self.row, self.scale)
        self.k = np.ones((groups, lanes), np.float32)
        self.shift = np.zeros((groups, lanes), np.float32)
        self.q = np.empty_like(self.w)
        self.error = np.empty_like(self.w)
        self.none = np.zeros(lanes, np.float32)

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

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of groups of about BLOCK columns."""
        g = 0
        while g < len(self.c.number):
            h = g + 1
            while h < len(self.c.number) and self.c.groups[h + 1] - self.c.groups[g] <= BLOCK:
                h += 1
            yield g, h
            g = h

    def round(self) -> None:
        """Scales and codes, group after group, every error fed forward."""
        c = self.c
        for first, last in self._blocks():
            a, z = int(c.groups[first]), int(c.groups[last])
            target = self.w[a:z].copy()
            if a:
                target += c.u[:a, a:z].T @ self.error[:a]
            for g in range(first, last):
                p, r = int(c.groups[g]), int(c.groups[g + 1])
                if p > a:
                    target[p - a : r - a] += np.ascontiguousarray(c.u[a:p, p:r].T) @ self.error[a:p]
                part = target[p - a : r - a]
                _feedback.search_sub(
                    part,
                    c.d[p:r],
                    self.scale,
                    self.level,
                    self.table_shift,
                    self.windows,
                    self.k[g],
                    self.shift[g],
                )
                u = np.ascontiguousarray(c.u[p:r, p:r])
                _feedback.round_group(
                    self.w[p:r],
                    part,
                    u,
                    self.scale * self.k[g],
                    self.none,
                    self.shift[g],
                    self.level,
                    self.q[p:r],
                    self.error[p:r],
                )

    def descend(self) -> int:
        """One pass over sub-scales and codes that lowers e H e^T; how many of them moved."""
        c, moved = self.c, 0
        gradient = c.h @ self.error
        for first, last in self._blocks():
            a, z = int(c.groups[first]), int(c.groups[last])
            change = np.zeros((z - a, self.w.shape[1]), np.float32)
            local = gradient[a:z].copy()
            for g in range(first, last):
                p, r = int(c.groups[g]), int(c.groups[g + 1])
                h = np.ascontiguousarray(c.h[p:r, p:r])
                own = change[p - a : r - a]
                part = local[p - a : r - a]
                moved += _feedback.refit_sub(
                    h, part, self.scale, self.k[g], self.q[p:r], self.error[p:r], own
                )
                moved += _feedback.descend_group(
                    h,
                    part,
                    self.scale * self.k[g],
                    self.none,
                    self.shift[g],
                    self.level,
                    self.q[p:r],
                    self.error[p:r],
                    own,
                )
                if r < z:
                    local[r - a :] += np.ascontiguousarray(c.h[p:r, r:z].T) @ own
            if z < len(self.w):
                gradient[z:] += c.h[z:, a:z] @ change
        return moved

    def store(self, out: dict[str, np.ndarray]) -> None:
        """Codes and scales in the matrix's own order."""
        c = self.c
        shift = np.repeat(self.shift, np.diff(c.groups), axis=0)
        index = (2 * (self.q - shift)).astype(np.int64) + _feedback.HALF
        out["codes"][:, c.order] = self.code[index].T
        sub = (self.k.astype(np.int64) + 127) | (self.shift > 0)
        out["scales"][:, c.number] = sub.T
        out["row"][:] = np.where(self.dead, 0, self.row)
