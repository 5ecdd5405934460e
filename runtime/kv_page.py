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


def rotate(x: np.ndarray, seed: int = kv_modes.SIGN_SEED) -> np.ndarray:
    """float32[..., n] -> H(sign * x) / sqrt(run) over runs of columns, in float32 butterflies 1, 2, 4 ... apart."""
    n = x.shape[-1]
    return _hadamard(x.astype(F32) * kv_modes.signs(n, seed), kv_modes.run_of(n))


def unrotate(y: np.ndarray, seed: int = kv_modes.SIGN_SEED) -> np.ndarray:
    """The inverse of `rotate`, in float64."""
    n = y.shape[-1]
    return _hadamard(y.astype(np.float64), kv_modes.run_of(n)) * kv_modes.signs(n, seed)


def _unrotate_twice(z: np.ndarray) -> np.ndarray:
    return unrotate(unrotate(z, kv_modes.REST_SEED))


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
    """What `attend` takes for float32 q[..., n] beside keys of this side, float64: rotated, rounded, and back.

    Beside signs there is a second query after the first, which is rotated twice: [..., 2n].
    """
    if not side.query_steps:
        return q.astype(np.float64)
    y = rotate(q)
    first = unrotate(_round(y, side.query_steps))
    if not side.second:
        return first
    second = _unrotate_twice(_round(rotate(y, kv_modes.REST_SEED), side.query_steps))
    return np.concatenate([first, second], axis=-1)


def _round(y: np.ndarray, steps: int) -> np.ndarray:
    top = np.abs(y).max(axis=-1, keepdims=True)
    live = (top > F32(1e-30)) & (top < np.inf)
    inverse = np.where(live, F32(steps) / np.where(live, top, F32(1)), F32(0))
    return np.rint(y * inverse).astype(np.float64) * top / steps


def dequantize(codes: np.ndarray, scales: np.ndarray, side: Side) -> np.ndarray:
    """The rotated values of codes: level * scale, float32."""
    level = np.asarray(side.levels, F32)[codes] if side.levels else codes.view(np.int8).astype(F32)
    return level * kv_modes.e5m3_value(scales)[..., None]


def encode(x: np.ndarray, side: Side) -> list[tuple[np.ndarray, np.ndarray]]:
    """float32[..., n] -> (codes, scale bytes) of every stage of the side."""
    y = rotate(x)
    codes, scales = quantize(y, side)
    if not side.second:
        return [(codes, scales)]
    with np.errstate(invalid="ignore"):
        rest = y - dequantize(codes, scales, side)
        return [(codes, scales), quantize(rotate(rest, kv_modes.REST_SEED), side.second)]


def decode(stages: list[tuple[np.ndarray, np.ndarray]], side: Side) -> np.ndarray:
    """What they mean: float64[..., n], or [..., 2n] of two stages, whose sum is the vector."""
    first = unrotate(dequantize(*stages[0], side))
    if not side.second:
        return first
    return np.concatenate([first, _unrotate_twice(dequantize(*stages[1], side.second))], axis=-1)


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
    """By head: codes of keys, their scales, codes of values, their scales, signs, their scales (`kv_modes.layout`)."""

    __slots__ = ("parts", "sides")

    def __init__(self, heads: int, k_dim: int, v_dim: int, sides: tuple[Side, Side]):
        offsets, sizes = kv_modes.layout(sides, k_dim, v_dim)
        super().__init__(heads, k_dim, v_dim, sum(sizes))
        self.sides = sides
        by_head = self.bytes.reshape(heads, -1)
        self.parts = [by_head[:, a : a + n] for a, n in zip(offsets, sizes)]

    def _planes(self) -> list[tuple[int, Side, int, int]]:
        """(part, side, rows, columns) of the codes of keys, of values, and of signs."""
        k, v = self.sides
        k_cols, v_rows = align(self.k_dim, COLUMN_PAD), align(self.v_dim, PANEL)
        planes = [(0, k, PAGE, k_cols), (2, v, v_rows, PAGE)]
        return [*planes, (4, k.second, PAGE, k_cols)] if k.second else planes

    def _codes(self) -> list[np.ndarray]:
        """Codes of keys [heads, 64, k_dim padded to 32], of values [heads, v_dim padded to 16, 64], and of signs."""
        return [
            _unpack(self.parts[i].reshape(self.heads * rows // PANEL, -1), side.bits, cols).reshape(
                self.heads, rows, cols
            )
            for i, side, rows, cols in self._planes()
        ]

    def _store(self, codes: list[np.ndarray]) -> None:
        for c, (i, side, _, cols) in zip(codes, self._planes()):
            self.parts[i][:] = _pack(c.reshape(-1, cols), side.bits).reshape(self.heads, -1)

    def put(self, at: int, k: np.ndarray, v: np.ndarray) -> None:
        """Rotated and quantised, every head and position by itself."""
        stored, here = self._codes(), slice(at, at + k.shape[1])
        (first, *signs), (values,) = (encode(x, side) for x, side in zip((k, v), self.sides))
        for part, new in zip((0, 2, 4), (first, values, *signs)):
            codes, self.parts[part + 1][:, here] = new
            if part == 2:
                stored[1][:, : self.v_dim, here] = codes.view(np.uint8).transpose(0, 2, 1)
            else:
                stored[part // 2][:, here, : self.k_dim] = codes.view(np.uint8)
        self._store(stored)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Rotated back, in float64; keys of two stages are [heads, 64, 2 * k_dim], see `decode`."""
        k, v, *signs = self._codes()
        stages = [(c[:, :, : self.k_dim], self.parts[i]) for c, i in zip((k, *signs), (1, 5))]
        values = v[:, : self.v_dim].transpose(0, 2, 1)
        return decode(stages, self.sides[0]), decode([(values, self.parts[3])], self.sides[1])

    def like(self) -> Page:
        """An empty page of the same form."""
        return PackedPage(self.heads, self.k_dim, self.v_dim, self.sides)

    def clear(self, start: int) -> None:
        """Zero the positions from `start` on."""
        codes = self._codes()
        for c, (i, *_) in zip(codes, self._planes()):
            self.parts[i + 1][:, start:] = 0
            if i == 2:
                c[:, :, start:] = 0
            else:
                c[:, start:] = 0
        self._store(codes)


def new_page(mode: Mode, index: int, heads: int, k_dim: int, v_dim: int) -> Page:
    """An empty page number `index` of a cache of this mode."""
    if mode.packed:
        return PackedPage(heads, k_dim, v_dim, mode.at(index))
    return FloatPage(heads, k_dim, v_dim, np.float32 if mode.k.bits == 32 else np.float16)
