"""Matrices stored one byte a weight (int8 or an 8-bit float) beside a grid of scales.

The grid is one scale for the whole matrix, one for each row, one for each group of columns of a row, or one
for each block of rows by columns. compressed-tensors, `fp8` and `fbgemm_fp8` checkpoints share this form.
"""

from __future__ import annotations

import numpy as np

from halfbyte.converter.checkpoints.checkpoint import Packed
from halfbyte.converter.checkpoints.quantized_matrix import Parts, QuantizedMatrix, group_of
from halfbyte.converter.checkpoints.stored import StoredTensor

_ENCODINGS = {"I8": "i8", "F8_E4M3": "f8e4m3", "F8_E5M2": "f8e5m2"}
BYTE_DTYPES = tuple(_ENCODINGS)
_SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0")


class ScaleGrid:
    """The scales of a matrix (and in the same form its zero points): which rows and columns share one.

    part          of shape [], [1], [out], [out, groups] or [out / block rows, in / block columns]
    group_sizes   sizes of groups of columns that the config names
    blocks        (rows, columns) of blocks that the config names
    """

    def __init__(
        self,
        matrix: QuantizedMatrix,
        part: StoredTensor,
        group_sizes: set[int],
        blocks: set[tuple[int, int]],
    ) -> None:
        out, cols = matrix.shape
        shape = part.shape if len(part.shape) != 1 or part.shape == (1,) else (*part.shape, 1)
        self.part, self.rows_each, self.group = part, 1, 0
        if len(shape) > 2 or 0 in shape:
            raise matrix.refuse(f"has scales of shape {list(part.shape)}")
        if shape in ((), (1,), (1, 1)):
            self.rows_each = out
        elif shape[0] == out and (shape[1] == 1 or not _block_of(blocks, out, cols, shape)):
            self.group = group_of(matrix, shape[1], group_sizes)
        else:
            block = _block_of(blocks, out, cols, shape)
            if block is None:
                raise matrix.refuse(f"of {out} x {cols} has scales of shape {list(part.shape)}")
            self.rows_each, self.group = block[0], 0 if shape[1] == 1 else block[1]
        self._shape = (1, 1) if len(shape) < 2 else shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The grid's values for rows start..stop of the matrix, [stop - start, groups]."""
        first, last = start // self.rows_each, -(-stop // self.rows_each)
        if len(self.part.shape) == 2:
            grid = self.part.rows(first, last)
        else:
            grid = self.part.all().reshape(self._shape[0], -1)[first:last]
        return grid[np.arange(start, stop) // self.rows_each - first]


def _block_of(
    blocks: set[tuple[int, int]], out: int, cols: int, shape: tuple[int, ...]
) -> tuple[int, int] | None:
    """The block size, of those named, that makes a grid of this shape."""
    fitting = [b for b in sorted(blocks) if (-(-out // b[0]), -(-cols // b[1])) == shape]
    return fitting[0] if len(fitting) == 1 else None


class ScaledMatrix(QuantizedMatrix):
    """w = scale * value, or scale * (value - zero): `weight` of one byte each, [out, in]."""

    def __init__(
        self,
        name: str,
        parts: Parts,
        scale: str,
        group_sizes: set[int],
        blocks: set[tuple[int, int]],
        known: tuple[str, ...],
    ) -> None:
        super().__init__(name, parts)
        self.only(("weight", scale, *known))
        self._weight = self.part("weight", BYTE_DTYPES, 2)
        out, cols = self._weight.shape
        self.shape = (out, cols)
        if 0 in self.shape:
            raise self.refuse("is empty")
        self._scales = ScaleGrid(self, self.part(scale, _SCALE_DTYPES), group_sizes, blocks)
        self.group = self._scales.group
        self._zeros = None
        if "weight_zero_point" in parts and parts["weight_zero_point"].dtype == "I8":
            self._zeros = ScaleGrid(self, parts["weight_zero_point"], group_sizes, blocks)
        elif "weight_zero_point" in parts and (_ENCODINGS[self._weight.dtype] == "i8" or any_nonzero(parts)):
            raise self.refuse(f"has zero points of {parts['weight_zero_point'].dtype}; I8 is readable")

    @property
    def encoding(self) -> str:
        return "z8" if self._zeros is not None else _ENCODINGS[self._weight.dtype]

    def read_rows(self, start: int, stop: int) -> Packed:
        codes = self._weight.rows(start, stop)
        scales = scale_values(self._scales.rows(start, stop), self._scales.part.dtype)
        if self._zeros is None:
            if self._weight.dtype == "F8_E4M3":
                bad = (codes & 127) == 127
            else:
                bad = (codes & 127) >= 124 if self._weight.dtype == "F8_E5M2" else np.False_
            if np.any(bad):
                raise self.refuse("holds values that are not finite (NaN or infinity)")
            return Packed(self.encoding, self.group, codes, scales)
        # int8 codes and zero points, both moved up by 128: their difference is the same
        unsigned = codes.view(np.uint8) ^ np.uint8(128)
        zeros = self._zeros.rows(start, stop).view(np.uint8) ^ np.uint8(128)
        return Packed("z8", self.group, unsigned, scales, zeros=zeros)


def any_nonzero(parts: Parts) -> bool:
    """Whether the zero points, which 8-bit floats do not use, are other than 0."""
    return bool(parts["weight_zero_point"].all().view(np.uint8).any())


def scale_values(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Scales as floats; E8M0 bytes e are 2^(e - 127) (OCP Microscaling Formats, 1.0)."""
    if dtype != "F8_E8M0":
        return stored
    return np.ldexp(np.float32(1), stored.astype(np.int32) - 127).astype(np.float32)
