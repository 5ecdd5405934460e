"""Pages: 64 positions of one cache, as floats or as rotated codes. The NumPy here is the law of SPEC.md section 10.5.

Every other backend writes the same bytes. What is summed has one order (16 lanes, as the kernels have them).
"""

from __future__ import annotations

import numpy as np

from halfbyte.formats import kv_modes, tiles
from halfbyte.formats.kv_modes import PAGE, Mode, Side
from halfbyte.formats.tiles import COLUMN_PAD, PANEL, align

TILE = 16  # positions of a tile of keys
_ALIGN = 64  # bytes
F32 = np.float32


def rotate(x: np.ndarray) -> np.ndarray:
    """float32[..., n] -> H(sign * x) / sqrt(run) over runs of columns, in float32 butterflies 1, 2, 4 ... apart."""
    n = x.shape[-1]
    return _hadamard(x.astype(F32) * kv_modes.signs(n), kv_modes.run_of(n))


def unrotate(y: np.ndarray) -> np.ndarray:
    """The inverse of `rotate`, in float64."""
    n = y.shape[-1]
    return _hadamard(y.astype(np.float64), kv_modes.run_of(n)) * kv_modes.signs(n)


def _hadamard(y: np.ndarray, run: int) -> np.ndarray:
    shape, apart = y.shape, 1
    while apart < run:
        a, b = np.moveaxis(y.reshape(-1, 2, apart), 1, 0)
        y, apart = np.stack([a + b, a - b], axis=1), 2 * apart
    scale = 1.0 / np.sqrt(run)
    return y.reshape(shape) * (F32(scale) if y.dtype == F32 else scale)


def _sum16(squares: np.ndarray) -> np.ndarray:
    """Sums of the last axis: lane i % 16 adds in ascending order, then halves of the lanes are added."""
    n = squares.shape[-1]
    lanes = np.zeros((*squares.shape[:-1], align(n, 16)), F32)
    lanes[..., :n] = squares
    lanes = lanes.reshape(*squares.shape[:-1], -1, 16)
    total = np.zeros((*squares.shape[:-1], 16), F32)
    for i in range(lanes.shape[-2]):
        total = total + lanes[..., i, :]
    for half in (8, 4):
        total = total[..., :half] + total[..., half:]
    return (total[..., 0] + total[..., 2]) + (total[..., 1] + total[..., 3])


def quantize(y: np.ndarray, side: Side) -> tuple[np.ndarray, np.ndarray]:
    """Rotated float32[..., n] -> (codes uint8 or int8[..., n], scale bytes uint8[...])."""
    with np.errstate(over="ignore", invalid="ignore"):
        if side.rule == "amax":
            size = np.abs(y).max(axis=-1)
        else:
            size = np.sqrt(_sum16(y * y) / F32(y.shape[-1]))
        scales = kv_modes.e5m3(F32(side.factor) * size, up=not side.levels)
        value = kv_modes.e5m3_value(scales)
        inverse = np.where(value > 0, F32(1) / np.where(value > 0, value, F32(1)), F32(0))
        u = y * inverse[..., None]
        if not side.levels:
            return np.clip(np.rint(u), -127, 127).astype(np.int8), scales
        levels = np.asarray(side.levels, F32)
        above = u[..., None] > (levels[1:] + levels[:-1]) / 2
        return above.sum(axis=-1).astype(np.uint8), scales


def round_query(q: np.ndarray, side: Side) -> np.ndarray:
    """What `attend` takes for float32 q[..., n] beside keys of this side, float64: rotated, rounded, and back."""
    if not side.query_steps:
        return q.astype(np.float64)
    y = rotate(q)
    top = np.abs(y).max(axis=-1, keepdims=True)
    live = (top > F32(1e-30)) & (top < np.inf)
    inverse = np.where(live, F32(side.query_steps) / np.where(live, top, F32(1)), F32(0))
    return unrotate(np.rint(y * inverse).astype(np.float64) * top / side.query_steps)


def dequantize(codes: np.ndarray, scales: np.ndarray, side: Side) -> np.ndarray:
    """The rotated values of codes: level * scale, float32."""
    level = np.asarray(side.levels, F32)[codes] if side.levels else codes.view(np.int8).astype(F32)
    return level * kv_modes.e5m3_value(scales)[..., None]


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8[panels * 16, cols] -> uint8[panels, bytes]: by panel the low bits, then the highest of 1 and 3 bits."""
    low = {8: 8, 4: 4, 3: 2, 2: 2, 1: 0}[bits]
    panels = len(codes) // PANEL
    parts = [tiles.pack_codes(codes & ((1 << low) - 1), low).reshape(panels, -1)] if low else []
    if bits - low:
        parts.append(tiles.pack_codes(codes >> low, 1).reshape(panels, -1))
    return np.concatenate(parts, axis=1)


def _unpack(data: np.ndarray, bits: int, cols: int) -> np.ndarray:
    """The inverse of `_pack`, for uint8[panels, bytes]."""
    low = {8: 8, 4: 4, 3: 2, 2: 2, 1: 0}[bits]
    rows, at = len(data) * PANEL, low * cols * 2
    codes: np.ndarray = np.zeros((rows, cols), np.uint8)
    if low:
        codes = tiles.unpack_codes(np.ascontiguousarray(data[:, :at]).reshape(-1), low, rows, cols)
    if bits - low:
        codes = (
            codes | tiles.unpack_codes(np.ascontiguousarray(data[:, at:]).reshape(-1), 1, rows, cols) << low
        )
    return codes


class Page:
    """64 positions of one cache: bytes that start on a cache line. A page that is `shared` is never written again."""

    __slots__ = ("bytes", "heads", "k_dim", "shared", "v_dim")

    def __init__(self, heads: int, k_dim: int, v_dim: int, head_bytes: int):
        self.heads, self.k_dim, self.v_dim = heads, k_dim, v_dim
        raw = np.zeros(heads * head_bytes + _ALIGN, np.uint8)
        start = -raw.ctypes.data % _ALIGN
        self.bytes = raw[start : start + heads * head_bytes]
        self.shared = False

    def put(self, at: int, k: np.ndarray, v: np.ndarray) -> None:
        """Store k [heads, n, k_dim] and v [heads, n, v_dim] at positions at <= p < at + n of the page."""
        raise NotImplementedError

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """What the page means: [heads, 64, k_dim] and [heads, 64, v_dim]."""
        raise NotImplementedError

    def cleared(self, start: int) -> bytes:
        """The bytes with the positions from `start` on zeroed."""
        if start >= PAGE:
            return self.bytes.tobytes()
        other = self.like()
        other.bytes[:] = self.bytes
        other.clear(start)
        return other.bytes.tobytes()

    def like(self) -> Page:
        """An empty page of the same form."""
        raise NotImplementedError

    def clear(self, start: int) -> None:
        """Zero the positions from `start` on."""
        raise NotImplementedError


class FloatPage(Page):
    """By head: keys [4][k_dim][16], so that a lane of a vector is a position, then values [64][v_dim]."""

    __slots__ = ("keys", "values")

    def __init__(self, heads: int, k_dim: int, v_dim: int, dtype: type[np.floating]):
        super().__init__(heads, k_dim, v_dim, PAGE * (k_dim + v_dim) * np.dtype(dtype).itemsize)
        by_head = self.bytes.view(dtype).reshape(heads, PAGE * (k_dim + v_dim))
        self.keys = by_head[:, : PAGE * k_dim].reshape(heads, PAGE // TILE, k_dim, TILE)
        self.values = by_head[:, PAGE * k_dim :].reshape(heads, PAGE, v_dim)

    def put(self, at: int, k: np.ndarray, v: np.ndarray) -> None:
        """Rounded to nearest even where the page is float16."""
        with np.errstate(over="ignore"):
            for i in range(k.shape[1]):
                self.keys[:, (at + i) // TILE, :, (at + i) % TILE] = k[:, i]
            self.values[:, at : at + k.shape[1]] = v

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Views, as stored."""
        return self.keys.transpose(0, 1, 3, 2).reshape(self.heads, PAGE, self.k_dim), self.values

    def like(self) -> Page:
        """An empty page of the same form."""
        return FloatPage(self.heads, self.k_dim, self.v_dim, self.keys.dtype.type)

    def clear(self, start: int) -> None:
        """Zero the positions from `start` on."""
        n = PAGE - start
        self.put(start, np.zeros((self.heads, n, self.k_dim)), np.zeros((self.heads, n, self.v_dim)))


class PackedPage(Page):
    """By head: codes of keys, their scales, codes of values, their scales (`kv_modes.layout`)."""

    __slots__ = ("parts", "sides")

    def __init__(self, heads: int, k_dim: int, v_dim: int, sides: tuple[Side, Side]):
        offsets, sizes = kv_modes.layout(sides, k_dim, v_dim)
        super().__init__(heads, k_dim, v_dim, sum(sizes))
        self.sides = sides
        by_head = self.bytes.reshape(heads, -1)
        self.parts = [by_head[:, a : a + n] for a, n in zip(offsets, sizes)]

    def _codes(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes of keys [heads, 64, k_dim padded to 32] and of values [heads, v_dim padded to 16, 64]."""
        (k_side, v_side), kc, vc = self.sides, self.parts[0], self.parts[2]
        k_cols = align(self.k_dim, COLUMN_PAD)
        k = _unpack(kc.reshape(self.heads * PAGE // TILE, -1), k_side.bits, k_cols)
        v = _unpack(vc.reshape(self.heads * align(self.v_dim, PANEL) // PANEL, -1), v_side.bits, PAGE)
        return k.reshape(self.heads, PAGE, -1), v.reshape(self.heads, -1, PAGE)

    def _store(self, k: np.ndarray, v: np.ndarray) -> None:
        for codes, part, side in zip((k, v), (self.parts[0], self.parts[2]), self.sides):
            part[:] = _pack(codes.reshape(-1, codes.shape[-1]), side.bits).reshape(self.heads, -1)

    def put(self, at: int, k: np.ndarray, v: np.ndarray) -> None:
        """Rotated and quantised, every head and position by itself."""
        n = k.shape[1]
        k_codes, v_codes = self._codes()
        for x, side, scales in zip((k, v), self.sides, (self.parts[1], self.parts[3])):
            codes, scales[:, at : at + n] = quantize(rotate(x), side)
            if x is k:
                k_codes[:, at : at + n, : self.k_dim] = codes.view(np.uint8)
            else:
                v_codes[:, : self.v_dim, at : at + n] = codes.view(np.uint8).transpose(0, 2, 1)
        self._store(k_codes, v_codes)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Rotated back, in float64."""
        k, v = self._codes()
        k = dequantize(k[:, :, : self.k_dim], self.parts[1], self.sides[0])
        v = dequantize(v[:, : self.v_dim].transpose(0, 2, 1), self.parts[3], self.sides[1])
        return unrotate(k), unrotate(v)

    def like(self) -> Page:
        """An empty page of the same form."""
        return PackedPage(self.heads, self.k_dim, self.v_dim, self.sides)

    def clear(self, start: int) -> None:
        """Zero the positions from `start` on."""
        k, v = self._codes()
        k[:, start:], v[:, :, start:] = 0, 0
        self._store(k, v)
        self.parts[1][:, start:], self.parts[3][:, start:] = 0, 0


def new_page(mode: Mode, index: int, heads: int, k_dim: int, v_dim: int) -> Page:
    """An empty page number `index` of a cache of this mode."""
    if mode.packed:
        return PackedPage(heads, k_dim, v_dim, mode.at(index))
    return FloatPage(heads, k_dim, v_dim, np.float32 if mode.k.bits == 32 else np.float16)
