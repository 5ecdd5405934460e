"""The scales of GPTQ: how they are searched for a group, moved when its codes stand, and stored; a class a family.

A group's weights are s (q + shift) + m with q from the level table. Everything is float32[groups, lanes] for the rows
of one unit of work, in units of 2^exponent of each row, and groups stand in the order of the curvature.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from halfbyte.converter.quantizers import _feedback, rtn
from halfbyte.converter.quantizers._grid import SMALLEST_ROW
from halfbyte.formats import encodings
from halfbyte.formats.encodings import Encoding
from halfbyte.formats.errors import CheckpointError

# Where the best scale of a group lies, as a multiple of the scale that puts its largest value on the negative or the
# positive end of the level table; by bits of a code.
WINDOWS = {
    2: ((0.5, 1.4), (0.5, 1.4)),
    3: ((0.75, 1.35), (0.75, 1.3)),
    4: ((0.90, 1.24), (0.90, 1.16)),
    5: ((0.93, 1.12), (0.93, 1.1)),
    6: ((0.95, 1.08), (0.95, 1.08)),
}
RATIOS = (0.95, 1.01, 1.08)
REFITS = 2  # of an affine group's scale to the codes that it gave


class Scales(Protocol):
    """s, m, shift: of every group, as `_feedback.round_group` takes them."""

    smallest: float  # rows whose largest value is below become zero
    s: np.ndarray
    m: np.ndarray
    shift: np.ndarray

    def begin(self, w: np.ndarray, d: np.ndarray, starts: np.ndarray, exponent: np.ndarray) -> None:
        """See all weights [cols, lanes], before any group is searched; exponent[lanes]: what they were scaled by."""
        ...

    def search(self, g: int, x: np.ndarray, weight: np.ndarray) -> None:
        """The scale of group g for targets x[n, lanes], column j of which counts weight[j] times."""
        ...

    def refit(
        self,
        g: int,
        h: np.ndarray,
        gradient: np.ndarray,
        q: np.ndarray,
        error: np.ndarray,
        change: np.ndarray,
    ) -> int:
        """Move the scale to where e H e^T is least, codes fixed; see `_feedback.descend_group`. How many moved."""
        ...

    def planes(self, number: np.ndarray, dead: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """What the format stores beside codes, [lanes, groups] in the matrix's order: group g is its number[g]-th."""
        ...


class SubScales:
    """An odd 7-bit multiple of the row's E6M2 scale, and whether the table is shifted."""

    smallest = SMALLEST_ROW

    def __init__(self, e: Encoding, level: np.ndarray):
        self.level, self.table_shift = level, np.float32(e.shift)
        self.windows = np.array(WINDOWS[e.bits], np.float32)

    def begin(self, w: np.ndarray, d: np.ndarray, starts: np.ndarray, exponent: np.ndarray) -> None:
        """See `Scales`: finds the scale of each row."""
        groups, lanes = len(starts) - 1, w.shape[1]
        free, sqq = np.empty((groups, lanes), np.float32), np.empty((groups, lanes), np.float32)
        ratios = np.array(RATIOS, np.float32)
        _feedback.free_scales(w, d, starts, self.level, self.table_shift, ratios, free, sqq)
        self.row, self.scale = np.empty(lanes, np.uint8), np.empty(lanes, np.float32)
        _feedback.row_scales(free, sqq, exponent, self.row, self.scale)
        self.k = np.ones((groups, lanes), np.float32)
        self.s = np.zeros((groups, lanes), np.float32)
        self.m, self.shift = np.zeros_like(self.s), np.zeros_like(self.s)

    def search(self, g: int, x: np.ndarray, weight: np.ndarray) -> None:
        """See `Scales`."""
        _feedback.search_sub(
            x, weight, self.scale, self.level, self.table_shift, self.windows, self.k[g], self.shift[g]
        )
        self.s[g] = self.scale * self.k[g]

    def refit(
        self,
        g: int,
        h: np.ndarray,
        gradient: np.ndarray,
        q: np.ndarray,
        error: np.ndarray,
        change: np.ndarray,
    ) -> int:
        """See `Scales`."""
        slope, curve = _feedback.response(h, gradient, q)
        unit = curve * self.scale
        step = np.divide(slope, unit, out=np.zeros_like(slope), where=unit > 0)
        k = np.clip(2 * np.floor((self.k[g] + step) * np.float32(0.5)) + 1, -127, 127).astype(np.float32)
        moved = int((k != self.k[g]).sum())
        if moved:
            _feedback.add_change(h, self.scale * (self.k[g] - k), self.m[g], q, gradient, error, change)
            self.k[g], self.s[g] = k, self.scale * k
        return moved

    def planes(self, number: np.ndarray, dead: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """See `Scales`."""
        sub = np.empty(self.k.T.shape, np.uint8)
        sub[:, number] = ((self.k.astype(np.int64) + 127) | (self.shift > 0)).T
        yield "scales", sub
        yield "row", np.where(dead, 0, self.row)


class Affine:
    """A float scale of each group, with a minimum or an integer zero point: the zero point shifts the table."""

    smallest = float(np.finfo(np.float32).tiny)

    def __init__(self, e: Encoding, level: np.ndarray, scale_type: str):
        self.e, self.level, self.scale_type = e, level, scale_type

    def begin(self, w: np.ndarray, d: np.ndarray, starts: np.ndarray, exponent: np.ndarray) -> None:
        """See `Scales`."""
        self.exponent = exponent
        self.s = np.zeros((len(starts) - 1, w.shape[1]), np.float32)
        self.m, self.shift = np.zeros_like(self.s), np.zeros_like(self.s)

    def _inside(self, stored: np.ndarray) -> np.ndarray:
        return np.ldexp(stored, -self.exponent).astype(np.float32)

    def _round(self, values: np.ndarray) -> np.ndarray:
        """To what the scale type holds, in units of the rows."""
        return self._inside(rtn.stored(np.ldexp(values.astype(np.float64), self.exponent), self.scale_type))

    def search(self, g: int, x: np.ndarray, weight: np.ndarray) -> None:
        """See `Scales`: the candidates of round-to-nearest, the best refitted to its codes by least squares."""
        lanes = x.shape[1]
        low, high = (np.ldexp(f(x, axis=0).astype(np.float64), self.exponent) for f in (np.min, np.max))
        least = np.full(lanes, np.inf, np.float32)
        s, m, shift = self.s[g], self.m[g], self.shift[g]

        def attempt(*new: np.ndarray) -> None:
            found = _feedback.affine_errors(x, weight, *new, self.level)
            better = found < least
            least[better] = found[better]
            for old, value in zip((s, m, shift), new):
                old[better] = value[better]

        for scale, minimum, zero in rtn.candidates(self.e, low, high, self.scale_type):
            if not (np.isfinite(scale).all() and np.isfinite(minimum).all()):
                peak = max(-low.min(), high.max())
                raise CheckpointError(rtn.does_not_fit(f"{self.e.name} with {self.scale_type} scales", peak))
            # what is a zero point in the format is in the levels of the symmetric encodings
            zero = -zero if self.e.offset == "zero" else np.zeros(lanes, np.float32)
            attempt(self._inside(scale), self._inside(minimum), zero)
        for _ in range(REFITS):
            w, wq, wqq, wx, wqx = _feedback.affine_moments(x, weight, s, m, shift, self.level).astype(
                np.float64
            )
            if self.e.offset == "min":
                new_s = self._round(_divided(w * wqx - wq * wx, w * wqq - wq * wq))
                new_m = self._round(_divided(wx - wq * new_s, w))
            else:
                new_s, new_m = self._round(_divided(wqx, wqq)), m.copy()
            attempt(new_s, new_m, shift.copy())

    def refit(
        self,
        g: int,
        h: np.ndarray,
        gradient: np.ndarray,
        q: np.ndarray,
        error: np.ndarray,
        change: np.ndarray,
    ) -> int:
        """See `Scales`."""
        slope, curve = (a.astype(np.float64) for a in _feedback.response(h, gradient, q))
        if self.e.offset == "min":  # both at once: they pull at each other
            slope_m, curve_m = gradient.sum(axis=0, dtype=np.float64), float(h.sum(dtype=np.float64))
            across = (h.sum(axis=1) @ q).astype(np.float64)
            step = _divided(curve_m * slope - across * slope_m, curve * curve_m - across**2)
            ds = self._round(self.s[g] + step) - self.s[g]
            dm = self._round(self.m[g] + (slope_m - across * ds) / curve_m) - self.m[g]
            gain = 2 * (ds * slope + dm * slope_m) - curve * ds**2 - 2 * across * ds * dm - curve_m * dm**2
        else:
            ds = self._round(self.s[g] + _divided(slope, curve)) - self.s[g]
            dm = np.zeros_like(ds)
            gain = 2 * ds * slope - curve * ds**2
        moves = (gain > 0) & (self.s[g] != 0) & (self.s[g] + ds != 0) & np.isfinite(gain)
        if moves.any():
            ds, dm = (np.where(moves, v, np.float32(0)) for v in (ds, dm))
            _feedback.add_change(h, -ds, -dm, q, gradient, error, change)
            self.s[g] += ds
            self.m[g] += dm
        return int(moves.sum())

    def planes(self, number: np.ndarray, dead: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """See `Scales`."""
        kept = {"scales": np.ldexp(self.s, self.exponent)}
        if self.e.offset == "min":
            kept["mins"] = np.ldexp(self.m, self.exponent)
        elif self.e.offset == "zero":
            kept["zeros"] = -self.shift
        for name, values in kept.items():
            out = np.empty(values.T.shape, np.float32)
            out[:, number] = values.T
            yield name, out


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is not positive."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def scales_of(encoding: str, level: np.ndarray, scale_type: str) -> Scales:
    """What searches and stores the scales of an encoding; see `gptq.supports`."""
    e = encodings.BY_NAME[encoding]
    return SubScales(e, level) if e.row_scale else Affine(e, level, scale_type)
