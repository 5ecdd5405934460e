"""Stored forms of keys and values: the table that caches, kernels, `fit` and the command line read.

A *side* is the form of keys or of values. Sides of 8 bits and less store, for every position and head, one
scale byte and a code a column, after a rotation (SPEC.md section 10.5):

    y = H(sign * x) / sqrt(n) over runs of n columns; scale = e5m3(factor * amax(y) or rms(y)); level nearest to
    y / scale

`t1`..`t4` are the Lloyd-Max levels of a normal distribution (TurboQuant, arXiv 2504.19874, without its QJL stage)
as 8-bit integers. `q2`..`q4`, of keys only, are TurboQuant's inner-product variant: the levels of one bit less, then
the signs of what these leave after a second rotation, with a scale of their own. A *mode* names the sides of keys and
of values; modes below 8 bits keep the first page (64 positions, the attention sinks) at 8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from .errors import UsageError
from .tiles import COLUMN_PAD, PANEL, align

PAGE = 64  # positions of a page
E5M3_BIAS = 24  # code 0 is 0, others are 2^((code >> 3) - 24) * (1 + (code & 7) / 8)
QUERY_STEPS = 64  # see Side.query_steps
SIGN_SEED = 0x68616C6662797465  # of the signs of the rotation
REST_SEED = 0x726573696475616C  # of the second rotation


@dataclass(frozen=True)
class Side:
    """bits: of a code, or of a float; levels: of codes in ascending order, empty where the code is the level.

    rule: what the scale follows, 'amax' or 'rms', times `factor`; '' for floats. rest: the factor for the signs of
    what the levels leave, 0 where these are not stored.
    """

    name: str
    number: int
    bits: int
    levels: tuple[int, ...] = ()
    rule: str = ""
    factor: float = 0.0
    rest: float = 0.0

    @property
    def second(self) -> Side | None:
        """The form of the signs of what the levels leave: `t1` with another scale."""
        return replace(BY_SIDE["t1"], factor=self.rest) if self.rest else None

    @property
    def stages(self) -> int:
        """Of what is stored for a key: 2 with `second`."""
        return 2 if self.rest else 1

    @property
    def packed(self) -> bool:
        """Whether codes are stored."""
        return bool(self.rule)

    @property
    def query_steps(self) -> int:
        """Steps of its largest magnitude that a rotated query has beside keys of this side; 0: not rounded."""
        return QUERY_STEPS if self.levels else 0


def _lloyd_max(*positive: float) -> tuple[tuple[int, ...], str, float]:
    """Levels, rule and factor of a codebook given by its positive half in standard deviations."""
    top = positive[-1]
    half = [round(c / top * 127) for c in positive]
    return (*(-c for c in reversed(half)), *half), "rms", top / 127


_NORMAL = {
    "1": _lloyd_max(0.79788),
    "2": _lloyd_max(0.45278, 1.51042),
    "3": _lloyd_max(0.24509, 0.75601, 1.34391, 2.15195),
    "4": _lloyd_max(0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259),
}
_UNBIASED = math.sqrt(math.pi / 2) / 127  # E|x| of a normal x is sqrt(2 / pi) of its root mean square

SIDES = (
    Side("f32", 0, 32),
    Side("f16", 1, 16),
    Side("8", 2, 8, (), "amax", 1 / 127),
    Side("4", 3, 4, tuple(range(-15, 16, 2)), "amax", 0.9 / 15),
    Side("t1", 4, 1, *_NORMAL["1"]),
    Side("t2", 5, 2, *_NORMAL["2"]),
    Side("t3", 6, 3, *_NORMAL["3"]),
    Side("t4", 7, 4, *_NORMAL["4"]),
    Side("q2", 8, 1, *_NORMAL["1"], _UNBIASED),
    Side("q3", 9, 2, *_NORMAL["2"], _UNBIASED),
    Side("q4", 10, 3, *_NORMAL["3"], _UNBIASED),
)
BY_SIDE = {s.name: s for s in SIDES}

# mode -> (keys, values); `k<side>v<side>` names any other pair of packed sides, `q?` for keys
MODES: dict[str, tuple[str, str]] = {
    "f32": ("f32", "f32"),
    "f16": ("f16", "f16"),
    "k8v8": ("8", "8"),
    "k8v4": ("8", "4"),
    "k4v4": ("4", "4"),
    "tq4": ("t4", "t4"),
    "tq3.5": ("t4", "t3"),
    "tq3": ("t3", "t3"),
    "tq3-qjl": ("q3", "t3"),
    "tq2.5": ("t3", "t2"),
    "tq2": ("t2", "t2"),
}


@dataclass(frozen=True)
class Mode:
    """The sides of one cache. `at(page)` gives those of a page."""

    name: str
    k: Side
    v: Side

    @property
    def packed(self) -> bool:
        """Whether codes are stored."""
        return self.k.packed

    def at(self, page: int) -> tuple[Side, Side]:
        """(keys, values) of page number `page`."""
        eight = BY_SIDE["8"]
        return (eight, eight) if self.packed and page == 0 else (self.k, self.v)

    @property
    def word(self) -> int:
        """The four side numbers as the kernels take them: keys, values, and both again for the first page."""
        return sum(s.number << 8 * i for i, s in enumerate((self.k, self.v, *self.at(0))))

    def head_bytes(self, page: int, k_dim: int, v_dim: int) -> int:
        """Bytes of one head in a page."""
        return sum(layout(self.at(page), k_dim, v_dim)[1])

    def bits_per_value(self, k_dim: int, v_dim: int) -> float:
        """Stored bits a value on pages after the first, scales and padding included."""
        return self.head_bytes(1, k_dim, v_dim) * 8 / (PAGE * (k_dim + v_dim))


def layout(sides: tuple[Side, Side], k_dim: int, v_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and bytes of the six parts of a head in a page: keys, their scales, values, theirs, signs, theirs.

    Codes of keys and signs are panels of 16 positions by columns (padded to 32), those of values panels of 16 columns
    by the 64 positions; float parts have no scales, and only sides `q?` have signs.
    """
    k, v = sides
    if k.packed:
        columns = PAGE * align(k_dim, COLUMN_PAD) // 8  # bytes of a bit of keys
        values = align(v_dim, PANEL) * PAGE * v.bits // 8
        signs = (columns, PAGE) if k.rest else (0, 0)
        parts = (columns * k.bits, PAGE, values, PAGE, *signs)
    else:
        parts = (PAGE * k_dim * k.bits // 8, 0, PAGE * v_dim * v.bits // 8, 0, 0, 0)
    return tuple(accumulate(parts, initial=0))[:-1], parts


def mode(name: str) -> Mode:
    """The mode of a name. Raises UsageError for one that is unknown."""
    pair = MODES.get(name)
    if pair is None and name.startswith("k") and "v" in name:
        k, v = name[1:].split("v", 1)
        if all(s in BY_SIDE and BY_SIDE[s].packed for s in (k, v)) and not BY_SIDE[v].rest:
            pair = k, v
    if pair is None:
        raise UsageError(
            f"unknown kv mode {name!r}; there are {', '.join(MODES)}, and k?v? of 8, 4, t1, t2, t3, t4, with keys"
            " also q2, q3, q4"
        )
    return Mode(name, BY_SIDE[pair[0]], BY_SIDE[pair[1]])


def by_cache(name: str, count: int) -> tuple[Mode, ...]:
    """A mode for each of `count` caches: `tq3`, or `tq3,0=k8v8,-1=k8v8` with other modes for some layers.

    Raises UsageError for unknown modes, layers out of range, and floats beside packed modes.
    """
    first, *rest = name.split(",")
    modes = [mode(first)] * count
    for item in rest:
        layer, _, other = item.partition("=")
        if not layer.lstrip("-").isdigit() or not -count <= int(layer) < count:
            raise UsageError(
                f"kv mode {name!r}: {layer!r} is not one of {count} layers (write tq3,0=k8v8,-1=k8v8)"
            )
        modes[int(layer)] = mode(other)
    if len({m.packed for m in modes}) > 1:
        raise UsageError(f"kv mode {name!r}: floats and packed modes cannot be mixed")
    return tuple(modes)


def signs(n: int, seed: int = SIGN_SEED) -> np.ndarray:
    """float32[n] of +-1: bit i % 64 of number i / 64 of splitmix64 from `seed` says where -1 is."""
    count = np.arange(1, -(-n // 64) + 1, dtype=np.uint64)
    z = np.uint64(seed) + count * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    bits = (z[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    return np.where(bits.reshape(-1)[:n] == 1, np.float32(-1), np.float32(1))


def run_of(dim: int) -> int:
    """Columns that one rotation mixes: the largest power of two that divides dim."""
    return dim & -dim


def e5m3(scale: np.ndarray, up: bool) -> np.ndarray:
    """uint8 codes of positive float32 scales, to nearest (halves up) or to the next one `up`; clipped."""
    bits = np.ascontiguousarray(scale, np.float32).view(np.uint32).astype(np.int64)
    code = ((bits + ((1 << 20) - 1 if up else 1 << 19)) >> 20) - ((127 - E5M3_BIAS) << 3)
    return np.clip(code, 0, 255).astype(np.uint8)


def e5m3_value(code: np.ndarray) -> np.ndarray:
    """float32 of codes."""
    bits = (code.astype(np.uint32) + np.uint32((127 - E5M3_BIAS) << 3)) << np.uint32(20)
    return np.where(code == 0, np.float32(0), bits.view(np.float32))
