"""Inner loops of round-to-nearest, compiled by Numba on first use and cached beside this file.

Every kernel works on a block of rows that no other thread touches and releases the GIL, so callers thread
over blocks. There is no fast-math, and sums over a group run in column order whatever the vector width is:
results are the same for any thread count and any instruction set.

In the q4 search the groups of a batch of rows lie side by side in vector lanes, arrays `[GROUP, lanes]`.
"""

import numpy as np
from numba import njit

GROUP = 32
LANES = 16  # lanes are padded to a multiple of one 512-bit vector of float32
BATCH_LANES = 128  # rows are batched up to about this many lanes: 16 KB of weights, inside L1

# Where the best scale of a group lies, as a multiple of the scale that puts its largest value on one end of
# the level table. On Gaussian, Student-t5 and Laplace data, searching only here costs 0.1 % of the error; the
# end at -127 is the better fit for three groups of four.
NEGATIVE_END_WINDOW = (0.90, 1.24)
POSITIVE_END_WINDOW = (0.90, 1.16)
COARSE = (0.95, 1.01, 1.08)

SMALLEST_ROW = 2.0**-57  # below this even the smallest row scale is too coarse: the row becomes zero


@njit(inline="always")
def _level(y):
    """The q4 level nearest to y, as float32; the thresholds lie half-way between neighbours."""
    f = np.float32
    zero = f(0.0)
    # Three short sums of small integers: exact in any order, and no long dependency chain.
    a = f(23.0) if y > f(-115.5) else zero
    a += f(21.0) if y > f(-93.5) else zero
    a += f(18.0) if y > f(-74.0) else zero
    a += f(16.0) if y > f(-57.0) else zero
    a += f(14.0) if y > f(-42.0) else zero
    b = f(13.0) if y > f(-28.5) else zero
    b += f(12.0) if y > f(-16.0) else zero
    b += f(11.0) if y > f(-4.5) else zero
    b += f(12.0) if y > f(7.0) else zero
    b += f(12.0) if y > f(19.0) else zero
    c = f(13.0) if y > f(31.5) else zero
    c += f(15.0) if y > f(45.5) else zero
    c += f(16.0) if y > f(61.0) else zero
    c += f(20.0) if y > f(79.0) else zero
    c += f(24.0) if y > f(101.0) else zero
    return (a + b) + (c - f(127.0))


@njit(inline="always")
def _code(y):
    """The index of `_level(y)` in the table."""
    f = np.float32
    c = (y > f(-115.5)) + (y > f(-93.5)) + (y > f(-74.0)) + (y > f(-57.0)) + (y > f(-42.0))
    c += (y > f(-28.5)) + (y > f(-16.0)) + (y > f(-4.5)) + (y > f(7.0)) + (y > f(19.0))
    c += (y > f(31.5)) + (y > f(45.5)) + (y > f(61.0)) + (y > f(79.0)) + (y > f(101.0))
    return c


@njit(nogil=True, cache=True, error_model="numpy")
def _moments(x, weight, d, shift, inverse, sxq, sqq):
    """Weighted sums of x*q and q*q in each lane, q being the levels nearest to x/d: what refits d."""
    lanes = x.shape[1]
    for i in range(lanes):
        inverse[i] = np.float32(1.0) / d[i] if d[i] != np.float32(0.0) else np.float32(0.0)
        sxq[i] = np.float32(0.0)
        sqq[i] = np.float32(0.0)
    for j in range(GROUP):
        for i in range(lanes):
            v = x[j, i]
            q = _level(v * inverse[i] - shift[i]) + shift[i]
            wq = weight[j, i] * q
            sxq[i] += wq * v
            sqq[i] += wq * q


@njit(nogil=True, cache=True, error_model="numpy")
def _errors(x, weight, d, shift, inverse, error):
    """Weighted squared error of each lane under scale d, every code at its nearest level."""
    lanes = x.shape[1]
    for i in range(lanes):
        inverse[i] = np.float32(1.0) / d[i] if d[i] != np.float32(0.0) else np.float32(0.0)
        error[i] = np.float32(0.0)
    for j in range(GROUP):
        for i in range(lanes):
            v = x[j, i]
            q = _level(v * inverse[i] - shift[i]) + shift[i]
            e = v - d[i] * q
            error[i] += weight[j, i] * (e * e)


@njit(inline="always")
def _odd(v):
    """The odd integer nearest to v >= 0, within 1..127."""
    return min(np.float32(2.0) * np.floor(v * np.float32(0.5)) + np.float32(1.0), np.float32(127.0))


@njit(nogil=True, cache=True, error_model="numpy")
def search_q4(w, weight, codes, sub, row):
    """Quantise finite w[rows, cols] to q4: fills codes[rows, cols], sub[rows, groups] and row[rows].

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
        for trial in range(4 * len(COARSE)):
            offset = np.float32(4.0 * (trial & 1))
            table_end = offset + np.float32(113.0 if trial & 2 else -127.0)
            ratio = np.float32(COARSE[trial >> 2])
            for i in range(lanes):
                shift[i] = offset
                d[i] = ratio * end[i] / table_end
            _moments(x, weight, d, shift, inverse, sxq, sqq)
            for i in range(lanes):
                gain = sxq[i] * sxq[i] / sqq[i] if sqq[i] > zero else zero
                if gain > best[i]:
                    best[i] = gain
                    best_d[i] = sxq[i] / sqq[i] if sqq[i] > zero else d[i]
                    best_sqq[i] = sqq[i]

        # Row scale: of the E6M2 values near max|d| / 127, the one under which rounding every d to an odd
        # multiple costs least. Smaller ones clip the largest groups, and may still win.
        for n in range(height):
            dmax = zero
            for i in range(n * groups, (n + 1) * groups):
                dmax = max(dmax, abs(best_d[i]))
            row[top + n] = 0
            if dmax == zero:
                continue
            first = 4 * (int(np.floor(np.log2(np.float64(dmax) / 127.0))) + exponent[n] + 60)
            lowest = np.inf
            for r in range(max(1, min(first - 2, 255)), max(1, min(first + 7, 255)) + 1):
                s = np.float32((1.0 + 0.25 * (r & 3)) * 2.0 ** ((r >> 2) - 60 - exponent[n]))
                total = 0.0
                for i in range(n * groups, (n + 1) * groups):
                    magnitude = abs(best_d[i])
                    e = np.float64(magnitude - s * _odd(magnitude / s))
                    total += best_sqq[i] * e * e
                if total < lowest:
                    lowest = total
                    row[top + n] = r
                    for i in range(n * groups, (n + 1) * groups):
                        scale[i] = s

        # Fine pass: every odd k of the windows, both tables, the true error under the rounded scale.
        for i in range(lanes):
            best[i] = np.float32(np.inf)
            best_k[i] = np.float32(1.0)
            best_shift[i] = zero
        for trial in range(4):
            offset = np.float32(4.0 * (trial & 1))
            table_end = offset + np.float32(113.0 if trial & 2 else -127.0)
            window = POSITIVE_END_WINDOW if trial & 2 else NEGATIVE_END_WINDOW
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
                _errors(x, weight, d, shift, inverse, error)
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
                _errors(x, weight, d, best_shift, inverse, error)
                for i in range(lanes):
                    if error[i] < best[i]:
                        best[i] = error[i]
                        best_k[i] = d[i] / scale[i]
                        moved = True

        for n in range(height):
            for g in range(groups):
                i = n * groups + g
                sub[top + n, g] = (int(np.rint(best_k[i])) + 127) | int(best_shift[i] * np.float32(0.25))
                back = np.float32(1.0) / (scale[i] * best_k[i])
                for j in range(min(GROUP, cols - g * GROUP)):
                    codes[top + n, g * GROUP + j] = _code(x[j, i] * back - best_shift[i])


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
