"""The kernels of the JIT backend that work row by row, and attention."""

from __future__ import annotations

import math
from typing import Any

import numba

from halfbyte.formats import encodings
from halfbyte.formats.kv_modes import PAGE
from halfbyte.runtime.backends import jit_tiles as w
from halfbyte.runtime.backends.jit_intrinsics import (
    bits_f64,
    f32_at,
    fma32,
    i32_at,
    i64_at,
    keyed,
    kv_scores,
    kv_weighted,
    load_value,
    store_value,
)
from halfbyte.runtime.backends.jit_kernels import kernel
from halfbyte.runtime.backends.jit_kv import (
    REST_SEED,
    SEED,
    UNPACK_WORDS,
    rotate,
    round_query,
    unpack,
    unrotate,
)
from halfbyte.runtime.backends.jit_math import apply, exp64, tanh64
from halfbyte.runtime.kv_page import TILE


def make_pick(key: str) -> Any:
    """pick: row `index` = row picks[index]."""

    def pick(a, j, worker):
        keyed(key)
        x = f32_at(a[w.X] + i32_at(a[w.IDS])[j] * a[w.X_STRIDE] * 4)
        y = f32_at(a[w.Y] + j * a[w.Y_STRIDE] * 4)
        for c in range(a[w.WIDTH]):
            y[c] = x[c]

    return kernel(pick)


def make_rmsnorm(key: str) -> Any:
    """rmsnorm of row `index`; the sum of squares in float64, four partial sums."""

    def rmsnorm(a, t, worker):
        keyed(key)
        dim, eps = a[w.DIM], bits_f64(a[w.EPS])
        weight = f32_at(a[w.WEIGHT])
        for start in range(0, a[w.WIDTH], dim):
            x = f32_at(a[w.X] + (t * a[w.X_STRIDE] + start) * 4)
            y = f32_at(a[w.Y] + (t * a[w.Y_STRIDE] + start) * 4)
            s0 = s1 = s2 = s3 = 0.0
            whole = dim // 4 * 4
            for c in range(0, whole, 4):
                s0 += numba.float64(x[c]) * x[c]
                s1 += numba.float64(x[c + 1]) * x[c + 1]
                s2 += numba.float64(x[c + 2]) * x[c + 2]
                s3 += numba.float64(x[c + 3]) * x[c + 3]
            for c in range(whole, dim):
                s0 += numba.float64(x[c]) * x[c]
            inverse = numba.float32(1.0 / math.sqrt(((s0 + s1) + (s2 + s3)) / dim + eps))
            if a[w.WEIGHT]:
                for c in range(dim):
                    y[c] = x[c] * inverse * weight[c]
            else:
                for c in range(dim):
                    y[c] = x[c] * inverse

    return kernel(rmsnorm)


def make_layernorm(key: str) -> Any:
    """layernorm of row `index`; mean and variance in float64."""

    def layernorm(a, t, worker):
        keyed(key)
        dim, eps = a[w.DIM], bits_f64(a[w.EPS])
        weight, bias = f32_at(a[w.WEIGHT]), f32_at(a[w.SHIFT])
        for start in range(0, a[w.WIDTH], dim):
            x = f32_at(a[w.X] + (t * a[w.X_STRIDE] + start) * 4)
            y = f32_at(a[w.Y] + (t * a[w.Y_STRIDE] + start) * 4)
            total = 0.0
            for c in range(dim):
                total += x[c]
            mean, squares = total / dim, 0.0
            for c in range(dim):
                centred = x[c] - mean
                squares += centred * centred
            root = math.sqrt(squares / dim + eps)
            for c in range(dim):
                y[c] = numba.float32((x[c] - mean) / root)
            if a[w.WEIGHT]:
                for c in range(dim):
                    y[c] = y[c] * weight[c]
            if a[w.SHIFT]:
                for c in range(dim):
                    y[c] = y[c] + bias[c]

    return kernel(layernorm)


def make_add(key: str) -> Any:
    """add of row `index`: a + scale * b, two roundings."""

    def add(a, t, worker):
        keyed(key)
        x = f32_at(a[w.X] + t * a[w.X_STRIDE] * 4)
        other = f32_at(a[w.X2] + t * a[w.X2_STRIDE] * 4)
        y = f32_at(a[w.Y] + t * a[w.Y_STRIDE] * 4)
        scale = numba.float32(bits_f64(a[w.SCALE]))
        for c in range(a[w.WIDTH]):
            y[c] = x[c] + scale * other[c]

    return kernel(add)


def make_mul(key: str) -> Any:
    """mul of row `index`."""

    def mul(a, t, worker):
        keyed(key)
        x = f32_at(a[w.X] + t * a[w.X_STRIDE] * 4)
        other = f32_at(a[w.X2] + t * a[w.X2_STRIDE] * 4)
        y = f32_at(a[w.Y] + t * a[w.Y_STRIDE] * 4)
        for c in range(a[w.WIDTH]):
            y[c] = x[c] * other[c]

    return kernel(mul)


def make_unary(key: str, function: int) -> Any:
    """unary of row `index`."""

    def unary(a, t, worker):
        keyed(key)
        x = f32_at(a[w.X] + t * a[w.X_STRIDE] * 4)
        y = f32_at(a[w.Y] + t * a[w.Y_STRIDE] * 4)
        p = bits_f64(a[w.SCALE])
        for c in range(a[w.WIDTH]):
            y[c] = apply(function, x[c], p)

    return kernel(unary)


def make_glu(key: str, function: int) -> Any:
    """glu of row `index`: x = [gate | up]."""

    def glu(a, t, worker):
        keyed(key)
        x = f32_at(a[w.X] + t * a[w.X_STRIDE] * 4)
        y = f32_at(a[w.Y] + t * a[w.Y_STRIDE] * 4)
        width = a[w.WIDTH]
        for c in range(width):
            y[c] = apply(function, x[c], 1.0) * x[width + c]

    return kernel(glu)


def make_rope(key: str) -> Any:
    """rope of row `index` from the step's float32[T, n] tables of cosines and sines."""

    def rope(a, t, worker):
        keyed(key)
        n, dim = a[w.HALF], a[w.DIM]
        cos, sin = f32_at(a[w.COS] + t * n * 4), f32_at(a[w.SIN] + t * n * 4)
        for start in range(0, a[w.WIDTH], dim):
            x = f32_at(a[w.X] + (t * a[w.X_STRIDE] + start) * 4)
            y = f32_at(a[w.Y] + (t * a[w.Y_STRIDE] + start) * 4)
            for i in range(n):
                u, v = x[i], x[i + n]
                y[i] = u * cos[i] - v * sin[i]
                y[i + n] = v * cos[i] + u * sin[i]
            for i in range(2 * n, dim):
                y[i] = x[i]

    return kernel(rope)


def make_gather(key: str) -> Any:
    """gather of row `index`; word WEIGHT is the uint32 index vector, which the file's reader has checked."""

    def gather(a, t, worker):
        keyed(key)
        x = f32_at(a[w.X] + t * a[w.X_STRIDE] * 4)
        y = f32_at(a[w.Y] + t * a[w.Y_STRIDE] * 4)
        order = i32_at(a[w.WEIGHT])  # below 2^22, the widest slot
        for c in range(a[w.WIDTH]):
            y[c] = x[order[c]]

    return kernel(gather)


def make_hadamard(key: str) -> Any:
    """hadamard of row `index`: sums and differences of columns 1, 2, 4, ... apart, then the scale."""

    def hadamard(a, t, worker):
        keyed(key)
        dim, width = a[w.DIM], a[w.WIDTH]
        x = f32_at(a[w.X] + t * a[w.X_STRIDE] * 4)
        y = f32_at(a[w.Y] + t * a[w.Y_STRIDE] * 4)
        for c in range(width):
            y[c] = x[c]
        apart = 1
        while apart < dim:
            for start in range(0, width, 2 * apart):
                for c in range(start, start + apart):
                    u, v = y[c], y[c + apart]
                    y[c], y[c + apart] = u + v, u - v
            apart *= 2
        scale = numba.float32(1.0 / math.sqrt(dim))
        for c in range(width):
            y[c] = y[c] * scale

    return kernel(hadamard)


def make_kv_put(spec: str, kind: str) -> Any:
    """kv_put of head `index`, all rows: word KV leads to the addresses of every session's pages (`runtime.kv`)."""
    size = encodings.FLOAT_BYTES[kind]

    def kv_put(a, h, worker):
        k_dim, v_dim = a[w.K_DIM], a[w.V_DIM]
        for t in range(a[w.ROWS]):
            pages = i64_at(i64_at(a[w.KV])[i32_at(a[w.SESSIONS])[t]])
            position = numba.int64(i32_at(a[w.POSITIONS])[t])
            page, at = pages[position // PAGE], position % PAGE
            k = f32_at(a[w.X] + (t * a[w.X_STRIDE] + h * k_dim) * 4)
            v = f32_at(a[w.X2] + (t * a[w.X2_STRIDE] + h * v_dim) * 4)
            keys = page + h * PAGE * (k_dim + v_dim) * size
            lane = keys + (at // TILE * k_dim * TILE + at % TILE) * size
            for c in range(k_dim):
                store_value(spec, kind, lane + c * TILE * size, k[c])
            row = keys + (PAGE * k_dim + at * v_dim) * size
            for c in range(v_dim):
                store_value(spec, kind, row + c * size, v[c])

    return kernel(kv_put)


def make_attend(spec: str, kind: str, heads: int, packed: bool) -> Any:
    """attend: index = row * kv_heads + kv head, with the query heads that it serves, of which word HALF is the number.

    kind: of the cache's floats; 'f32' of a packed cache, whose pages are turned into floats one by one.
    heads: that one conversion of a key serves, 1, 2 or 4, a divisor of that number.
    Scores in float32 (fused, a lane is a position), softmax in float64, values summed in ascending positions.
    """
    size = encodings.FLOAT_BYTES[kind]

    def attend(a, index, worker):
        kv_heads, share, k_dim, v_dim = a[w.KV_HEADS], a[w.HALF], a[w.K_DIM], a[w.V_DIM]
        t, h = index // kv_heads, index % kv_heads
        pages = i64_at(i64_at(a[w.KV])[i32_at(a[w.SESSIONS])[t]])
        end = numba.int64(i32_at(a[w.POSITIONS])[t]) + 1
        start = max(0, end - a[w.WINDOW]) if a[w.WINDOW] else 0
        first = start // PAGE  # scores lie from the start of this page on
        low, n = start - first * PAGE, end - first * PAGE
        head = h * PAGE * (k_dim + v_dim) * size
        scale, cap = bits_f64(a[w.SCALE]), bits_f64(a[w.CAP])
        row = a[w.SCRATCH_ROW] * 4
        scratch = a[w.SCRATCH] + worker * a[w.SCRATCH_SIZE] * 4
        q_at = a[w.X] + (t * a[w.X_STRIDE] + h * share * k_dim) * 4
        y_at = a[w.Y] + (t * a[w.Y_STRIDE] + h * share * v_dim) * 4
        whole_v = v_dim // 16 * 16
        steps = numba.float32(bits_f64(a[w.QUERY_STEPS]))
        own = packed and steps > 0  # beside keys of pages after the first, queries are rounded
        stages = a[w.STAGES] if packed else 1  # of those keys, each with a query of its own
        wanted = (
            scratch + share * row
        )  # the words of `unpack`, and of packed pages: keys, values, then queries
        unpacked = wanted + UNPACK_WORDS * 8
        unpacked_v = unpacked + PAGE * k_dim * stages * 4
        if packed:
            rotated = unpacked_v + PAGE * v_dim * 4
            rounded = rotated + share * k_dim * 4
            for s in range(share):
                x, y = f32_at(q_at + s * k_dim * 4), f32_at(rotated + s * k_dim * 4)
                for c in range(k_dim):
                    y[c] = x[c]
                rotate(y, k_dim, SEED)
                if own:
                    at = rounded + s * stages * k_dim * 4
                    round_query(y, k_dim, steps, f32_at(at))
                    if stages == 2:
                        z = f32_at(at + k_dim * 4)
                        for c in range(k_dim):
                            z[c] = y[c]
                        rotate(z, k_dim, REST_SEED)
                        round_query(z, k_dim, steps, z)
            q_at = rotated
        wide = k_dim
        for j in range(0, n, PAGE):  # the heads that share keys read a page while it is in L1
            keys = pages[first + j // PAGE] + head
            used = (min(PAGE, n - j) + TILE - 1) // TILE
            if packed:
                at = first + j // PAGE
                reader = a[w.OTHER_PAGES] if at > 0 else a[w.FIRST_PAGE]
                unpack(reader, a, wanted, True, pages[at], used, unpacked, h)
                keys = unpacked
                if own and at > 0:
                    q_at, wide = rounded, stages * k_dim
            for s in range(0, share, heads):
                q_s, p_s = q_at + s * wide * 4, scratch + s * row + j * 4
                kv_scores(spec, kind, heads, q_s, keys, wide, used, p_s, row)
        for s in range(share):
            p, y = f32_at(scratch + s * row), f32_at(y_at + s * v_dim * 4)
            for j in range(low, n):
                p[j] = numba.float32(scale * p[j])
            if cap != 0.0:
                for j in range(low, n):
                    p[j] = numba.float32(cap * tanh64(p[j] / cap))
            top = t1 = t2 = t3 = p[low]  # four chains: a compare waits for the one before
            whole = low + (n - low) // 4 * 4
            for j in range(low, whole, 4):
                top, t1 = max(top, p[j]), max(t1, p[j + 1])
                t2, t3 = max(t2, p[j + 2]), max(t3, p[j + 3])
            for j in range(whole, n):
                top = max(top, p[j])
            top = max(max(top, t1), max(t2, t3))
            for j in range(low, n):
                p[j] = numba.float32(exp64(numba.float64(p[j]) - top))
            for c in range(v_dim):
                y[c] = numba.float32(0.0)
        for j in range(0, n, PAGE):
            skip = max(low - j, 0)
            count = min(PAGE, n - j) - skip
            block = pages[first + j // PAGE] + head + (PAGE * k_dim + skip * v_dim) * size
            if packed:
                at, used = first + j // PAGE, (min(PAGE, n - j) + TILE - 1) // TILE
                reader = a[w.OTHER_PAGES] if at > 0 else a[w.FIRST_PAGE]
                unpack(reader, a, wanted, False, pages[at], used, unpacked_v, h)
                block = unpacked_v + skip * v_dim * 4
            for s in range(0, share, heads):
                p_s, y_s = scratch + s * row + (j + skip) * 4, y_at + s * v_dim * 4
                kv_weighted(spec, kind, heads, p_s, row, block, v_dim, v_dim * size, count, y_s)
            for s in range(share):
                p, y = f32_at(scratch + s * row + (j + skip) * 4), f32_at(y_at + s * v_dim * 4)
                for c in range(whole_v, v_dim):
                    for i in range(count):
                        y[c] = fma32(p[i], load_value(spec, kind, block + (i * v_dim + c) * size), y[c])
        for s in range(share):
            p, y = f32_at(scratch + s * row), f32_at(y_at + s * v_dim * 4)
            s0 = s1 = s2 = s3 = 0.0
            whole = low + (n - low) // 4 * 4
            for j in range(low, whole, 4):
                s0 += p[j]
                s1 += p[j + 1]
                s2 += p[j + 2]
                s3 += p[j + 3]
            for j in range(whole, n):
                s0 += p[j]
            total = numba.float32((s0 + s1) + (s2 + s3))
            for c in range(v_dim):
                y[c] = y[c] / total
            if packed:
                unrotate(y, v_dim)

    return kernel(attend)
