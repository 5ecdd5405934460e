"""The p16 tile: the one arrangement of matrices in a file, for every instruction set.

Rows come in panels of 16. Within a panel a plane of b-bit fields (b = 8, 4, 2 or 1) takes 32 / b
columns at a time: 16 rows x 4 bytes, and byte j of a row holds, from bit 0 up, columns k + j,
k + 4 + j, k + 8 + j and so on:

    8 bits    4 columns: byte j holds column k + j
    4 bits    8 columns: k + j in the low nibble, k + 4 + j in the high one
    2 bits   16 columns: k + j, k + 4 + j, k + 8 + j, k + 12 + j
    1 bit    32 columns: bit i of byte j holds column k + 4 i + j
    floats    1 column: 16 values

so that a 64-byte load is 16 rows by 4 columns times the fields of a byte, each accumulator lane is
an output row and no horizontal sum is needed. Codes of 3, 5 and 6 bits are two planes: the low 2 or
4 bits in `codes`, the rest in `high`. Codes are padded with zeros to 32 columns and 16 rows; the
planes of scales are [panel, group, 16]. Normative with SPEC.md section 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .encodings import BY_NAME, K256, SUPER, Encoding, group_count, stored_dtype

PANEL = 16  # rows of a panel
COLUMN_PAD = 32  # code planes are padded to this many columns
ALIGNMENT = 64  # of every plane and every tensor

# bits of a code -> bits of it in the planes `codes` and `high`
CODE_BITS = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (8, 0)}

ROWS, P16 = 0, 1  # tile numbers: plain row-major (vectors), panels of 16
TILE_NAMES = {ROWS: "rows", P16: "p16"}


@dataclass(frozen=True)
class Plane:
    """A contiguous part of a tensor's bytes.

    name: 'values' | 'codes' | 'high' | 'scales' | 'super' | 'mins' | 'supermin' | 'zeros' | 'row';
    panel_bytes: bytes of one panel of 16 rows, so that panel p starts at `offset + p * panel_bytes`.
    """

    name: str
    dtype: np.dtype
    offset: int
    nbytes: int
    panel_bytes: int


def align(n: int, to: int = ALIGNMENT) -> int:
    """n rounded up to a multiple of `to`."""
    return -(-n // to) * to


def scale_dtype(encoding: Encoding, scale_type: str) -> np.dtype:
    """The stored dtype of one scale of a code encoding: k256 is signed where there is no minimum."""
    if scale_type == K256:
        return np.dtype("u1" if encoding.offset == "min" else "i1")
    return np.dtype("u1") if encoding.row_scale else stored_dtype(scale_type)


def planes(encoding_name: str, rows: int, cols: int, group: int, scale_type: str) -> list[Plane]:
    """The planes of a p16 matrix, in file order. Pure integer arithmetic; nothing is allocated."""
    e = BY_NAME[encoding_name]
    panels = -(-rows // PANEL)
    parts: list[tuple[str, np.dtype, int]] = []

    def plane(name: str, dtype: np.dtype | str, columns: int) -> None:
        parts.append((name, np.dtype(dtype), columns * PANEL * np.dtype(dtype).itemsize))

    if e.is_float:
        plane("values", stored_dtype(e.name), cols)
    else:
        groups, two_level = group_count(cols, group), scale_type == K256
        scale = scale_dtype(e, scale_type)
        for name, bits in zip(("codes", "high"), CODE_BITS[e.bits]):
            if bits:
                plane(name, "u1", align(cols, COLUMN_PAD) * bits // 8)
        plane("scales", scale, groups)
        if two_level:
            plane("super", "<f2", group_count(cols, SUPER))
        if e.offset == "min":
            plane("mins", scale, groups)
            if two_level:
                plane("supermin", "<f2", group_count(cols, SUPER))
        if e.offset == "zero":
            plane("zeros", "u1", groups)
        if e.row_scale:
            plane("row", "u1", 1)
    out, offset = [], 0
    for name, dtype, panel_bytes in parts:
        out.append(Plane(name, dtype, offset, panels * panel_bytes, panel_bytes))
        offset = align(offset + panels * panel_bytes)
    return out


def nbytes(encoding_name: str, rows: int, cols: int, group: int, scale_type: str) -> int:
    """Bytes of a p16 matrix, padding between planes included."""
    last = planes(encoding_name, rows, cols, group, scale_type)[-1]
    return last.offset + last.nbytes


def _pad(a: np.ndarray, rows: int, cols: int) -> np.ndarray:
    if a.shape == (rows, cols):
        return a
    out = np.zeros((rows, cols), a.dtype)
    out[: a.shape[0], : a.shape[1]] = a
    return out


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """int8/uint8[rows, cols] -> uint8 bytes of one plane of 1, 2, 4 or 8 bits (rows padded to 16, columns to 32)."""
    rows, cols = codes.shape
    r, k = align(rows, PANEL), align(cols, COLUMN_PAD)
    c = _pad(codes.view(np.uint8) if codes.dtype == np.int8 else codes, r, k)
    fields = 8 // bits  # of a byte
    f = c.reshape(r // PANEL, PANEL, k // (4 * fields), fields, 4)
    packed = f[..., 0, :]
    for i in range(1, fields):
        packed = packed | (f[..., i, :] << (i * bits))
    return np.ascontiguousarray(packed.transpose(0, 2, 1, 3), np.uint8).reshape(-1)


def unpack_codes(plane: np.ndarray, bits: int, rows: int, cols: int, signed: bool = False) -> np.ndarray:
    """The inverse of `pack_codes`: uint8 bytes -> uint8 (or int8 when signed)[rows, cols]."""
    r, k = align(rows, PANEL), align(cols, COLUMN_PAD)
    fields = 8 // bits
    b = plane.reshape(r // PANEL, k // (4 * fields), PANEL, 4).transpose(0, 2, 1, 3)
    mask = (1 << bits) - 1
    c = np.stack([(b >> (i * bits)) & mask for i in range(fields)], axis=3)
    c = np.ascontiguousarray(c, np.uint8).reshape(r, k)[:rows, :cols]
    return c.view(np.int8) if signed else c


def pack_code_planes(codes: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """Codes of 2, 3, 4, 5, 6 or 8 bits [rows, cols] -> the bytes of plane `codes` and, where there is one, `high`."""
    low, high = CODE_BITS[bits]
    if not high:
        return {"codes": pack_codes(codes, low)}
    return {"codes": pack_codes(codes & ((1 << low) - 1), low), "high": pack_codes(codes >> low, high)}


def unpack_code_planes(
    planes: Mapping[str, np.ndarray], bits: int, rows: int, cols: int, signed: bool = False
) -> np.ndarray:
    """The inverse of `pack_code_planes`: uint8 (or int8 when signed)[rows, cols]."""
    low, high = CODE_BITS[bits]
    codes = unpack_codes(planes["codes"], low, rows, cols, signed)
    return codes | unpack_codes(planes["high"], high, rows, cols) << low if high else codes


def pack_groups(values: np.ndarray) -> np.ndarray:
    """[rows, n] -> [panels, n, 16] flattened: planes of scales, mins, zeros and float values."""
    rows, n = values.shape
    r = align(rows, PANEL)
    return np.ascontiguousarray(_pad(values, r, n).reshape(r // PANEL, PANEL, n).transpose(0, 2, 1)).reshape(
        -1
    )


def unpack_groups(plane: np.ndarray, rows: int, n: int) -> np.ndarray:
    """The inverse of `pack_groups`."""
    r = align(rows, PANEL)
    return np.ascontiguousarray(plane.reshape(r // PANEL, n, PANEL).transpose(0, 2, 1)).reshape(r, n)[:rows]
