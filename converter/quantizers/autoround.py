"""Learned rounding: SignSGD on the rounding offset of every weight and the scale of every group.

SignRound / AutoRound (arXiv 2309.05516) minimises the squared error of a block's output by stochastic gradients.
Here it is done a layer at a time against the layer's own loss e H e^T with H = mean(x x^T), whose gradient is closed
form, so neither batches nor torch are needed and the result is the same on every machine of one vector width and
for every number of threads. It works on the levels and stored scales of any code encoding. Coordinate descent ends it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from halfbyte.converter.quantizers import _planes, _rounding
from halfbyte.converter.quantizers._planes import Planes
from halfbyte.formats.errors import UsageError

ITERATIONS = 200
SWEEPS = 20
DAMPING = 0.01  # of the mean diagonal, added to it: what calibration did not see may still happen
ROWS = 16  # of one unit of work


def quantize(
    w: np.ndarray,
    encoding: str,
    hessian: np.ndarray,
    *,
    group: int = 32,
    scale_type: str = "f16",
    start: Planes | None = None,
    iterations: int = ITERATIONS,
    sweeps: int = SWEEPS,
    damping: float = DAMPING,
) -> Planes:
    """w[rows, cols], mean(x x^T) [cols, cols] -> planes (codes, scales, ...) that minimise the output error.

    start: the planes to improve on, default searched round-to-nearest weighted by the Hessian's diagonal. The loss of
    no row is larger than at the start. iterations 0 leaves coordinate descent alone, sweeps 0 leaves SignSGD alone.
    Raises UsageError for a Hessian of another shape or that is not finite.
    """
    cols = w.shape[1]
    if hessian.shape != (cols, cols) or not np.isfinite(hessian).all():
        raise UsageError(f"a matrix of {cols} columns needs a finite Hessian [{cols}, {cols}]")
    diagonal = np.diagonal(hessian)
    mean = float(diagonal.mean())
    h = hessian / mean if mean > 0 else np.eye(cols)
    h = (h + damping * np.eye(cols)).astype(np.float32)
    if start is None:
        start = _planes.nearest(w, encoding, group, scale_type, np.ascontiguousarray(diagonal))
    ladder = _planes.climb(start, encoding, group, scale_type)
    loss = np.empty((len(w), 2))
    rate = 1.0 / iterations if iterations else 0.0

    def work(first: int) -> None:
        s = slice(first, first + ROWS)
        parts = (
            np.ascontiguousarray(w[s], np.float32), h, ladder.levels, ladder.width, ladder.scales[s],
            ladder.shift[s], ladder.offset[s], ladder.ranks[s], ladder.choice[s],
        )  # fmt: skip
        if iterations:
            _rounding.learn(*parts, iterations, rate, loss[s])
        if sweeps:
            _rounding.descend(*parts, sweeps, loss[s])

    with ThreadPoolExecutor(numba.get_num_threads()) as pool:
        list(pool.map(work, range(0, len(w), ROWS)))
    return _planes.store(ladder, start, encoding)
