"""Inner loops of round-to-nearest, compiled by Numba on first use and cached beside this file.

Every kernel works on a block of rows that no other thread touches and releases the GIL, so callers thread
over blocks. There is no fast-math, and sums over a group run in column order whatever the vector width is:
results are the same for any thread count and any instruction set.

In the search of the q family the groups of a batch of rows lie side by side in vector lanes, arrays `[GROUP, lanes]`.
"""

from itertools import pairwise

import numpy as np
from llvmlite.ir import Constant
from numba import njit, types
from numba.extending import intrinsic

GROUP = 32
LANES = 16  # lanes are padded to a multiple of one 512-bit vector of float32
BATCH_LANES = 128  # rows are batched up to about this many lanes: 16 KB of weights, inside L1

SMALLEST_ROW = 2.0**-57  # below this even the smallest row scale is too coarse: the row becomes zero


def _above_thresholds(typingctx, y, levels, gain):
    """Type and code of a sum over the thresholds below y; they lie half-way between neighbouring levels.

    Each contributes gain(level, next level). The tuple's length is part of its type, so the sum is unrolled:
    short sums of small integers, exact in any order, without a branch or a load that would stop a vector loop.
    """

    def generate(context, builder, signature, args):
        y, packed = args
        table = [builder.extract_value(packed, i) for i in range(len(signature.args[1]))]
        half, zero = Constant(y.type, 0.5), Constant(y.type, 0.0)
        terms = []
        for level, following in pairwise(table):
            threshold = builder.fmul(builder.fadd(level, following), half)
            above = builder.fcmp_ordered(">", y, threshold)
            terms.append(builder.select(above, gain(builder, level, following), zero))
        while len(terms) > 1:
            pairs = zip(terms[::2], terms[1::2])
            terms = [builder.fadd(a, b) for a, b in pairs] + terms[len(terms) & ~1 :]
        return terms[0]

    return types.float32(y, levels), generate


@intrinsic
def _rise(typingctx, y, levels):
    """What the level nearest to y is above levels[0], as float32."""
    return _above_thresholds(typingctx, y, levels, lambda builder, low, high: builder.fsub(high, low))


@intrinsic
def _index(typingctx, y, levels):
    """The number of the level nearest to y, as float32."""
    return _above_thresholds(typingctx, y, levels, lambda builder, low, high: Constant(low.type, 1.0))


@njit(inline="always")
def _level(y, levels):
    """The level nearest to y, as float32."""
    return _rise(y, levels) + levels[0]


@njit(nogil=True, cache=True, error_model="numpy")
def _moments(x, weight, levels, d, shift, inverse, sxq, sqq):
    """Weighted sums of x*q and q*q in each lane, q being the levels nearest to x/d: what refits d."""
    lanes = x.shape[1]
    for i in range(lanes):
        inverse[i] = np.float32(1.0) / d[i] if d[i] != np.float32(0.0) else np.float32(0.0)
        sxq[i] = np.float32(0.0)
        sqq[i] = np.float32(0.0)
    for j in range(GROUP):
        for i in range(lanes):
            v = x[j, i]
            q = _level(v * inverse[i] - shift[i], levels) + shift[i]
            wq = weight[j, i] * q
            sxq[i] += wq * v
            sqq[i] += wq * q


@njit(nogil=True, cache=True, error_model="numpy")
def _errors(x, weight, levels, d, shift, inverse, error):
    """Weighted squared error of each lane under scale d, every code at its nearest level."""
    lanes = x.shape[1]
    for i in range(lanes):
        inverse[i] = np.float32(1.0) / d[i] if d[i] != np.float32(0.0) else np.float32(0.0)
        error[i] = np.float32(0.0)
    for j in range(GROUP):
        for i in range(lanes):
            v = x[j, i]
            q = _level(v * inverse[i] - shift[i], levels) + shift[i]
            e = v - d[i] * q
            error[i] += weight[j, i] * (e * e)


@njit(inline="always")
def _odd(v):
    """The odd integer nearest to v >= 0, within 1..127."""
    return min(np.float32(2.0) * np.floor(v * np.float32(0.5)) + np.float32(1.0), np.float32(127.0))


@njit(nogil=True, cache=True, error_model="numpy")
def row_scale(d, sqq, exponent):
    """The E6M2 row scale under which rounding every d to an odd multiple costs least: (byte, value times 2^-exponent).

    d[groups] are the free scales of a row and sqq[groups] what a unit of squared deviation costs. Values near
    max|d| / 127 are tried; smaller ones clip the largest groups, and may still win. (0, 0) for a row of zeros.
    """
    row, scale = 0, np.float32(0.0)
    largest = np.float32(0.0)
    for g in range(len(d)):
        largest = max(largest, abs(d[g]))
    if largest == np.float32(0.0):
        return row, scale
    first = 4 * (int(np.floor(np.log2(np.float64(largest) / 127.0))) + exponent + 60)
    lowest = np.inf
    for r in range(max(1, min(first - 2, 255)), max(1, min(first + 7, 255)) + 1):
        s = np.float32((1.0 + 0.25 * (r & 3)) * 2.0 ** ((r >> 2) - 60 - exponent))
        total = 0.0
        for g in range(len(d)):
            magnitude = abs(d[g])
            e = np.float64(magnitude - s * _odd(magnitude / s))
            total += sqq[g] * e * e
        if total < lowest:
            lowest = total
            row, scale = r, s
    return row, scale


@njit(nogil=True, cache=True, error_model="numpy")
def search(w, weight, levels, shifted, ratios, windows, codes, sub, row):
    """Quantise finite w[rows, cols] to one of the q family: fills codes[rows, cols], sub[rows, groups], row[rows].

    levels is the table, a tuple of float32 whose ends have opposite signs, and shifted what its shift adds. A
    scale is tried as a multiple of the one that puts the largest value of the group on one end of the table:
    `ratios` first, to find the row scale, and then all in windows[0] for the first level, windows[1] for the last.
    weight[GROUP, lanes] holds the importance of each column in lane order, repeated for as many rows as are
    to be batched (lane = row * groups + group), and 0 where there is no column.
    """
    rows, cols = w.shape
    groups = sub.shape[1]
    lanes = weight.shape[1]
    batch = max(1, min(rows, lanes // groups))
    zero = np.float32(0.0)
    x = np.zeros((GROUP, lanes), np.float32)
    exponent = np.zeros(batch, np.int64)
    scale = np.empty(lanes, np.float32)
    end = np.empty(lanes, np.float32)  # the largest value of the group, with its sign
    d = np.empty(lanes, np.float32)
    shift = np.empty(lanes, np.float32)
    inverse = np.empty(lanes, np.float32)
    sxq = np.empty(lanes, np.float32)
    sqq = np.empty(lanes, np.float32)
    error = np.empty(lanes, np.float32)
    low = np.empty(lanes, np.float32)
    high = np.empty(lanes, np.float32)
    best = np.empty(lanes, np.float32)
    best_d = np.empty(lanes, np.float32)
    best_sqq = np.empty(lanes, np.float32)
    best_k = np.empty(lanes, np.float32)
    best_shift = np.empty(lanes, np.float32)
    for top in range(0, rows, batch):
        height = min(batch, rows - top)
        for i in range(lanes):
            end[i] = zero
            scale[i] = np.float32(1.0)
            best[i] = np.float32(-1.0)
            for j in range(GROUP):
                x[j, i] = zero
        for n in range(height):
            amax = zero
            for j in range(cols):
                amax = max(amax, abs(w[top + n, j]))
            # An exact power of two brings the row below 1, so that no square over- or underflows.
            exponent[n] = 0
            if amax < SMALLEST_ROW:
                continue
            exponent[n] = int(np.ceil(np.log2(np.float64(amax))))
            unit = 2.0 ** -exponent[n]
            for g in range(groups):
                peak = zero
                for j in range(min(GROUP, cols - g * GROUP)):
                    v = np.float32(w[top + n, g * GROUP + j] * unit)
                    x[j, n * groups + g] = v
                    if abs(v) > abs(peak):
                        peak = v
                end[n * groups + g] = peak

        # Coarse pass: about the least-squares scale of every group, unrounded.
        for trial in range(4 * len(ratios)):
            offset = shifted * np.float32(trial & 1)
            table_end = offset + (levels[-1] if trial & 2 else levels[0])
            ratio = np.float32(ratios[trial >> 2])
            for i in range(lanes):
                shift[i] = offset
                d[i] = ratio * end[i] / table_end
            _moments(x, weight, levels, d, shift, inverse, sxq, sqq)
            for i in range(lanes):
                gain = sxq[i] * sxq[i] / sqq[i] if sqq[i] > zero else zero
                if gain > best[i]:
                    best[i] = gain
                    best_d[i] = sxq[i] / sqq[i] if sqq[i] > zero else d[i]
                    best_sqq[i] = sqq[i]

        for n in range(height):
            first, last = n * groups, (n + 1) * groups
            row[top + n], unit = row_scale(best_d[first:last], best_sqq[first:last], exponent[n])
            if row[top + n] != 0:
                for i in range(first, last):
                    scale[i] = unit

        # Fine pass: every odd k of the windows, both tables, the true error under the rounded scale.
        for i in range(lanes):
            best[i] = np.float32(np.inf)
            best_k[i] = np.float32(1.0)
            best_shift[i] = zero
        for trial in range(4):
            offset = shifted * np.float32(trial & 1)
            table_end = offset + (levels[-1] if trial & 2 else levels[0])
            window = windows[1] if trial & 2 else windows[0]
            steps = 0
            for i in range(lanes):
                shift[i] = offset
                k = abs(end[i] / (table_end * scale[i]))
                low[i] = _odd(np.float32(window[0]) * k)
                high[i] = _odd(np.float32(window[1]) * k)
                steps = max(steps, int(high[i] - low[i]) // 2 + 1)
            for step in range(steps):
                for i in range(lanes):
                    k = min(low[i] + np.float32(2.0 * step), high[i])
                    d[i] = scale[i] * (k if (end[i] < zero) == (table_end < zero) else -k)
                _errors(x, weight, levels, d, shift, inverse, error)
                for i in range(lanes):
                    if error[i] < best[i]:
                        best[i] = error[i]
                        best_k[i] = d[i] / scale[i]
                        best_shift[i] = offset

        # Neighbours of the winners, until no step lowers an error.
        moved = True
        while moved:
            moved = False
            for trial in range(2):
                delta = np.float32(4.0 * trial - 2.0)
                for i in range(lanes):
                    d[i] = scale[i] * min(max(best_k[i] + delta, np.float32(-127.0)), np.float32(127.0))
                _errors(x, weight, levels, d, best_shift, inverse, error)
                for i in range(lanes):
                    if error[i] < best[i]:
                        best[i] = error[i]
                        best_k[i] = d[i] / scale[i]
                        moved = True

        for n in range(height):
            for g in range(groups):
                i = n * groups + g
                sub[top + n, g] = (int(np.rint(best_k[i])) + 127) | int(best_shift[i] != zero)
                back = np.float32(1.0) / (scale[i] * best_k[i])
                for j in range(min(GROUP, cols - g * GROUP)):
                    codes[top + n, g * GROUP + j] = int(_index(x[j, i] * back - best_shift[i], levels))


@njit(nogil=True, cache=True)
def group_ranges(bits, group, low, high):
    """Smallest and largest value of every group, as ordered integers (see `rtn._unordered`).

    bits[rows, cols] is the int32 view of float32 weights. As integers the loop vectorises, and infinities
    and NaNs come out at the ends instead of being skipped by a comparison.
    """
    rows, cols = bits.shape
    for n in range(rows):
        for g in range(low.shape[1]):
            least = np.int32(2147483647)
            most = np.int32(-2147483648)
            for j in range(g * group, min((g + 1) * group, cols)):
                v = bits[n, j]
                v ^= (v >> np.int32(31)) & np.int32(2147483647)
                least = min(least, v)
                most = max(most, v)
            low[n, g] = least
            high[n, g] = most


@njit(inline="always")
def _affine_code(v, s, m, z, least, most):
    return min(max(np.rint((v - m) / s) + z, least), most)


@njit(nogil=True, cache=True, error_model="numpy")
def affine_errors(w, group, s, m, z, least, most, error):
    """Squared error[rows, groups] of w ~ s * (c - z) + m with c the nearest integer in least..most."""
    rows, cols = w.shape
    for n in range(rows):
        for g in range(s.shape[1]):
            total = np.float32(0.0)
            for j in range(g * group, min((g + 1) * group, cols)):
                v = w[n, j]
                c = z[n, g]
                if s[n, g] != np.float32(0.0):
                    c = _affine_code(v, s[n, g], m[n, g], z[n, g], least, most)
                e = v - (s[n, g] * (c - z[n, g]) + m[n, g])
                total += e * e
            error[n, g] = total


@njit(nogil=True, cache=True, error_model="numpy")
def affine_codes(w, group, s, m, z, least, most, codes):
    """The codes of `affine_errors`, int8[rows, cols] (an unsigned code keeps its low eight bits)."""
    rows, cols = w.shape
    for n in range(rows):
        for g in range(s.shape[1]):
            first, last = g * group, min((g + 1) * group, cols)
            if s[n, g] == np.float32(0.0):
                for j in range(first, last):
                    codes[n, j] = np.int8(np.int32(z[n, g]))
                continue
            for j in range(first, last):
                c = _affine_code(w[n, j], s[n, g], m[n, g], z[n, g], least, most)
                codes[n, j] = np.int8(np.int32(c))
