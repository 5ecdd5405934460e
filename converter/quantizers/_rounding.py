"""Inner loops of learned rounding, compiled by Numba on first use and cached beside this file.

One row at a time, float32 with float64 losses; rows share nothing, so threads do not change a bit. The gradient
e H of a row is kept up to date: a step costs one pass over a row of H for each weight whose level changed.
"""

import numpy as np
from numba import njit


@njit(inline="always")
def _coordinate(y, levels):
    """The real-valued rank of y among ascending levels: 2.25 lies a quarter of the way from level 2 to 3."""
    n = len(levels)
    low = 0
    high = n - 1
    while high - low > 1:
        middle = (low + high) >> 1
        if levels[middle] <= y:
            low = middle
        else:
            high = middle
    return low + (y - levels[low]) / (levels[low + 1] - levels[low])


@njit(inline="always")
def _rank(p, n):
    return min(max(int(np.rint(p)), 0), n - 1)


@njit(inline="always")
def _nearest(y, levels):
    """The rank of the level nearest to y."""
    n = len(levels)
    c = _rank(_coordinate(y, levels), n)
    best = c
    for k in (c - 1, c + 1):
        if 0 <= k < n and abs(y - levels[k]) < abs(y - levels[best]):
            best = k
    return best


@njit(nogil=True, cache=True, error_model="numpy")
def learn(w, h, levels, width, scales, shift, offset, ranks, choice, iterations, rate, loss):
    """SignSGD on rounding offsets and scales (SignRound, arXiv 2309.05516), for the loss e H e^T of each row.

    w[rows, cols]; h[cols, cols]; levels[n] ascending; scales[rows, groups, candidates] the stored scales to choose
    from, the one of the start in the middle; shift, offset[rows, groups]: w_hat = s * (level + shift) + offset.
    ranks[rows, cols] and choice[rows, groups] hold the start and receive the best seen; loss[rows, 2] receives the
    loss at the start and the best.
    """
    rows, cols = w.shape
    groups, candidates = scales.shape[1], scales.shape[2]
    n = len(levels)
    f = np.float32
    v = np.empty(cols, np.float32)
    a = np.empty(groups, np.float32)
    error = np.empty(cols, np.float32)
    gradient = np.empty(cols, np.float32)
    rank = np.empty(cols, np.int64)
    pick = np.empty(groups, np.int64)
    for r in range(rows):
        for j in range(cols):
            g = j // width
            s = scales[r, g, choice[r, g]]
            rank[j] = ranks[r, j]
            error[j] = s * (levels[rank[j]] + shift[r, g]) + offset[r, g] - w[r, j]
            gradient[j] = f(0.0)
            # The offset that a start other than round-to-nearest stands for, just inside its interval.
            v[j] = f(0.0)
            if s != f(0.0):
                p = _coordinate((w[r, j] - offset[r, g]) / s - shift[r, g], levels)
                v[j] = f(min(max(rank[j] - p, -0.5), 0.5)) if _rank(p, n) != rank[j] else f(0.0)
        for j in range(cols):
            e = error[j]
            for i in range(cols):
                gradient[i] += e * h[j, i]
        for g in range(groups):
            pick[g] = choice[r, g]
            a[g] = f(pick[g])
        best = np.inf
        for step in range(iterations + 1):
            total = 0.0
            for j in range(cols):
                total += np.float64(error[j]) * np.float64(gradient[j])
            if step == 0:
                loss[r, 0] = total
            if total < best:
                best = total
                for j in range(cols):
                    ranks[r, j] = rank[j]
                for g in range(groups):
                    choice[r, g] = pick[g]
            if step == iterations:
                break
            move = f(rate * (1.0 - step / iterations))
            for g in range(groups):
                first = g * width
                last = min(first + width, cols)
                s = scales[r, g, pick[g]]
                slope = f(0.0)
                for j in range(first, last):
                    slope += gradient[j] * (levels[rank[j]] + shift[r, g])
                    pull = gradient[j] * s
                    if pull > f(0.0):
                        v[j] = max(v[j] - move, f(-0.5))
                    elif pull < f(0.0):
                        v[j] = min(v[j] + move, f(0.5))
                # The middle candidate is 1; a step of the range from 0.5 to 1.5 is `move`, as for the offsets.
                slope *= scales[r, g, candidates // 2]
                if slope > f(0.0):
                    a[g] = max(a[g] - move * f(candidates), f(0.0))
                elif slope < f(0.0):
                    a[g] = min(a[g] + move * f(candidates), f(candidates - 1))
            for g in range(groups):
                pick[g] = min(max(int(np.rint(a[g])), 0), candidates - 1)
                s = scales[r, g, pick[g]]
                for j in range(g * width, min((g + 1) * width, cols)):
                    if s != f(0.0):
                        p = _coordinate((w[r, j] - offset[r, g]) / s - shift[r, g], levels)
                        rank[j] = _rank(p + v[j], n)
                    e = s * (levels[rank[j]] + shift[r, g]) + offset[r, g] - w[r, j]
                    delta = e - error[j]
                    if delta != f(0.0):
                        error[j] = e
                        for i in range(cols):
                            gradient[i] += delta * h[j, i]
        loss[r, 1] = best


@njit(nogil=True, cache=True, error_model="numpy")
def descend(w, h, levels, width, scales, shift, offset, ranks, choice, sweeps, loss):
    """Coordinate descent on the same loss until no single level or scale lowers it, or `sweeps` are over."""
    rows, cols = w.shape
    groups, candidates = scales.shape[1], scales.shape[2]
    f = np.float32
    error = np.empty(cols, np.float32)
    gradient = np.empty(cols, np.float32)
    for r in range(rows):
        for j in range(cols):
            g = j // width
            error[j] = (
                scales[r, g, choice[r, g]] * (levels[ranks[r, j]] + shift[r, g]) + offset[r, g] - w[r, j]
            )
            gradient[j] = f(0.0)
        for j in range(cols):
            e = error[j]
            for i in range(cols):
                gradient[i] += e * h[j, i]
        for _ in range(sweeps):
            moved = False
            for g in range(groups):
                first = g * width
                last = min(first + width, cols)
                here = choice[r, g]
                s = scales[r, g, here]
                # Another stored scale, the levels as they are: loss changes by 2 t b + t^2 c for a change of t.
                b = 0.0
                c = 0.0
                for j in range(first, last):
                    u = levels[ranks[r, j]] + shift[r, g]
                    b += np.float64(u) * np.float64(gradient[j])
                    inner = f(0.0)
                    for i in range(first, last):
                        inner += h[j, i] * (levels[ranks[r, i]] + shift[r, g])
                    c += np.float64(u) * np.float64(inner)
                gain = 0.0
                for k in range(candidates):
                    t = np.float64(scales[r, g, k]) - np.float64(s)
                    change = 2.0 * t * b + t * t * c
                    if change < gain - 1e-6 * abs(t * b):
                        gain = change
                        here = k
                if here != choice[r, g]:
                    moved = True
                    choice[r, g] = here
                    s = scales[r, g, here]
                    for j in range(first, last):
                        e = s * (levels[ranks[r, j]] + shift[r, g]) + offset[r, g] - w[r, j]
                        delta = e - error[j]
                        error[j] = e
                        for i in range(cols):
                            gradient[i] += delta * h[j, i]
                if s == f(0.0):
                    continue
                for j in range(first, last):
                    if not h[j, j] > f(0.0):
                        continue
                    wanted = w[r, j] + error[j] - gradient[j] / h[j, j]
                    k = _nearest((wanted - offset[r, g]) / s - shift[r, g], levels)
                    if k == ranks[r, j]:
                        continue
                    e = s * (levels[k] + shift[r, g]) + offset[r, g] - w[r, j]
                    delta = e - error[j]
                    if not f(2.0) * delta * gradient[j] + delta * delta * h[j, j] < f(0.0):
                        continue
                    moved = True
                    ranks[r, j] = k
                    error[j] = e
                    for i in range(cols):
                        gradient[i] += delta * h[j, i]
            if not moved:
                break
        total = 0.0
        for j in range(cols):
            total += np.float64(error[j]) * np.float64(gradient[j])
        loss[r, 1] = total
