"""The encoding table: how the numbers of a tensor are stored. Normative with SPEC.md section 5.

Every code encoding is one row of a parametric family. With s and m the scale and the minimum of a
group of columns, z its zero point, L the level table and c the stored code, all in float32 and in
the order written:

    symmetric   w = s * L[c]
    min         w = s * L[c] + m
    zero        w = s * (L[c] - z)

How s and m are stored is the scale type's affair: a float each, a byte under a row's scale (the q
family), or a byte under a float for every 256 columns (`k256`). Readers, kernels' C header,
quantisers, tests and SPEC.md all read `ENCODINGS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# The non-linear levels of the q family (int8 values, one byte shuffle in a kernel); see SPEC.md 5.3.
# They are the tables of ik_llama.cpp's IQ2_KS, IQ3_KS, IQ4_KS (ggml's IQ4_NL) and IQ5_KS.
Q2_LEVELS = (-31, -13, 1, 17)
Q3_LEVELS = (-63, -40, -23, -10, 1, 13, 28, 47)
Q4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
Q5_LEVELS = (
    -126, -114, -103, -92, -83, -74, -65, -57, -50, -43, -36, -30, -24, -18, -12, -6,
    -1, 5, 11, 17, 23, 29, 36, 43, 51, 59, 68, 77, 87, 97, 109, 121,
)  # fmt: skip
# MXFP4's E2M1 values, doubled so that they are integers.
FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

WHOLE_ROW = 0  # the value of `group` that means one scale per row


def _float8(mantissa: int, bias: int, finite: bool) -> tuple[float, ...]:
    """The 256 values of an 8-bit float (OCP 8-bit Floating Point Specification, 1.0).

    finite: the largest exponent holds numbers too, and only the all-ones codes are NaN (E4M3);
    otherwise it holds infinity and NaN as in IEEE 754 (E5M2).
    """
    values = []
    top = (128 >> mantissa) - 1
    for code in range(128):
        e, m = code >> mantissa, code & ((1 << mantissa) - 1)
        value = (m / (1 << mantissa) + (e > 0)) * 2.0 ** (max(e, 1) - bias)
        if code == 127 or (e == top and m and not finite):
            value = float("nan")
        elif e == top and not finite:
            value = float("inf")
        values.append(value)
    return (*values, *(-v for v in values))


@dataclass(frozen=True)
class Encoding:
    """One row of the table.

    code: the number stored in a file; never reused.
    bits: bits of one stored code or number.
    kind: 'float' (plain numbers) | 'codes' (integer levels: i8g32 multiplies them as integers) |
        'float8' (codes that are 8-bit floats: run by the float kernels) | 'index' (vectors of u32).
    levels: the level of each code, or None when the code (signed if `signed`) is the level.
    shift: added to every level of a group whose sub-scale byte has bit 0 set.
    group: columns that share a scale, or None when each tensor chooses (see `group_is_valid`).
    scale: 'f16' | 'sub7' (7-bit sub-scale under a row scale) | '*' (tensor chooses, see `SCALE_TYPES`) | ''.
    offset: '' | 'min' (a value of the scale's type per group) | 'zero' (a uint8 per group).
    minor: first minor version of the format that has the row.
    """

    code: int
    name: str
    bits: int
    kind: str = "codes"
    signed: bool = False
    levels: tuple[float, ...] | None = None
    shift: int = 0
    group: int | None = None
    scale: str = "*"
    offset: str = ""
    minor: int = 0
    summary: str = ""

    @property
    def is_float(self) -> bool:
        """True for plain floating-point storage (no codes, no scales)."""
        return self.kind == "float"

    @property
    def has_codes(self) -> bool:
        """True when a matrix is stored as codes and scales."""
        return self.kind in ("codes", "float8")

    @property
    def is_integer(self) -> bool:
        """True when the levels are integers, so that policy i8g32 takes integer dot products."""
        return self.kind == "codes"

    @property
    def row_scale(self) -> bool:
        """True when each row has an E6M2 scale byte."""
        return self.scale == "sub7"


def _plain(code: int, name: str, bits: int, summary: str, kind: str = "float", minor: int = 0) -> Encoding:
    return Encoding(code, name, bits, kind, scale="", minor=minor, summary=summary)


def _searched(code: int, levels: tuple[int, ...], shift: int, summary: str, minor: int = 1) -> Encoding:
    """A row of the q family."""
    bits = len(levels).bit_length() - 1
    summary = (
        f"{summary}, group 32, 7-bit sub-scale and shift bit, E6M2 row scale: {bits}.25 bits + 8 per row"
    )
    return Encoding(
        code,
        f"q{bits}",
        bits,
        levels=levels,
        shift=shift,
        group=32,
        scale="sub7",
        minor=minor,
        summary=summary,
    )


ENCODINGS: tuple[Encoding, ...] = (
    _plain(1, "f32", 32, "IEEE binary32"),
    _plain(2, "f16", 16, "IEEE binary16"),
    _plain(3, "bf16", 16, "the upper half of binary32"),
    _plain(4, "u32", 32, "numbers of columns (vectors only)", "index", 1),
    Encoding(16, "q8", 8, signed=True, group=32, scale="f16", summary="int8, group 32, f16 scale: 8.5 bits"),
    _searched(17, Q4_LEVELS, 4, "16 non-linear levels", 0),
    _searched(18, Q3_LEVELS, 4, "8 non-linear levels"),
    _searched(19, Q2_LEVELS, 5, "4 non-linear levels"),
    _searched(20, Q5_LEVELS, 2, "32 non-linear levels"),
    _searched(21, tuple(range(-128, 128, 4)), 2, "64 levels"),
    Encoding(32, "i8", 8, signed=True, summary="int8, symmetric"),
    Encoding(33, "i4", 4, levels=tuple(range(-8, 8)), summary="4-bit, level = code - 8, symmetric"),
    Encoding(34, "a8", 8, offset="min", summary="uint8 with a minimum"),
    Encoding(35, "a4", 4, levels=tuple(range(16)), offset="min", summary="4-bit with a minimum"),
    Encoding(36, "z8", 8, offset="zero", summary="uint8 with an integer zero point"),
    Encoding(37, "z4", 4, levels=tuple(range(16)), offset="zero", summary="4-bit with an integer zero point"),
    Encoding(40, "i2", 2, levels=tuple(range(-2, 2)), minor=1, summary="2-bit, symmetric; ternary uses -1, 0, 1"),
    Encoding(41, "i3", 3, levels=tuple(range(-4, 4)), minor=1, summary="3-bit, symmetric"),
    Encoding(42, "i5", 5, levels=tuple(range(-16, 16)), minor=1, summary="5-bit, symmetric"),
    Encoding(43, "i6", 6, levels=tuple(range(-32, 32)), minor=1, summary="6-bit, symmetric"),
    Encoding(44, "a2", 2, levels=tuple(range(4)), offset="min", minor=1, summary="2-bit with a minimum"),
    Encoding(45, "a5", 5, levels=tuple(range(32)), offset="min", minor=1, summary="5-bit with a minimum"),
    Encoding(46, "z2", 2, levels=tuple(range(4)), offset="zero", minor=1, summary="2-bit with an integer zero point"),
    Encoding(47, "z3", 3, levels=tuple(range(8)), offset="zero", minor=1, summary="3-bit with an integer zero point"),
    Encoding(48, "n4", 4, levels=Q4_LEVELS, minor=1, summary="the 16 levels of q4 without shift (IQ4_NL, IQ4_XS)"),
    Encoding(49, "m4", 4, levels=FP4_LEVELS, minor=1, summary="E2M1, doubled; bf16 scales hold 2^(e - 128) (MXFP4)"),
    Encoding(64, "f8e4m3", 8, "float8", levels=_float8(3, 7, True), minor=1, summary="8-bit floats E4M3, scaled"),
    Encoding(65, "f8e5m2", 8, "float8", levels=_float8(2, 15, False), minor=1, summary="8-bit floats E5M2, scaled"),
)  # fmt: skip

BY_NAME = {e.name: e for e in ENCODINGS}
BY_CODE = {e.code: e for e in ENCODINGS}
MATRIX_ENCODINGS = tuple(e for e in ENCODINGS if e.kind != "index")

FLOAT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}

# Two-level scales: a byte per group under a float16 per SUPER columns (SPEC.md 5.4).
K256 = "k256"
SUPER = 256
K256_GROUPS = (16, 32)
# Scale types and the numbers they have in a tensor record; '' where the encoding has none to choose.
SCALE_TYPES = {"": 0, **{name: BY_NAME[name].code for name in FLOAT_BYTES}, K256: 256}
SCALE_NAMES = {number: name for name, number in SCALE_TYPES.items()}


def group_is_valid(group: int) -> bool:
    """Groups are whole rows, multiples of 32, or divisors of 32 from 4 up (kernels step by 4 columns)."""
    return group == WHOLE_ROW or (group % 32 == 0 and group > 0) or group in (4, 8, 16)


def group_count(cols: int, group: int) -> int:
    """Number of scales in one row of `cols` columns."""
    return 1 if group == WHOLE_ROW else -(-cols // group)


def parameters_are_valid(encoding: Encoding, group: int, scale_type: str) -> bool:
    """Whether an encoding may be stored with this group and scale type.

    `k256` is for integer levels without zero points, in groups of 16 or 32.
    """
    if encoding.scale != "*":
        return group == (encoding.group or 0) and scale_type == ("f16" if encoding.scale == "f16" else "")
    if scale_type == K256:
        return encoding.is_integer and encoding.offset != "zero" and group in K256_GROUPS
    return scale_type in FLOAT_BYTES and group_is_valid(group)


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
    """The little-endian NumPy dtype that holds one value of a float encoding or of u32."""
    return np.dtype({"f32": "<f4", "f16": "<f2", "bf16": "<u2", "u32": "<u4"}[name])


def e6m2_decode(row: np.ndarray) -> np.ndarray:
    """uint8[...] row-scale bytes -> float32: 0 -> 0, else (1 + (r & 3)/4) * 2^((r >> 2) - 60)."""
    r = np.asarray(row, np.uint8).astype(np.uint32)
    bits = (((r >> np.uint32(2)) + np.uint32(127 - 60)) << np.uint32(23)) | (
        (r & np.uint32(3)) << np.uint32(21)
    )
    return np.where(r == 0, np.uint32(0), bits).astype(np.uint32).view(np.float32)


def decode(
    encoding: str, planes: Mapping[str, np.ndarray], group: int, scale_type: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Stored parts -> (levels, scales, minima): w = scale * level (+ minimum), by column and by its group.

    planes: codes [rows, cols]; scales, mins, zeros [rows, groups]; row [rows]; super, supermin [rows,
    ceil(cols / 256)], as far as the encoding and its scale type have them, each as stored (bf16 as uint16).
    Levels are int32[rows, cols] with shifts added and zero points taken off (float32 for 8-bit floats),
    scales and minima float32[rows, groups].
    """
    e = BY_NAME[encoding]
    codes, scales = planes["codes"], planes["scales"]
    column_group = np.arange(codes.shape[1]) // (group or max(1, codes.shape[1]))
    if e.levels is None:
        level = codes.astype(np.int32)
    else:
        level = np.asarray(e.levels, np.int32 if e.is_integer else np.float32)[codes]
    if e.offset == "zero":
        level = level - planes["zeros"].astype(np.int32)[:, column_group]
    if e.row_scale:
        level = level + e.shift * (scales & 1).astype(np.int32)[:, column_group]
        k = (scales & 254).astype(np.int32) - 127
        return level, e6m2_decode(planes["row"])[:, None] * k.astype(np.float32), None
    if scale_type == K256:
        block = np.arange(scales.shape[1]) * group // SUPER

        def product(above: str, below: str) -> np.ndarray:
            with np.errstate(invalid="ignore"):  # infinities that a damaged file may hold
                return planes[above].astype(np.float32)[:, block] * planes[below].astype(np.float32)

        return level, product("super", "scales"), -product("supermin", "mins") if e.offset == "min" else None
    m = bits_to_float(planes["mins"], scale_type) if e.offset == "min" else None
    return level, bits_to_float(scales, scale_type), m


def weights(level: np.ndarray, s: np.ndarray, m: np.ndarray | None, group: int) -> np.ndarray:
    """What `decode` gives -> float32[rows, cols], by the formulas at the top of this file."""
    column_group = np.arange(level.shape[1]) // (group or max(1, level.shape[1]))
    with np.errstate(over="ignore", invalid="ignore"):  # scales of a damaged file
        w = s[:, column_group] * level.astype(np.float32)
        return w if m is None else w + m[:, column_group]


def dequantize(
    encoding: str,
    codes: np.ndarray,
    scales: np.ndarray,
    group: int,
    mins: np.ndarray | None = None,
    zeros: np.ndarray | None = None,
    row: np.ndarray | None = None,
    super: np.ndarray | None = None,
    supermin: np.ndarray | None = None,
) -> np.ndarray:
    """Codes and scales -> float32[rows, cols], by the formulas at the top of this file.

    codes [rows, cols]; scales, mins, zeros [rows, groups] (the q family: scales are the sub-scale bytes and
    `row` the uint8[rows] row scales). With `super` the scales are two-level: scales and mins are bytes, super
    and supermin float16[rows, ceil(cols / 256)].
    """
    parts = {"codes": codes, "scales": scales, "mins": mins, "zeros": zeros, "row": row, "super": super,
             "supermin": supermin}  # fmt: skip
    planes = {name: a for name, a in parts.items() if a is not None}
    return weights(*decode(encoding, planes, group, "f32" if super is None else K256), group)
