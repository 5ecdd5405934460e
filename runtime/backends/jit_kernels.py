"""The JIT kernels that read matrices, one factory an op (jit_rows.py has the rest), and the task driver.

Every kernel is a C function `void(int64 *args, int64 index, int64 worker)` compiled by Numba and kept
in its disk cache; `args` is laid out in jit_tiles.py. A row's results depend on nothing but the row:
each float sum runs in an order fixed by the matrix and the position alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
import numpy as np

from halfbyte.formats import encodings, ops
from halfbyte.runtime.backends import jit_tiles as w
from halfbyte.runtime.backends.jit_intrinsics import (
    bits_f32,
    call_kernel,
    f32_at,
    f32_bits,
    fetch_add,
    i8_at,
    i32_at,
    i64_at,
    keyed,
    load_value,
    u8_at,
)
from halfbyte.runtime.backends.jit_tiles import MatrixSpec, matrix_tile, token_tiles

_SIGNATURE = "void(CPointer(int64), int64, int64)"
_TINY_BITS = int(np.float32(2.0**-100).view(np.int32))
_ROUND = np.float32(1.5 * 2**23)


@lru_cache(maxsize=1)
def digest() -> str:
    """Of the sources that kernels are made of: Numba's cache looks at one file only."""
    h = hashlib.sha256()
    here = Path(__file__).resolve().parent
    for path in (*sorted(here.glob("jit*.py")), Path(encodings.__file__), Path(ops.__file__)):
        h.update(path.read_bytes())
    return h.hexdigest()[:16]


def _compile(decorator: Callable, signature: str, function: Callable, **options: Any) -> Any:
    """Compile with the disk cache; without it where no folder can be written (Numba refuses then)."""
    try:
        return decorator(signature, cache=True, error_model="numpy", **options)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        return decorator(signature, error_model="numpy", **options)(function)


def kernel(function: Callable) -> Any:
    """The compiled kernel: an object with `address`."""
    return _compile(numba.cfunc, _SIGNATURE, function)


def make_driver(key: str, parallel: bool) -> Any:
    """run(table, first, last, threads, counter): tasks first <= i < last, each after the one before.

    Indices of a task are handed out one at a time, so that a busy core delays nobody.
    """
    kind = f"{key}|{parallel}"

    def run(table, first, last, threads, counter):
        keyed(kind)
        for task in range(first, last):
            args = table + task * (w.WORDS * 8)
            a = i64_at(args)
            kernel, n = a[w.KERNEL], a[w.COUNT]
            if threads == 1 or n == 1 or a[w.PARALLEL] == 0:
                for i in range(n):
                    call_kernel(kernel, args, i, 0)
            else:
                i64_at(counter)[0] = 0
                for worker in numba.prange(threads):
                    i = fetch_add(counter)
                    while i < n:
                        call_kernel(kernel, args, i, worker)
                        i = fetch_add(counter)

    signature = "void(int64, int64, int64, int64, int64)"
    return _compile(numba.njit, signature, run, parallel=parallel, nogil=True)


# ---- matrices -----------------------------------------------------------------------------------


def make_linear(spec: MatrixSpec) -> Any:
    """linear: index = a run of SPAN panels; token tiles outside, so that both stay in the cache."""
    text = spec.text
    integer = spec.policy == "i8g32" and not encodings.BY_NAME[spec.encoding].is_float
    big = token_tiles(spec.isa, integer)[0]
    middle = big > 4

    def linear(a, i, worker):
        rows, out = a[w.ROWS], a[w.OUT]
        first = i * a[w.SPAN]
        last = min(first + a[w.SPAN], (out + 15) // 16)
        t = 0
        while t + big <= rows:
            for panel in range(first, last):
                matrix_tile(text, big, a, panel, t)
            t += big
        if middle:
            while t + 4 <= rows:
                for panel in range(first, last):
                    matrix_tile(text, 4, a, panel, t)
                t += 4
        while t < rows:
            for panel in range(first, last):
                matrix_tile(text, 1, a, panel, t)
            t += 1
        if a[w.BIAS]:
            bias = f32_at(a[w.BIAS])
            for row in range(rows):
                y = f32_at(a[w.Y] + row * a[w.Y_STRIDE] * 4)
                for c in range(first * 16, min(last * 16, out)):
                    y[c] += bias[c]

    return kernel(linear)


def make_quantize(isa: str, key: str) -> Any:
    """Activations of row `index` to int8 per 32 columns, laid out in the tiles that `linear` walks.

    A tile of n tokens is [32-column group][n][32] codes, [group][n] scales, [block][n] sums of codes.
    """
    big = token_tiles(isa, True)[0]

    def quantize(a, t, worker):
        keyed(key)
        rows, width, blocks = a[w.ROWS], a[w.WIDTH], a[w.BLOCKS]
        start = rows // big * big  # of the tokens after the whole big tiles
        if t < start:
            n = big
            first = t // big * big
        elif t < start + (rows - start) // 4 * 4:
            n = 4
            first = start + (t - start) // 4 * 4
        else:
            n = 1
            first = t
        column = t - first
        x = f32_at(a[w.X] + t * a[w.X_STRIDE] * 4)
        codes = a[w.XQ] + first * a[w.XQ_ROW]
        scales = f32_at(a[w.XD] + first * a[w.XD_ROW])
        sums = f32_at(a[w.XSUM] + first * blocks * 4)
        block = a[w.BLOCK]
        for g in range((width + 31) // 32):
            at = g * 32
            live = min(32, width - at)
            top = numba.int32(0)
            for j in range(live):
                top = max(top, f32_bits(x[at + j]) & numba.int32(0x7FFFFFFF))
            amax = bits_f32(top)
            d, inverse = numba.float32(0.0), numba.float32(0.0)
            if top >= _TINY_BITS:
                d = amax / numba.float32(127.0)
                inverse = numba.float32(127.0) / amax
            q = i8_at(codes + (g * n + column) * 32)
            for j in range(live):
                r = f32_bits(x[at + j] * inverse + _ROUND) - f32_bits(_ROUND)
                q[j] = min(max(r, numba.int32(-127)), numba.int32(127))
            for j in range(live, 32):
                q[j] = 0
            scales[g * n + column] = d
            for part in range(32 // block):
                b = g * (32 // block) + part
                if b < blocks:
                    total = numba.int32(0)
                    for j in range(part * block, (part + 1) * block):
                        total += numba.int32(q[j])
                    sums[b * n + column] = numba.float32(total)

    return kernel(quantize)


def make_embed(spec: MatrixSpec) -> Any:
    """embed: row `index` = dequantised row ids[index] of the table."""
    text, enc = spec.text, encodings.BY_NAME[spec.encoding]
    kind = enc.name if enc.is_float else (spec.scale_type or "f32")
    size = encodings.FLOAT_BYTES[kind]
    plain, bits, signed, row_scale = enc.is_float, enc.bits, enc.signed, enc.row_scale
    has_min, has_zero = enc.offset == "min", enc.offset == "zero"
    levels = enc.levels or tuple(range(16))
    step = encodings.Q4_SHIFT

    def embed(a, t, worker):
        width, groups = a[w.WIDTH], a[w.GROUPS]
        row = i32_at(a[w.IDS])[t]
        panel, lane = row // 16, row % 16
        y = f32_at(a[w.Y] + t * a[w.Y_STRIDE] * 4)
        base = a[w.CODES] + panel * a[w.CODES_PANEL]
        if plain:
            for c in range(width):
                y[c] = load_value(text, kind, base + (c * 16 + lane) * size)
            return
        codes = u8_at(base)
        group = a[w.PER_GROUP]  # columns here
        for g in range(groups):
            index = g * 16 + lane
            shift, low = numba.int32(0), numba.float32(0.0)
            if row_scale:
                raw = numba.int32(u8_at(a[w.SCALES] + panel * a[w.SCALES_PANEL])[index])
                r = numba.int32(u8_at(a[w.ROW] + panel * 16)[lane])
                scale = numba.float32(0.0)
                if r:
                    scale = bits_f32(numba.int32(((r >> 2) + 67) << 23 | (r & 3) << 21))
                s = scale * numba.float32((raw & 254) - 127)
                shift = numba.int32(step * (raw & 1))
            else:
                at = panel * a[w.SCALES_PANEL] + index * size
                s = load_value(text, kind, a[w.SCALES] + at)
                if has_min:
                    low = load_value(text, kind, a[w.MINS] + at)
                if has_zero:
                    shift = -numba.int32(u8_at(a[w.ZEROS] + panel * groups * 16)[index])
            for c in range(g * group, min((g + 1) * group, width)):
                if bits == 8:
                    code = numba.int32(codes[((c >> 2) * 16 + lane) * 4 + (c & 3)])
                    if signed and code > 127:
                        code -= numba.int32(256)
                else:
                    byte = codes[((c >> 3) * 16 + lane) * 4 + (c & 3)]
                    code = numba.int32(levels[(byte >> (c & 4)) & 15])
                value = s * numba.float32(code + shift)
                if has_min:
                    value = value + low
                y[c] = value

    return kernel(embed)
