"""One tensor as it lies in a safetensors file: the part of it that is asked for, and little else, is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from halfbyte.converter.checkpoints.bounded_file import BoundedFile
from halfbyte.converter.checkpoints.safetensors_header import TensorEntry
from halfbyte.formats.errors import CheckpointError

# safetensors' dtypes that are read, as NumPy's; 8-bit floats stay bytes.
_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U32": "<u4", "I16": "<i2", "I8": "i1",
    "U8": "u1", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
}  # fmt: skip
# Largest tensor that is read at once only to look at it: scales, zero points, group indices.
_MAX_SMALL = 1 << 30


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of one file; its rows are contiguous."""

    file: BoundedFile
    entry: TensorEntry

    @property
    def dtype(self) -> str:
        """As safetensors names it: 'F32', 'I32', 'F8_E4M3', ..."""
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.entry.shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the first axis; float64 narrows to float32."""
        shape = self.entry.shape
        row_bytes = (self.entry.end - self.entry.begin) // shape[0] if shape[0] else 0
        data = self.file.read(self.entry.begin + start * row_bytes, (stop - start) * row_bytes)
        return self._typed(data).reshape(stop - start, *shape[1:])

    def columns(self, start: int, stop: int) -> np.ndarray:
        """Columns start..stop of a matrix: one read for each row, or a single one for all columns."""
        rows, cols = self.entry.shape
        if (start, stop) == (0, cols):
            return self.rows(0, rows)
        size = (self.entry.end - self.entry.begin) // (rows * cols) if rows * cols else 0
        data = np.empty((rows, (stop - start) * size), np.uint8)
        for row in range(rows):
            data[row] = self.file.read(self.entry.begin + (row * cols + start) * size, (stop - start) * size)
        return self._typed(data.reshape(-1)).reshape(rows, stop - start)

    def all(self) -> np.ndarray:
        """Everything, of a tensor that is small beside the weights."""
        if self.entry.end - self.entry.begin > _MAX_SMALL:
            raise CheckpointError(f"{self.file.path.name} holds a tensor of parameters of more than 1 GiB")
        data = self.file.read(self.entry.begin, self.entry.end - self.entry.begin)
        return self._typed(data).reshape(self.entry.shape)

    def _typed(self, data: np.ndarray) -> np.ndarray:
        if self.dtype == "BF16":
            import ml_dtypes

            return data.view(ml_dtypes.bfloat16)
        if self.dtype not in _NUMPY:
            raise CheckpointError(
                f"{self.file.path.name} holds a tensor of {self.dtype}, which is not readable"
            )
        typed = data.view(_NUMPY[self.dtype])
        return typed.astype(np.float32) if self.dtype == "F64" else typed
