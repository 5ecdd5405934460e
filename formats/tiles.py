"""The p16 tile: the one arrangement of matrices in a file, for every instruction set.

Rows come in panels of 16. Within a panel:

    8-bit codes   4 columns at a time: 16 rows x 4 bytes, byte j of a row holds column k + j
    4-bit codes   8 columns at a time: 16 rows x 4 bytes, byte j of a row holds column k + j in its
                  low nibble and column k + 4 + j in its high nibble
    floats        1 column at a time: 16 values

so that a 64-byte load is 16 rows by 4 (or 8) columns, each accumulator lane is an output row and
no horizontal sum is needed. Codes are padded with zeros to 32 columns and 16 rows; the
planes of scales are [panel, group, 16]. Normative with SPEC.md section 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .encodings import BY_NAME, FLOAT_BYTES, Encoding, group_count, stored_dtype

PANEL = 16  # rows of a panel
COLUMN_PAD = 32  # code planes are padded to this many columns
ALIGNMENT = 64  # of every plane and every tensor

ROWS, P16 = 0, 1  # tile numbers: plain row-major (vectors), panels of 16
TILE_NAMES = {ROWS: "rows", P16: "p16"}


@dataclass(frozen=True)
class Plane:
    """A contiguous part of a tensor's bytes.

    name: 'codes' | 'scales' | 'mins' | 'zeros' | 'row' | 'values'; panel_bytes: bytes of one panel of 16
    rows, so that panel p starts at `offset + p * panel_bytes`.
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
    """The stored dtype of one scale of a code encoding."""
    return np.dtype("u1") if encoding.row_scale else stored_dtype(scale_type)


def planes(encoding_name: str, rows: int, cols: int, group: int, scale_type: str) -> list[Plane]:
    """The planes of a p16 matrix, in file order. Pure integer arithmetic; nothing is allocated."""
    e = BY_NAME[encoding_name]
    panels = -(-rows // PANEL)
    parts: list[tuple[str, np.dtype, int]] = []
    if e.is_float:
        parts.append(("values", stored_dtype(e.name), cols * PANEL * FLOAT_BYTES[e.name]))
    else:
        groups = group_count(cols, group)
        scale = scale_dtype(e, scale_type)
        parts.append(("codes", np.dtype("u1"), align(cols, COLUMN_PAD) * PANEL * e.bits // 8))
        parts.append(("scales", scale, groups * PANEL * scale.itemsize))
        if e.offset == "min":
            parts.append(("mins", scale, groups * PANEL * scale.itemsize))
        if e.offset == "zero":
            parts.append(("zeros", np.dtype("u1"), groups * PANEL))
        if e.row_scale:
            parts.append(("row", np.dtype("u1"), PANEL))
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
    """int8/uint8[rows, cols] -> uint8 bytes of the code plane (rows padded to 16, columns to 32)."""
    rows, cols = codes.shape
    r, k = align(rows, PANEL), align(cols, COLUMN_PAD)
    c = _pad(codes.view(np.uint8) if codes.dtype == np.int8 else codes, r, k)
    if bits == 8:
        tiled = c.reshape(r // PANEL, PANEL, k // 4, 4).transpose(0, 2, 1, 3)
    else:
        quads = c.reshape(r // PANEL, PANEL, k // 8, 2, 4)
        tiled = (quads[..., 0, :] | (quads[..., 1, :] << 4)).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiled, np.uint8).reshape(-1)


def unpack_codes(plane: np.ndarray, bits: int, rows: int, cols: int, signed: bool = False) -> np.ndarray:
    """The inverse of `pack_codes`: uint8 bytes -> uint8 (or int8 when signed)[rows, cols]."""
    r, k = align(rows, PANEL), align(cols, COLUMN_PAD)
    if bits == 8:
        c = plane.reshape(r // PANEL, k // 4, PANEL, 4).transpose(0, 2, 1, 3)
    else:
        b = plane.reshape(r // PANEL, k // 8, PANEL, 4).transpose(0, 2, 1, 3)
        c = np.stack([b & 15, b >> 4], axis=3)
    c = np.ascontiguousarray(c).reshape(r, k)[:rows, :cols]
    return c.view(np.int8) if signed else c


def pack_groups(values: np.ndarray) -> np.ndarray:
    """[rows, n] -> [panels, n, 16] flattened: planes of scales, mins, zeros, row scales and float values."""
    rows, n = values.shape
    r = align(rows, PANEL)
    return np.ascontiguousarray(_pad(values, r, n).reshape(r // PANEL, PANEL, n).transpose(0, 2, 1)).reshape(
        -1
    )


def unpack_groups(plane: np.ndarray, rows: int, n: int) -> np.ndarray:
    """The inverse of `pack_groups`."""
    r = align(rows, PANEL)
    return np.ascontiguousarray(plane.reshape(r // PANEL, n, PANEL).transpose(0, 2, 1)).reshape(r, n)[:rows]
