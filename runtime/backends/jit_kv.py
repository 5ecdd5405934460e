"""Packed caches in the JIT backend: the rotation, codes written, and pages turned back into rotated floats.

What is written is the same to the bit as `runtime.kv_page` writes; SPEC.md section 10.5 has the arithmetic.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from halfbyte.formats import kv_modes
from halfbyte.formats.kv_modes import BY_SIDE, PAGE, Side
from halfbyte.runtime.backends import jit_tiles as w
from halfbyte.runtime.backends.jit_intrinsics import (
    bits_f32,
    call_kernel,
    f32_at,
    f32_bits,
    i32_at,
    i64_at,
    keyed,
    u8_at,
)
from halfbyte.runtime.backends.jit_kernels import kernel
from halfbyte.runtime.kv_page import TILE

F32 = numba.float32
SEED, REST_SEED = np.uint64(kv_modes.SIGN_SEED), np.uint64(kv_modes.REST_SEED)
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2, _ONE = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(1)
_BASE = (127 - kv_modes.E5M3_BIAS) << 3
# Words that the kernels of one page read: of `make_unpack`, and of `make_pack`.
KEYS, PAGE_AT, K_DIM, V_DIM, TILES, OUT, UNPACK_WORDS = range(7)
VALUES, AT, PACK_WORDS = range(4, 7)


@numba.njit
def _flip_signs(y, n, seed):
    for i in range(0, n, 64):
        z = seed + numba.uint64(i // 64 + 1) * _STEP
        z = (z ^ (z >> numba.uint64(30))) * _MIX1
        z = (z ^ (z >> numba.uint64(27))) * _MIX2
        z = z ^ (z >> numba.uint64(31))
        for j in range(i, min(n, i + 64)):
            if (z >> numba.uint64(j - i)) & _ONE:
                y[j] = -y[j]


@numba.njit
def _hadamard(y, n):
    run, apart = n & -n, 1
    while apart < run:
        for start in range(0, n, 2 * apart):
            for c in range(start, start + apart):
                u, v = y[c], y[c + apart]
                y[c], y[c + apart] = u + v, u - v
        apart *= 2
    scale = F32(1.0 / math.sqrt(run))
    for c in range(n):
        y[c] = y[c] * scale


@numba.njit
def rotate(y, n, seed):
    """In place; see `kv_page.rotate`."""
    _flip_signs(y, n, seed)
    _hadamard(y, n)


@numba.njit
def unrotate(y, n):
    """The inverse, in place."""
    _hadamard(y, n)
    _flip_signs(y, n, SEED)


@numba.njit
def round_query(y, n, steps, out):
    """Rotated y to `steps` steps of its largest magnitude; see `kv_page.round_query`."""
    top = F32(0.0)
    for c in range(n):
        top = max(top, abs(y[c]))
    inverse = steps / top if F32(1e-30) < top < F32(np.inf) else F32(0.0)
    for c in range(n):
        out[c] = F32(np.rint(F32(y[c] * inverse))) * F32(top / steps)


@numba.njit
def _scale_value(code):
    return F32(0.0) if code == 0 else bits_f32(numba.int32((numba.int32(code) + _BASE) << 20))


@numba.njit
def _put_field(plane, bits, row, col, value):
    per = 4 * (8 // bits)
    shift = col % per // 4 * bits
    at = col // per * 64 + row * 4 + col % 4
    mask = ((1 << bits) - 1) << shift
    plane[at] = numba.uint8((numba.int64(plane[at]) & ~mask) | (value << shift))


@numba.njit
def _field(plane, bits, row, col):
    per = 4 * (8 // bits)
    at = col // per * 64 + row * 4 + col % 4
    return (numba.int64(plane[at]) >> (col % per // 4 * bits)) & ((1 << bits) - 1)


def _code_access(bits: int) -> tuple[Any, Any]:
    """(put, get) of the code of a row and column of a panel of `cols` columns at an address."""
    low = {8: 8, 4: 4, 3: 2, 2: 2, 1: 0}[bits]
    high, mask = bits - low, (1 << low) - 1

    @numba.njit
    def put(panel, cols, row, col, code):
        if low:
            _put_field(u8_at(panel), low, row, col, code & mask)
        if high:
            _put_field(u8_at(panel + 2 * cols * low), 1, row, col, code >> low)

    @numba.njit
    def get(panel, cols, row, col):
        code = 0
        if low:
            code = _field(u8_at(panel), low, row, col)
        if high:
            code |= _field(u8_at(panel + 2 * cols * low), 1, row, col) << low
        return code

    return put, get


def _quantizer(side: Side, keys: bool) -> Any:
    """A function that writes the codes and the scale byte of n rotated values, as position `at` of a page."""
    bits, by_amax, factor = side.bits, side.rule == "amax", np.float32(side.factor)
    half = 1 << 19 if side.levels else (1 << 20) - 1
    levels = np.asarray(side.levels or (0, 0), np.float32)
    between = tuple(float(v) for v in (levels[1:] + levels[:-1]) / 2)
    count = len(between) if side.levels else 0
    put_code, _ = _code_access(bits)

    @numba.njit
    def quantize(y, n, at, codes, scales):
        size = F32(0.0)
        if by_amax:
            for i in range(n):
                size = max(size, abs(y[i]))
        else:
            lanes = numba.carray(y, n + 32)[n + 16 - n % 16 : n + 32 - n % 16]
            for i in range(16):
                lanes[i] = F32(0.0)
            for i in range(n):
                lanes[i % 16] = lanes[i % 16] + y[i] * y[i]
            for i in range(8):
                lanes[i] = lanes[i] + lanes[i + 8]
            for i in range(4):
                lanes[i] = lanes[i] + lanes[i + 4]
            size = F32(math.sqrt(((lanes[0] + lanes[2]) + (lanes[1] + lanes[3])) / F32(n)))
        code = ((numba.int64(f32_bits(F32(factor * size))) + half) >> 20) - _BASE
        code = min(max(code, 0), 255)
        u8_at(scales)[at] = numba.uint8(code)
        value = _scale_value(code)
        inverse = F32(1.0) / value if code > 0 else F32(0.0)
        cols = (n + 31) // 32 * 32
        for i in range(n):
            u = F32(y[i] * inverse)
            c = numba.int64(0)
            if count == 0:
                c = numba.int64(min(max(np.rint(u), F32(-127.0)), F32(127.0))) & 255
            else:
                for k in range(count):
                    if u > F32(between[k]):
                        c += 1
            if keys:
                put_code(codes + at // TILE * 2 * cols * bits, cols, at % TILE, i, c)
            else:
                put_code(codes + i // 16 * 2 * PAGE * bits, PAGE, i % 16, at, c)

    return quantize


def _rest(side: Side) -> Any:
    """A function that leaves of n rotated values, whose scale byte is `code`, what their levels leave."""
    levels = np.asarray(side.levels or (0, 0), np.float32)
    low = float(levels[0])
    steps = tuple((float(m), float(d)) for m, d in zip((levels[1:] + levels[:-1]) / 2, np.diff(levels)))

    @numba.njit
    def rest(y, n, code):
        value = _scale_value(code)
        inverse = F32(1.0) / value if code > 0 else F32(0.0)
        for i in range(n):
            u, level = F32(y[i] * inverse), F32(low)
            for between, step in steps:
                if u > F32(between):
                    level += F32(step)
            y[i] = y[i] - level * value  # a product of 7 and 4 bits is exact

    return rest


def _level_table(side: Side) -> tuple[float, ...]:
    """The level of every code."""
    if side.levels:
        return tuple(float(v) for v in side.levels)
    return tuple(float(v) for v in np.arange(256, dtype=np.uint8).view(np.int8))


def _reader(side: Side, keys: bool) -> Any:
    """A function that turns the codes of a page's head into rotated floats.

    Keys are columns from <= c < from + n of [4][wide][16], values [64][n].
    """
    bits, table = side.bits, _level_table(side)
    _, get_code = _code_access(bits)

    @numba.njit
    def read(codes, scales, n, tiles, out, start, wide):
        levels, s = table, u8_at(scales)
        if keys:
            cols = (n + 31) // 32 * 32
            for tile in range(tiles):
                panel = codes + tile * 2 * cols * bits
                for c in range(n):
                    for r in range(16):
                        level = F32(levels[get_code(panel, cols, r, c)])
                        out[(tile * wide + start + c) * 16 + r] = level * _scale_value(s[tile * 16 + r])
        else:
            for c in range(n):
                panel = codes + c // 16 * 2 * PAGE * bits
                for j in range(tiles * 16):
                    out[j * n + c] = F32(levels[get_code(panel, PAGE, c % 16, j)]) * _scale_value(s[j])

    return read


def _offsets(k: Side, v: Side) -> Any:
    """A function of (k_dim, v_dim): where all parts but the first start (`kv_modes.layout`), and a head's bytes."""
    k_bits, v_bits, signs_too = k.bits, v.bits, bool(k.rest)

    @numba.njit
    def offsets(k_dim, v_dim):
        columns = PAGE * ((k_dim + 31) // 32 * 32) // 8
        values = columns * k_bits + PAGE
        v_scales = values + PAGE * ((v_dim + 15) // 16 * 16) * v_bits // 8
        signs = v_scales + PAGE
        size = signs + columns + PAGE if signs_too else signs
        return columns * k_bits, values, v_scales, signs, signs + columns, size

    return offsets


@numba.njit
def unpack(kernel, a, at, keys, page, tiles, out, h):
    """Of head h of a page: keys or values as rotated floats at `out`, by a kernel of `make_unpack`."""
    words = i64_at(at)
    words[KEYS], words[PAGE_AT], words[TILES], words[OUT] = keys, page, tiles, out
    words[K_DIM], words[V_DIM] = a[w.K_DIM], a[w.V_DIM]
    call_kernel(kernel, at, h, 0)


def make_unpack(key: str, k: str, v: str) -> Any:
    """Unpack the first TILES * 16 positions of head `index` of the page at PAGE_AT, rotated as they are.

    KEYS: whether keys, [4][wide][16] with wide = K_DIM, or of sides with signs those beside it: 2 * K_DIM; otherwise
    values, [64][V_DIM].
    """
    second = BY_SIDE[k].second
    signs = _reader(second or BY_SIDE["t1"], True)
    two = second is not None
    offsets = _offsets(BY_SIDE[k], BY_SIDE[v])
    read_keys, read_values = _reader(BY_SIDE[k], True), _reader(BY_SIDE[v], False)

    def unpack_page(a, h, _):
        keyed(key)
        k_dim, v_dim, tiles, out = a[K_DIM], a[V_DIM], a[TILES], f32_at(a[OUT])
        k_scales, values, v_scales, sign_codes, sign_scales, size = offsets(k_dim, v_dim)
        head = a[PAGE_AT] + h * size
        if a[KEYS]:
            wide = 2 * k_dim if two else k_dim
            read_keys(head, head + k_scales, k_dim, tiles, out, 0, wide)
            if two:
                signs(head + sign_codes, head + sign_scales, k_dim, tiles, out, k_dim, wide)
        else:
            read_values(head + values, head + v_scales, v_dim, tiles, out, 0, v_dim)

    return kernel(unpack_page)


def make_pack(key: str, k: str, v: str) -> Any:
    """Write rotated floats as position AT of head `index` of the page at PAGE_AT: a key at KEYS, a value at VALUES.

    Behind each lie 32 floats that are written over, as the key is.
    """
    pack_key, pack_value = _quantizer(BY_SIDE[k], True), _quantizer(BY_SIDE[v], False)
    offsets = _offsets(BY_SIDE[k], BY_SIDE[v])
    second = BY_SIDE[k].second
    two, rest, pack_signs = second is not None, _rest(BY_SIDE[k]), _quantizer(second or BY_SIDE["t1"], True)

    def pack_position(a, h, _):
        keyed(key)
        k_dim, v_dim, at = a[K_DIM], a[V_DIM], a[AT]
        k_scales, values, v_scales, sign_codes, sign_scales, size = offsets(k_dim, v_dim)
        head = a[PAGE_AT] + h * size
        y = f32_at(a[KEYS])
        pack_key(y, k_dim, at, head, head + k_scales)
        if two:
            rest(y, k_dim, u8_at(head + k_scales)[at])
            rotate(y, k_dim, REST_SEED)
            pack_signs(y, k_dim, at, head + sign_codes, head + sign_scales)
        pack_value(f32_at(a[VALUES]), v_dim, at, head + values, head + v_scales)

    return kernel(pack_position)


def make_packed_put(key: str) -> Any:
    """kv_put of head `index`, all rows: positions of a page share bytes."""

    def kv_put(a, h, worker):
        keyed(key)
        k_dim, v_dim = a[w.K_DIM], a[w.V_DIM]
        wanted = a[w.SCRATCH] + worker * a[w.SCRATCH_SIZE] * 4
        words, keys = i64_at(wanted), wanted + PACK_WORDS * 8
        values = keys + (k_dim + 32) * 4
        words[KEYS], words[VALUES], words[K_DIM], words[V_DIM] = keys, values, k_dim, v_dim
        for t in range(a[w.ROWS]):
            pages = i64_at(i64_at(a[w.KV])[i32_at(a[w.SESSIONS])[t]])
            position = numba.int64(i32_at(a[w.POSITIONS])[t])
            words[PAGE_AT], words[AT] = pages[position // PAGE], position % PAGE
            x, y = f32_at(a[w.X] + (t * a[w.X_STRIDE] + h * k_dim) * 4), f32_at(keys)
            for c in range(k_dim):
                y[c] = x[c]
            rotate(y, k_dim, SEED)
            x, y = f32_at(a[w.X2] + (t * a[w.X2_STRIDE] + h * v_dim) * 4), f32_at(values)
            for c in range(v_dim):
                y[c] = x[c]
            rotate(y, v_dim, SEED)
            call_kernel(a[w.FIRST_PAGE] if position < PAGE else a[w.OTHER_PAGES], wanted, h, 0)

    return kernel(kv_put)
