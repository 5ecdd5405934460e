"""The encoding table: how the numbers of a tensor are stored. Normative with SPEC.md section 5.

Every code encoding is one row of a parametric family. With S the scale of a group of columns
(and, for `q4`, the scale of the row), L the level table and c the stored code, all in float32 and
in the order written:

    symmetric   w = s * L[c]
    min         w = s * L[c] + m
    zero        w = s * (L[c] - z)

Readers, kernels' C header, quantisers, tests and SPEC.md all read `ENCODINGS`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# The non-linear 4-bit levels (16 int8 values, one byte shuffle in a kernel); see SPEC.md 5.3.
Q4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
Q4_SHIFT = 4  # added to every level of a group whose sub-scale byte has bit 0 set

WHOLE_ROW = 0  # the value of `group` that means one scale per row


@dataclass(frozen=True)
class Encoding:
    """One row of the table.

    code: the number stored in a file; never reused.
    bits: bits of one stored code.
    levels: the integer level of each code, or None when the code (signed if `signed`) is the level.
    group: columns that share a scale, or None when each tensor chooses (see `group_is_valid`).
    scale: 'f16' | 'sub7' (7-bit sub-scale under a row scale) | '*' (tensor chooses f32/f16/bf16) | ''.
    offset: '' | 'min' (a value of the scale's type per group) | 'zero' (a uint8 per group).
    """

    code: int
    name: str
    bits: int
    signed: bool = False
    levels: tuple[int, ...] | None = None
    group: int | None = None
    scale: str = ""
    offset: str = ""
    summary: str = ""

    @property
    def is_float(self) -> bool:
        """True for plain floating-point storage (no codes, no scales)."""
        return self.scale == ""

    @property
    def row_scale(self) -> bool:
        """True when each row has an E6M2 scale byte."""
        return self.scale == "sub7"


ENCODINGS: tuple[Encoding, ...] = (
    Encoding(1, "f32", 32, summary="IEEE binary32"),
    Encoding(2, "f16", 16, summary="IEEE binary16"),
    Encoding(3, "bf16", 16, summary="the upper half of binary32"),
    Encoding(16, "q8", 8, True, None, 32, "f16", "", "int8, group 32, f16 scale: 8.5 bits"),
    Encoding(
        17, "q4", 4, False, Q4_LEVELS, 32, "sub7", "", "16 non-linear levels, group 32, 7-bit sub-scale"
        " and shift bit, E6M2 row scale: 4.25 bits + 8 per row",
    ),
    Encoding(32, "i8", 8, True, None, None, "*", "", "int8, symmetric"),
    Encoding(33, "i4", 4, False, tuple(range(-8, 8)), None, "*", "", "4-bit, level = code - 8, symmetric"),
    Encoding(34, "a8", 8, False, None, None, "*", "min", "uint8 with a minimum"),
    Encoding(35, "a4", 4, False, tuple(range(16)), None, "*", "min", "4-bit with a minimum"),
    Encoding(36, "z8", 8, False, None, None, "*", "zero", "uint8 with an integer zero point"),
    Encoding(37, "z4", 4, False, tuple(range(16)), None, "*", "zero", "4-bit with an integer zero point"),
)  # fmt: skip

BY_NAME = {e.name: e for e in ENCODINGS}
BY_CODE = {e.code: e for e in ENCODINGS}

FLOAT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


def group_is_valid(group: int) -> bool:
    """Groups are whole rows, multiples of 32, or divisors of 32 from 4 up (kernels step by 4 columns)."""
    return group == WHOLE_ROW or (group % 32 == 0 and group > 0) or group in (4, 8, 16)


def group_count(cols: int, group: int) -> int:
    """Number of scales in one row of `cols` columns."""
    return 1 if group == WHOLE_ROW else -(-cols // group)


def float_to_bits(values: np.ndarray, name: str) -> np.ndarray:
    """float32[...] -> the stored array of encoding `name` (f32 as float32, f16 as float16, bf16 as uint16).

    bf16 rounds to nearest even, as IEEE conversions do; NaN stays NaN.
    """
    values = np.ascontiguousarray(values, np.float32)
    if name == "f32":
        return values
    if name == "f16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
        np.uint16
    )
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def bits_to_float(stored: np.ndarray, name: str) -> np.ndarray:
    """The inverse of `float_to_bits`: stored array -> float32 (exact)."""
    if name == "bf16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def stored_dtype(name: str) -> np.dtype:
    """The little-endian NumPy dtype that holds one value of a float encoding."""
    return np.dtype({"f32": "<f4", "f16": "<f2", "bf16": "<u2"}[name])


def e6m2_decode(row: np.ndarray) -> np.ndarray:
    """uint8[...] row-scale bytes -> float32: 0 -> 0, else (1 + (r & 3)/4) * 2^((r >> 2) - 60)."""
    r = np.asarray(row, np.uint8).astype(np.uint32)
    bits = (((r >> np.uint32(2)) + np.uint32(127 - 60)) << np.uint32(23)) | (
        (r & np.uint32(3)) << np.uint32(21)
    )
    return np.where(r == 0, np.uint32(0), bits).astype(np.uint32).view(np.float32)


def dequantize(
    encoding: str,
    codes: np.ndarray,
    scales: np.ndarray,
    group: int,
    mins: np.ndarray | None = None,
    zeros: np.ndarray | None = None,
    row: np.ndarray | None = None,
) -> np.ndarray:
    """Codes and scales -> float32[rows, cols], by the formulas at the top of this file.

    codes [rows, cols]; scales, mins, zeros [rows, groups] (`q4`: scales are the sub-scale bytes and
    `row` the uint8[rows] row scales).
    """
    e = BY_NAME[encoding]
    cols = codes.shape[1]
    width = cols if group == WHOLE_ROW else group
    index = np.arange(cols) // width if width else np.zeros(cols, int)
    if e.levels is None:
        level = codes.astype(np.int32)
    else:
        level = np.asarray(e.levels, np.int32)[codes]
    if e.row_scale:
        assert row is not None
        k = (scales & 254).astype(np.int32) - 127
        level = level + Q4_SHIFT * (scales & 1).astype(np.int32)[:, index]
        s = e6m2_decode(row)[:, None] * k.astype(np.float32)
    else:
        s = scales.astype(np.float32)
    s = s[:, index]
    if e.offset == "zero":
        assert zeros is not None
        return s * (level - zeros.astype(np.int32)[:, index]).astype(np.float32)
    w = s * level.astype(np.float32)
    if e.offset == "min":
        assert mins is not None
        w = w + mins.astype(np.float32)[:, index]
    return w
