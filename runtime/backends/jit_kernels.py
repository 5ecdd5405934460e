"""The JIT kernels that read matrices, one factory an op (jit_rows.py has the rest).

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

from halfbyte.formats import encodings, kv_modes, ops, tiles
from halfbyte.runtime.backends import jit_tiles as w
from halfbyte.runtime.backends.jit_intrinsics import (
    bits_f32,
    f32_at,
    f32_bits,
    i8_at,
    i32_at,
    keyed,
    load_value,
    u8_at,
)
from halfbyte.runtime.backends.jit_tiles import MatrixSpec, matrix_tile, token_tiles

_SIGNATURE = "void(CPointer(int64), int64, int64)"
_TINY_BITS = int(np.float32(2.0**-100).view(np.int32))
_ROUND = np.float32(1.5 * 2**23)
_SUPER = encodings.SUPER


@lru_cache(maxsize=1)
def digest() -> str:
    """Of the sources that kernels are made of: Numba's cache looks at one file only."""
    h = hashlib.sha256()
    here = Path(__file__).resolve().parent
    for path in (
        *sorted(here.glob("jit*.py")),
        *(Path(str(m.__file__)) for m in (encodings, kv_modes, ops, tiles)),
    ):
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


def compiled(signature: str, function: Callable) -> Any:
    """A function for Python to call; it runs without the interpreter's lock."""
    return _compile(numba.njit, signature, function, nogil=True)


# ---- matrices -----------------------------------------------------------------------------------


def make_linear(spec: MatrixSpec) -> Any:
    """linear: index = a run of SPAN panels; token tiles outside, so that both stay in the cache."""
    text = spec.text
    integer = spec.policy == "i8g32" and encodings.BY_NAME[spec.encoding].is_integer
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


def level_values(encoding: encodings.Encoding) -> np.ndarray:
    """float32 levels of an encoding by the byte of the code."""
    if encoding.levels is not None:
        return np.array(encoding.levels, np.float32)
    return np.arange(256).astype(np.int8 if encoding.signed else np.uint8).astype(np.float32)


def make_embed(spec: MatrixSpec) -> Any:
    """embed: row `index` = dequantised row ids[index] of the table."""
    text, enc = spec.text, encodings.BY_NAME[spec.encoding]
    two_level = spec.scale_type == encodings.K256
    kind = enc.name if enc.is_float else "f32" if two_level else spec.scale_type or "f32"
    size = 1 if two_level or enc.row_scale else encodings.FLOAT_BYTES[kind]
    plain, row_scale, step = enc.is_float, enc.row_scale, enc.shift
    has_min, has_zero = enc.offset == "min", enc.offset == "zero"
    low, high = tiles.CODE_BITS[enc.bits] if enc.has_codes else (8, 0)
    low_fields, high_fields = 8 // low, 8 // (high or 8)
    low_mask, high_mask = (1 << low) - 1, (1 << high) - 1
    levels = level_values(enc)

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
        codes, more = u8_at(base), u8_at(a[w.HIGH] + panel * a[w.HIGH_PANEL])
        group = a[w.PER_GROUP]  # columns here
        for g in range(groups):
            index = g * 16 + lane
            shift, floor = numba.float32(0.0), numba.float32(0.0)
            at = panel * a[w.SCALES_PANEL] + index * size
            if row_scale:
                raw = numba.int32(u8_at(a[w.SCALES] + at)[0])
                r = numba.int32(u8_at(a[w.ROW] + panel * 16)[lane])
                scale = numba.float32(0.0)
                if r:
                    scale = bits_f32(numba.int32(((r >> 2) + 67) << 23 | (r & 3) << 21))
                s = scale * numba.float32((raw & 254) - 127)
                shift = numba.float32(step * (raw & 1))
            elif two_level:
                wide = panel * a[w.SUPERS_PANEL] + (g * group // _SUPER * 16 + lane) * 2
                s = load_value(text, "f16", a[w.SUPERS] + wide)
                if has_min:
                    s = s * numba.float32(u8_at(a[w.SCALES] + at)[0])
                    low_scale = load_value(text, "f16", a[w.SUPERMINS] + wide)
                    floor = -(low_scale * numba.float32(u8_at(a[w.MINS] + at)[0]))
                else:
                    s = s * numba.float32(i8_at(a[w.SCALES] + at)[0])
            else:
                s = load_value(text, kind, a[w.SCALES] + at)
                if has_min:
                    floor = load_value(text, kind, a[w.MINS] + at)
                if has_zero:
                    shift = -numba.float32(u8_at(a[w.ZEROS] + panel * groups * 16)[index])
            for c in range(g * group, min((g + 1) * group, width)):
                quad, j = c >> 2, lane * 4 + (c & 3)
                code = codes[quad // low_fields * 64 + j] >> (quad % low_fields * low) & low_mask
                if high:
                    top = more[quad // high_fields * 64 + j] >> (quad % high_fields * high) & high_mask
                    code |= top << low
                level = levels[code]
                if row_scale or has_zero:
                    level = level + shift
                value = s * level
                if has_min:
                    value = value + floor
                y[c] = value

    return kernel(embed)
