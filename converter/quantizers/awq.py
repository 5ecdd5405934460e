"""AWQ: columns that meet large activations are scaled up before rounding, and the scale is folded away.

Activation-aware weight quantisation (arXiv 2306.00978) at the sites of `converter.fold`: s = rms^a, a from a grid,
rms being the root mean square of each input column. Candidates are judged by the real encoding and by the error of the
matrices' outputs over the calibration inputs, tr((W - Q) H (W - Q)^T) with H = mean(x x^T), so no activations
are kept. The producer's rows are divided by s, which encodings with scales along the row hardly notice.

`clip` then limits the weights of each group, again judged by the output error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from halfbyte.converter.blas import Products
from halfbyte.converter.builder import Matrix
from halfbyte.converter.fold import Fold, Site

if TYPE_CHECKING:
    from halfbyte.converter.calibrate import Calibration, Progress
    from halfbyte.converter.calibration.statistics import Statistics

# coder(w float32[rows, cols], importance float64[cols]) -> what is read back, float32[rows, cols]
Coder = Callable[[np.ndarray, np.ndarray], np.ndarray]

GRID = 20  # exponents 0, 1/20, ..., 19/20
CLIPS = tuple(1 - k / 20 for k in range(1, 10))  # shares of a group's largest magnitude
SMALLEST = 1e-4  # of a scale before normalisation


def scales(rms: np.ndarray, exponent: float) -> np.ndarray:
    """s[cols] = rms^exponent, normalised so that the largest and the smallest are as far from 1."""
    s = np.maximum(rms.astype(np.float64) ** exponent, SMALLEST)
    return s / np.sqrt(s.max() * s.min())


def output_error(error: np.ndarray, hessian: np.ndarray, products: Products) -> np.ndarray:
    """float64[rows]: e H e^T of each row of error[rows, cols], the mean squared error of that output."""
    e = error.astype(np.float64)
    return np.einsum("rc,rc->r", e, products.matmul(e, hessian))


def search(
    site: Site, weights: list[np.ndarray], hessian: np.ndarray, coder: Coder, products: Products
) -> tuple[np.ndarray, float]:
    """The best scales s[site.width] of a site, and the output error relative to no scales (1.0 if none helps).

    weights: the site's consumers, float32[rows, cols] each; hessian: of their common input, [cols, cols].
    """
    rms = np.sqrt(np.diagonal(hessian))
    best, base, chosen = np.inf, 1.0, np.ones(site.width)
    for k in range(GRID):
        s = scales(np.maximum(site.reduce(rms), np.finfo(np.float32).tiny), k / GRID)
        wide = site.columns(s)
        importance = np.diagonal(hessian) / wide**2
        total = 0.0
        for w in weights:
            read = coder((w * wide).astype(np.float32), importance) / wide
            total += float(output_error(w - read, hessian, products).sum())
        if k == 0:
            base = total or 1.0
        if total < best:
            best, chosen = total, s
    return chosen, best / base


def apply(
    fold: Fold, calibration: Calibration, coder: Coder, progress: Progress | None = None
) -> list[tuple[Site, float]]:
    """Search every site in one walk over the calibration text, then fold the scales in.

    Returns the sites with their error relative to no scales. `calibration.weights` must have been made after `fold`.
    """
    b = fold.b
    site_of = {b.tensors[m].name: s for s in fold.sites if not s.obstacle for m in s.consumers}
    waiting: dict[int, list[np.ndarray]] = {}
    chosen: list[tuple[Site, np.ndarray, float]] = []

    with Products(calibration.threads) as products:

        def visit(t: Matrix, statistics: Statistics) -> None:
            site = site_of.get(t.name)
            if site is None:
                return
            weights = waiting.setdefault(site.record, [])
            weights.append(calibration.weights.rows(t))
            if len(weights) == len(site.consumers):
                assert statistics.hessian is not None
                s, gain = search(site, weights, statistics.hessian, coder, products)
                chosen.append((site, s, gain))
                del waiting[site.record]

        calibration.run(visit, progress=progress)
    for site, s, gain in chosen:
        if gain < 1:
            fold.scale(site, s)
    return [(site, gain) for site, _, gain in chosen]


def clip(w: np.ndarray, hessian: np.ndarray, coder: Coder, products: Products, group: int = 32) -> np.ndarray:
    """w[rows, cols] with the magnitudes of each group limited where that lowers the error of its part of the output.

    Every group is judged by its own block of the Hessian, e_g H_gg e_g^T; a row whose whole output error rises all
    the same (its groups share a row scale, and their errors correlate) stays as it was.
    """
    rows, cols = w.shape
    width = group or cols
    starts = list(range(0, cols, width))
    importance = np.diagonal(hessian)

    def group_errors(read: np.ndarray) -> np.ndarray:
        e = w.astype(np.float64) - read
        parts = (e[:, a : a + width] for a in starts)
        blocks = (hessian[a : a + width, a : a + width] for a in starts)
        return np.stack([np.einsum("rc,cd,rd->r", p, h, p) for p, h in zip(parts, blocks)], axis=1)

    plain = coder(w, importance)
    best, share = group_errors(plain), np.ones((rows, len(starts)))
    peak = np.maximum.reduceat(np.abs(w), starts, axis=1)
    column = np.arange(cols) // width
    for c in CLIPS:
        limit = (c * peak)[:, column]
        errors = group_errors(coder(np.clip(w, -limit, limit).astype(np.float32), importance))
        better = errors < best
        best[better], share[better] = errors[better], c
    limit = (share * peak)[:, column]
    clipped = np.clip(w, -limit, limit).astype(np.float32)
    before = output_error(w - plain, hessian, products)
    after = output_error(w - coder(clipped, importance), hessian, products)
    return np.where((after < before)[:, None], clipped, w)
