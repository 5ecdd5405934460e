"""The planes of a code encoding as a ladder of levels that a method can climb: one form for every encoding.

    w_hat = s[row, group] * (levels[rank] + shift[row, group]) + offset[row, group]

`planes` are those of the format by name: codes, scales, and where the encoding has them row, mins, zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from halfbyte.converter.quantizers import rtn
from halfbyte.formats import encodings
from halfbyte.formats.errors import UsageError

Planes = dict[str, np.ndarray]

RATIOS = np.linspace(0.76, 1.24, 25)  # stored scales to choose from, as multiples of the one at the start


def nearest(
    w: np.ndarray,
    encoding: str,
    group: int = 32,
    scale_type: str = "f16",
    importance: np.ndarray | None = None,
) -> Planes:
    """Searched round-to-nearest of w[rows, cols]; importance[cols] weighs the columns where the search can."""
    if encodings.BY_NAME[encoding].row_scale:
        return dict(zip(("codes", "scales", "row"), rtn.quantize_table(w, encoding, importance)))
    if encoding == "q8":
        return dict(zip(("codes", "scales"), rtn.quantize_q8(w, importance)))
    codes, scales, mins, zeros = rtn.quantize_affine(w, encoding, group, scale_type)
    named = {"codes": codes, "scales": scales, "mins": mins, "zeros": zeros}
    return {k: v for k, v in named.items() if v is not None}


def decode(planes: Planes, encoding: str, group: int = 32) -> np.ndarray:
    """float32[rows, cols] by the format's formulas."""
    e = encodings.BY_NAME[encoding]
    return encodings.dequantize(
        encoding, planes["codes"], planes["scales"], group if e.group is None else e.group,
        planes.get("mins"), planes.get("zeros"), planes.get("row"),
    )  # fmt: skip


@dataclass
class Ladder:
    """A matrix in the form above.

    levels   float32[n] ascending
    width    columns a group
    scales   float32[rows, groups, candidates]: what the format can store near each group's scale
    choice   int64[rows, groups], ranks int64[rows, cols]: what is chosen now
    shift, offset  float32[rows, groups]
    """

    levels: np.ndarray
    width: int
    scales: np.ndarray
    shift: np.ndarray
    offset: np.ndarray
    ranks: np.ndarray
    choice: np.ndarray

    def value(self) -> np.ndarray:
        """float32[rows, cols] of what is chosen."""
        column = np.arange(self.ranks.shape[1]) // self.width
        s = np.take_along_axis(self.scales, self.choice[:, :, None], axis=2)[:, :, 0]
        return s[:, column] * (self.levels[self.ranks] + self.shift[:, column]) + self.offset[:, column]


def _table(encoding: str) -> tuple[np.ndarray, np.ndarray]:
    """(levels, codes), by ascending level; of codes for the same level the first."""
    e = encodings.BY_NAME[encoding]
    if e.levels is None:
        codes = np.arange(-127, 128) if e.signed else np.arange(1 << e.bits)
        return codes.astype(np.float32), codes
    levels, first = np.unique(np.asarray(e.levels, np.float32), return_index=True)
    return levels, first


def climb(planes: Planes, encoding: str, group: int = 32, scale_type: str = "f16") -> Ladder:
    """Planes -> ladder. Raises UsageError for an encoding without codes or with two-level scales."""
    e = encodings.BY_NAME[encoding]
    if e.is_float or scale_type == "k256":
        raise UsageError(f"learned rounding does not know {encoding} with scales {scale_type}")
    codes, scales = planes["codes"], planes["scales"]
    levels, of = _table(encoding)
    rank_of = {int(c): i for i, c in enumerate(of)}
    width = e.group if e.group is not None else (group or codes.shape[1])
    shift = np.zeros(scales.shape, np.float32)
    offset = np.zeros(scales.shape, np.float32)
    if e.row_scale:
        k = (scales & 254).astype(np.int32) - 127
        shift += e.shift * (scales & 1)
        unit = encodings.e6m2_decode(planes["row"])[:, None, None]
        odd = 2 * np.rint((k[:, :, None] * RATIOS - 1) / 2) + 1
        candidates = unit * np.clip(odd, -127, 127).astype(np.float32)
    else:
        wide = encodings.bits_to_float(scales, scale_type) if scales.dtype == np.uint16 else scales
        near = (wide.astype(np.float64)[:, :, None] * RATIOS).astype(np.float32)
        kind = e.scale if e.scale != "*" else scale_type
        candidates = encodings.bits_to_float(encodings.float_to_bits(near, kind), kind)
        candidates = np.where(np.isfinite(candidates), candidates, near[:, :, len(RATIOS) // 2, None])
    if e.offset == "zero":
        shift -= planes["zeros"].astype(np.float32)
    elif e.offset == "min":
        offset += planes["mins"].astype(np.float32)
    lookup = np.zeros(256, np.int64)
    for c, i in rank_of.items():
        lookup[c & 255] = i
    if e.levels is not None:  # a code beyond the first of equal levels
        for c, level in enumerate(e.levels):
            lookup[c] = int(np.searchsorted(levels, level))
    ranks = lookup[codes.astype(np.int64) & 255]
    choice = np.full(scales.shape, len(RATIOS) // 2, np.int64)
    return Ladder(levels, width, np.ascontiguousarray(candidates, np.float32), shift, offset, ranks, choice)


def store(ladder: Ladder, planes: Planes, encoding: str) -> Planes:
    """The planes of what the ladder has chosen; `planes` are those that it came from."""
    e = encodings.BY_NAME[encoding]
    _, of = _table(encoding)
    out = dict(planes)
    out["codes"] = of[ladder.ranks].astype(planes["codes"].dtype)
    s = np.take_along_axis(ladder.scales, ladder.choice[:, :, None], axis=2)[:, :, 0]
    if e.row_scale:
        unit = encodings.e6m2_decode(planes["row"])[:, None]
        k = np.rint(s / np.where(unit == 0, 1, unit)).astype(np.int64)
        sub = (np.where(unit == 0, (planes["scales"] & 254).astype(np.int64) - 127, k) + 127) | (
            planes["scales"] & 1
        )
        out["scales"] = sub.astype(np.uint8)
    elif planes["scales"].dtype == np.uint16:
        out["scales"] = encodings.float_to_bits(s, "bf16")
    else:
        out["scales"] = s.astype(planes["scales"].dtype)
    return out
