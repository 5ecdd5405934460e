"""SmoothQuant: moves outliers of the activations into the weights, for activations of one int8 scale a token.

s_j = max|x_j|^alpha / max|w_j|^(1 - alpha) (arXiv 2211.10438), folded at the sites of `converter.fold`: after it the
columns of x / s and of w s need about the same range. Where activations have a scale every 32 columns (policy
i8g32) an outlier spoils only its neighbours and smoothing gains little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from halfbyte.converter.builder import Matrix
from halfbyte.converter.fold import Fold, Site

if TYPE_CHECKING:
    from halfbyte.converter.calibrate import Calibration, Progress
    from halfbyte.converter.calibration.statistics import Statistics

SMALLEST = 1e-5  # of either range: a column that was never excited stays as it is
ALPHA = 0.5


def scales(absmax: np.ndarray, weight: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """Largest |x|[cols] and largest |w|[cols] of all consumers -> s[cols], with geometric mean 1."""
    x = np.maximum(absmax.astype(np.float64), SMALLEST)
    w = np.maximum(weight.astype(np.float64), SMALLEST)
    s = np.maximum(x**alpha / w ** (1 - alpha), SMALLEST)
    return s / np.exp(np.log(s).mean())


def apply(
    fold: Fold, calibration: Calibration, alpha: float = ALPHA, progress: Progress | None = None
) -> list[Site]:
    """Smooth every site of the program (norm outputs, attention outputs by way of the values, MLP products).

    `calibration.weights` must have been made after `fold`. Returns the sites smoothed.
    """
    b = fold.b
    site_of = {b.tensors[m].name: s for s in fold.sites if not s.obstacle for m in s.consumers}
    ranges: dict[int, tuple[Site, np.ndarray, np.ndarray]] = {}

    def visit(t: Matrix, statistics: Statistics) -> None:
        site = site_of.get(t.name)
        if site is None:
            return
        weight = np.abs(calibration.weights.rows(t)).max(axis=0)
        if site.record in ranges:
            weight = np.maximum(weight, ranges[site.record][2])
        ranges[site.record] = (site, statistics.absmax, weight)

    calibration.run(visit, hessians=False, progress=progress)
    for site, absmax, weight in ranges.values():
        fold.scale(site, scales(site.reduce(absmax), site.reduce(weight), alpha))
    return [site for site, _, _ in ranges.values()]
