"""Inner loops of GPTQ, compiled by Numba on first use and cached beside this file.

Everything here works on `[columns, lanes]`: the rows of a weight matrix lie side by side in vector lanes and a
column is one loop over them, so that every loop vectorises and no sum depends on the vector width.

The levels of an encoding come as two tables over half units, `level[i]` and `code[i]` for y with
floor(2 y) = i - HALF: levels are integers, so the thresholds between neighbours are multiples of one half.
"""

import numpy as np
from numba import njit

from halfbyte.converter.quantizers._grid import _odd, row_scale

HALF = 512
TABLE = 2 * HALF


@njit(inline="always")
def _index(y):
    return np.uint32(min(max(np.floor(y + y) + np.float32(HALF), np.float32(0.0)), np.float32(TABLE - 1)))


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
    """`row_scale` of each lane of d[groups, lanes]: fills row[lanes] and scale[lanes]."""
    for i in range(d.shape[1]):
        row[i], scale[i] = row_scale(d[:, i], sqq[:, i], exponent[i])


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
def response(h, gradient, q):
    """(slope, curve), float32[lanes] each: q . gradient and q H q^T, of which the best step of a scale follows."""
    n, lanes = q.shape
    slope = np.zeros(lanes, np.float32)
    curve = np.zeros(lanes, np.float32)
    hq = np.empty(lanes, np.float32)
    for j in range(n):
        for i in range(lanes):
            hq[i] = np.float32(0.0)
        for p in range(n):
            f = h[j, p]
            for i in range(lanes):
                hq[i] += f * q[p, i]
        for i in range(lanes):
            slope[i] += gradient[j, i] * q[j, i]
            curve[i] += hq[i] * q[j, i]
    return slope, curve


@njit(nogil=True, cache=True, error_model="numpy")
def add_change(h, ds, dm, q, gradient, error, change):
    """Add ds q + dm to the error of a group, and what follows from it to `change` and `gradient`."""
    n, lanes = q.shape
    delta = np.empty(lanes, np.float32)
    for j in range(n):
        for i in range(lanes):
            delta[i] = ds[i] * q[j, i] + dm[i]
            error[j, i] += delta[i]
            change[j, i] += delta[i]
        for p in range(n):
            f = h[j, p]
            for i in range(lanes):
                gradient[p, i] += f * delta[i]


@njit(nogil=True, cache=True, error_model="numpy")
def affine_errors(x, weight, s, m, shift, level):
    """Weighted squared error[lanes] of a group x[n, lanes] ~ s (level + shift) + m, every code at its nearest."""
    n, lanes = x.shape
    inverse = np.empty(lanes, np.float32)
    error = np.zeros(lanes, np.float32)
    for i in range(lanes):
        inverse[i] = np.float32(1.0) / s[i] if s[i] != np.float32(0.0) else np.float32(0.0)
    for j in range(n):
        w = weight[j]
        for i in range(lanes):
            q = level[_index((x[j, i] - m[i]) * inverse[i] - shift[i])] + shift[i]
            e = x[j, i] - (s[i] * q + m[i])
            error[i] += w * (e * e)
    return error


@njit(nogil=True, cache=True, error_model="numpy")
def affine_moments(x, weight, s, m, shift, level):
    """float32[5, lanes]: weighted sums of 1, q, q q, x, q x, with q = level + shift as in `affine_errors`."""
    n, lanes = x.shape
    inverse = np.empty(lanes, np.float32)
    sums = np.zeros((5, lanes), np.float32)
    for i in range(lanes):
        inverse[i] = np.float32(1.0) / s[i] if s[i] != np.float32(0.0) else np.float32(0.0)
    for j in range(n):
        w = weight[j]
        for i in range(lanes):
            v = x[j, i]
            q = level[_index((v - m[i]) * inverse[i] - shift[i])] + shift[i]
            sums[0, i] += w
            sums[1, i] += w * q
            sums[2, i] += w * q * q
            sums[3, i] += w * v
            sums[4, i] += w * q * v
    return sums


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
