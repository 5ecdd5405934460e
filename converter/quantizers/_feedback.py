"""Inner loops of GPTQ, compiled by Numba on first use and cached beside this file.

Everything here works on `[columns, lanes]`: the rows of a weight matrix lie side by side in vector lanes and a
column is one loop over them, so that every loop vectorises and no sum depends on the vector width.

The levels of an encoding come as two tables over half units, `level[i]` and `code[i]` for y with
floor(2 y) = i - HALF: levels are integers, so the thresholds between neighbours are multiples of one half.
"""

import numpy as np
from numba import njit

HALF = 512
TABLE = 2 * HALF


@njit(inline="always")
def _index(y):
    return np.uint32(min(max(np.floor(y + y) + np.float32(HALF), np.float32(0.0)), np.float32(TABLE - 1)))


@njit(inline="always")
def _odd(v):
    """The odd integer nearest to v >= 0, within 1..127."""
    return min(np.float32(2.0) * np.floor(v * np.float32(0.5)) + np.float32(1.0), np.float32(127.0))


@njit(nogil=True, cache=True, error_model="numpy")
def _errors(x, weight, d, shift, level, inverse, error):
    """Weighted squared error of each lane under scale d, every code at its nearest level."""
    n, lanes = x.shape
    for i in range(lanes):
        inverse[i] = np.float32(1.0) / d[i] if d[i] != np.float32(0.0) else np.float32(0.0)
        error[i] = np.float32(0.0)
    for j in range(n):
        w = weight[j]
        for i in range(lanes):
            v = x[j, i]
            q = level[_index(v * inverse[i] - shift[i])] + shift[i]
            e = v - d[i] * q
            error[i] += w * (e * e)


@njit(nogil=True, cache=True, error_model="numpy")
def _ends(x, end):
    """The largest value of each lane, with its sign."""
    n, lanes = x.shape
    for i in range(lanes):
        end[i] = np.float32(0.0)
    for j in range(n):
        for i in range(lanes):
            if abs(x[j, i]) > abs(end[i]):
                end[i] = x[j, i]


@njit(nogil=True, cache=True, error_model="numpy")
def free_scales(x, weight, starts, level, table_shift, ratios, d, sqq):
    """About the least-squares scale d[groups, lanes] of every group, unrounded, and its curvature sqq."""
    lanes = x.shape[1]
    end = np.empty(lanes, np.float32)
    best = np.empty(lanes, np.float32)
    sxq = np.empty(lanes, np.float32)
    sq = np.empty(lanes, np.float32)
    inverse = np.empty(lanes, np.float32)
    for g in range(len(starts) - 1):
        part = x[starts[g] : starts[g + 1]]
        _ends(part, end)
        for i in range(lanes):
            best[i] = np.float32(-1.0)
        for trial in range(4 * len(ratios)):
            shift = np.float32(table_shift * (trial & 1))
            table_end = shift + (level[TABLE - 1] if trial & 2 else level[0])
            for i in range(lanes):
                s = ratios[trial >> 2] * end[i] / table_end
                inverse[i] = np.float32(1.0) / s if s != np.float32(0.0) else np.float32(0.0)
                sxq[i] = np.float32(0.0)
                sq[i] = np.float32(0.0)
            for j in range(len(part)):
                w = weight[starts[g] + j]
                for i in range(lanes):
                    v = part[j, i]
                    q = level[_index(v * inverse[i] - shift)] + shift
                    sxq[i] += w * q * v
                    sq[i] += w * q * q
            for i in range(lanes):
                gain = sxq[i] * sxq[i] / sq[i] if sq[i] > np.float32(0.0) else np.float32(0.0)
                if gain > best[i]:
                    best[i] = gain
                    d[g, i] = sxq[i] / sq[i] if sq[i] > np.float32(0.0) else np.float32(0.0)
                    sqq[g, i] = sq[i]


@njit(nogil=True, cache=True, error_model="numpy")
def row_scales(d, sqq, exponent, row, scale):
    """The E6M2 row scale of each lane under which rounding every d to an odd multiple costs least.

    Fills row[lanes] (the byte) and scale[lanes] (its value times 2^-exponent). Values near max|d| / 127 are tried;
    smaller ones clip the largest groups, and may still win.
    """
    groups, lanes = d.shape
    for i in range(lanes):
        row[i], scale[i] = 0, np.float32(0.0)
        largest = np.float32(0.0)
        for g in range(groups):
            largest = max(largest, abs(d[g, i]))
        if largest == np.float32(0.0):
            continue
        first = 4 * (int(np.floor(np.log2(np.float64(largest) / 127.0))) + exponent[i] + 60)
        lowest = np.inf
        for r in range(max(1, min(first - 2, 255)), max(1, min(first + 7, 255)) + 1):
            s = np.float32((1.0 + 0.25 * (r & 3)) * 2.0 ** ((r >> 2) - 60 - exponent[i]))
            total = 0.0
            for g in range(groups):
                magnitude = abs(d[g, i])
                e = np.float64(magnitude - s * _odd(magnitude / s))
                total += sqq[g, i] * e * e
            if total < lowest:
                lowest = total
                row[i], scale[i] = r, s


@njit(nogil=True, cache=True, error_model="numpy")
def search_sub(x, weight, scale, level, table_shift, windows, k, shift):
    """The sub-scale k[lanes] (odd, signed) and the shift[lanes] of one group x[n, lanes] under row scales."""
    lanes = x.shape[1]
    end = np.empty(lanes, np.float32)
    inverse = np.empty(lanes, np.float32)
    error = np.empty(lanes, np.float32)
    d = np.empty(lanes, np.float32)
    trial_shift = np.empty(lanes, np.float32)
    low = np.empty(lanes, np.float32)
    high = np.empty(lanes, np.float32)
    best = np.full(lanes, np.float32(np.inf))
    zero = np.float32(0.0)
    _ends(x, end)
    for i in range(lanes):
        k[i] = np.float32(1.0)
        shift[i] = zero
    for trial in range(4):
        offset = np.float32(table_shift * (trial & 1))
        table_end = offset + (level[TABLE - 1] if trial & 2 else level[0])
        window = windows[1] if trial & 2 else windows[0]
        steps = 0
        for i in range(lanes):
            trial_shift[i] = offset
            m = abs(end[i] / (table_end * scale[i])) if scale[i] > zero else zero
            low[i] = _odd(window[0] * m)
            high[i] = _odd(window[1] * m)
            steps = max(steps, int(high[i] - low[i]) // 2 + 1)
        for step in range(steps):
            for i in range(lanes):
                m = min(low[i] + np.float32(2.0 * step), high[i])
                d[i] = scale[i] * (m if (end[i] < zero) == (table_end < zero) else -m)
            _errors(x, weight, d, trial_shift, level, inverse, error)
            for i in range(lanes):
                if error[i] < best[i]:
                    best[i] = error[i]
                    k[i] = d[i] / scale[i] if scale[i] > zero else np.float32(1.0)
                    shift[i] = offset
    moved = True
    while moved:
        moved = False
        for trial in range(2):
            delta = np.float32(4.0 * trial - 2.0)
            for i in range(lanes):
                d[i] = scale[i] * min(max(k[i] + delta, np.float32(-127.0)), np.float32(127.0))
            _errors(x, weight, d, shift, level, inverse, error)
            for i in range(lanes):
                if error[i] < best[i]:
                    best[i] = error[i]
                    k[i] = d[i] / scale[i]
                    moved = True


@njit(nogil=True, cache=True, error_model="numpy")
def round_group(w, target, u, s, m, shift, level, q, error):
    """Round one group column by column, each error fed into the columns after it.

    w[n, lanes] weights, target[n, lanes] weights plus the feedback of earlier groups (changed), u[n, n] unit
    upper. Fills q[n, lanes] (level + shift) and error[n, lanes] = w - (s q + m).
    """
    n, lanes = w.shape
    inverse = np.empty(lanes, np.float32)
    for i in range(lanes):
        inverse[i] = np.float32(1.0) / s[i] if s[i] != np.float32(0.0) else np.float32(0.0)
    for j in range(n):
        for i in range(lanes):
            v = level[_index((target[j, i] - m[i]) * inverse[i] - shift[i])] + shift[i]
            q[j, i] = v
            error[j, i] = w[j, i] - (s[i] * v + m[i])
        for h in range(j + 1, n):
            f = u[j, h]
            for i in range(lanes):
                target[h, i] += f * error[j, i]


@njit(nogil=True, cache=True, error_model="numpy")
def descend_group(h, gradient, s, m, shift, level, q, error, change):
    """One pass of coordinate descent on e H e^T over the codes of a group.

    h[n, n] is the group's block of H, gradient[n, lanes] = the group's columns of e H (kept up to date inside the
    group). `change` receives the change of error. Returns how many codes moved.
    """
    n, lanes = q.shape
    inverse = np.empty(lanes, np.float32)
    delta = np.empty(lanes, np.float32)
    moved = 0
    for i in range(lanes):
        inverse[i] = np.float32(1.0) / s[i] if s[i] != np.float32(0.0) else np.float32(0.0)
    for j in range(n):
        diagonal = np.float32(1.0) / h[j, j]
        count = 0
        for i in range(lanes):
            best = s[i] * q[j, i] + gradient[j, i] * diagonal
            v = level[_index(best * inverse[i] - shift[i])] + shift[i]
            delta[i] = s[i] * (q[j, i] - v)  # change of the error
            count += v != q[j, i]
            q[j, i] = v
        if count == 0:
            continue
        moved += count
        for i in range(lanes):
            error[j, i] += delta[i]
            change[j, i] += delta[i]
        for p in range(n):
            f = h[j, p]
            for i in range(lanes):
                gradient[p, i] += f * delta[i]
    return moved


@njit(nogil=True, cache=True, error_model="numpy")
def refit_sub(h, gradient, scale, k, q, error, change):
    """Move the sub-scale k of each lane to the odd integer that minimises e H e^T, codes fixed; see descend_group."""
    n, lanes = q.shape
    gq = np.zeros(lanes, np.float32)
    curve = np.zeros(lanes, np.float32)
    hq = np.empty(lanes, np.float32)
    moved = 0
    for j in range(n):
        for i in range(lanes):
            hq[i] = np.float32(0.0)
        for p in range(n):
            f = h[j, p]
            for i in range(lanes):
                hq[i] += f * q[p, i]
        for i in range(lanes):
            gq[i] += gradient[j, i] * q[j, i]
            curve[i] += hq[i] * q[j, i]
    for i in range(lanes):
        step = gq[i] / (curve[i] * scale[i]) if curve[i] * scale[i] > np.float32(0.0) else np.float32(0.0)
        new = np.float32(2.0) * np.floor((k[i] + step) * np.float32(0.5)) + np.float32(1.0)
        new = min(max(new, np.float32(-127.0)), np.float32(127.0))
        hq[i] = scale[i] * (k[i] - new)  # change of the error, a unit of q
        moved += new != k[i]
        k[i] = new
    if moved:
        for j in range(n):
            for i in range(lanes):
                gq[i] = hq[i] * q[j, i]
                error[j, i] += gq[i]
                change[j, i] += gq[i]
            for p in range(n):
                f = h[j, p]
                for i in range(lanes):
                    gradient[p, i] += f * gq[i]
    return moved


@njit(nogil=True, cache=True, error_model="numpy")
def solve_block(u, y, transposed):
    """Solve y in place: rows of y[n, lanes] by the unit upper u[n, n] (its transpose when `transposed`)."""
    n, lanes = y.shape
    if transposed:
        for j in range(n):
            for h in range(j + 1, n):
                f = u[j, h]
                for i in range(lanes):
                    y[h, i] -= f * y[j, i]
    else:
        for j in range(n - 1, -1, -1):
            for h in range(j):
                f = u[h, j]
                for i in range(lanes):
                    y[h, i] -= f * y[j, i]
