"""A matrix of a Hugging Face folder that is stored as integers and their parameters.

Each `packing_*.py` knows one packing: it turns the tensors of one module (`qweight`, `scales`, ...) into a
`QuantizedMatrix`. What they share is here: bit fields across words, and the encodings of plain integers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from halfbyte.converter.checkpoints.checkpoint import Packed
from halfbyte.converter.checkpoints.stored import StoredTensor
from halfbyte.formats.errors import CheckpointError

# The tensors of one module, by what follows its name: {'qweight': ..., 'scales': ...}.
Parts = Mapping[str, StoredTensor]

_FLOATS = ("F32", "F16", "BF16", "F64")


class QuantizedMatrix(ABC):
    """One quantised matrix, [out, in] however it is packed.

    name    of its module, for messages
    shape   (out, in)
    group   columns that share a scale; 0 is the whole row
    """

    name: str
    shape: tuple[int, int]
    group: int = 0

    def __init__(self, name: str, parts: Parts) -> None:
        self.name, self.parts = name, parts

    @property
    @abstractmethod
    def encoding(self) -> str:
        """The encoding of the `Packed` that `read_rows` gives."""

    @cached_property
    def order(self) -> np.ndarray | None:
        """Input columns in the order in which `read_rows` gives them, int64[in]; None if as they are."""
        return None

    @abstractmethod
    def read_rows(self, start: int, stop: int) -> Packed:
        """Rows (outputs) start..stop, columns in `order`."""

    def refuse(self, why: str) -> CheckpointError:
        """The error that says what is wrong with this matrix."""
        return CheckpointError(f"the quantised tensor {self.name} {why}")

    def part(self, suffix: str, dtypes: tuple[str, ...], rank: int | None = None) -> StoredTensor:
        """A part that has to be there, of one of these dtypes (and this many dimensions)."""
        part = self.parts.get(suffix)
        if part is None:
            raise self.refuse(f"lacks its part {suffix}")
        if part.dtype not in dtypes or (rank is not None and len(part.shape) != rank):
            raise self.refuse(f"has a part {suffix} of {part.dtype} {list(part.shape)}, which is unexpected")
        return part

    def float_part(self, suffix: str, rank: int | None = None) -> StoredTensor:
        """A part of floating-point numbers."""
        return self.part(suffix, _FLOATS, rank)

    def only(self, known: tuple[str, ...]) -> None:
        """Refuse parts whose meaning is not known: to leave one out would change the weights."""
        for suffix in self.parts:
            if suffix not in known:
                raise self.refuse(f"has a part {suffix}, which this packing does not have")


# Opens one module: its name and parts -> its matrix, or None where it is not quantised.
Opener = Callable[[str, Parts], QuantizedMatrix | None]


def unpack_fields(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` unsigned fields of `bits` bits (1 to 8), uint8[rows, count].

    words [rows, n] of 32 bits: one stream from the least significant bit of the first word up, so that
    fields may cross from a word into the next (GPTQ's 3-bit packing; compressed-tensors, all widths).
    """
    rows = len(words)
    if bits == 8:
        return np.ascontiguousarray(words, "<u4").view(np.uint8)[:, :count]
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        fields = (words.view(np.uint32)[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
        return fields.astype(np.uint8).reshape(rows, words.shape[1] * (32 // bits))[:, :count]
    stream = np.unpackbits(np.ascontiguousarray(words, "<u4").view(np.uint8), axis=1, bitorder="little")
    fields = stream[:, : count * bits].reshape(rows, count, bits)
    return (fields << np.arange(bits, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)


def words_of(count: int, bits: int) -> int:
    """32-bit words that hold `count` fields."""
    return -(-count * bits // 32)


def is_symmetric(zeros: np.ndarray, bits: int) -> bool:
    """Whether every zero point is the middle of the codes."""
    return bool((zeros == 1 << (bits - 1)).all())


def integer_encoding(bits: int, symmetric: bool) -> str:
    """The encoding that holds plain codes of that many bits; the narrowest where there is no own one."""
    if symmetric:
        return f"i{bits}" if bits in (2, 3, 4, 5, 6) else "i8"
    return f"z{bits}" if bits in (2, 3, 4) else "z8"


def integers(
    codes: np.ndarray, bits: int, group: int, scales: np.ndarray, zeros: np.ndarray | None
) -> Packed:
    """w = scale * (code - zero) as `Packed`; zeros None are the middle of the codes.

    codes uint8[rows, cols], scales and zeros [rows, groups].
    """
    encoding = integer_encoding(bits, zeros is None)
    if encoding == "i8":
        codes = (codes.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
    return Packed(encoding, group, codes, scales, zeros=None if zeros is None else zeros.astype(np.uint8))


def group_of(matrix: QuantizedMatrix, groups: int, candidates: set[int]) -> int:
    """The group size (0 for whole rows) by which the columns make this many groups.

    candidates: the sizes that the config names; -1 and 0 are whole rows.
    """
    cols = matrix.shape[1]
    if groups == 1:
        return 0
    fitting = {c for c in candidates if c > 0 and -(-cols // c) == groups}
    if len(fitting) == 1:
        return fitting.pop()
    if groups > 0 and cols % groups == 0 and (cols // groups in fitting or not fitting):
        return cols // groups
    raise matrix.refuse(f"has {groups} groups in {cols} columns, which no group size of its config gives")


def column_order(matrix: QuantizedMatrix, g_idx: np.ndarray, groups: int) -> tuple[int, np.ndarray | None]:
    """(group, order) from the group of every column: columns order[0], order[1], ... go group by group.

    order is None where they already do. Groups have one size; only the last may be short.
    """
    cols = matrix.shape[1]
    if g_idx.shape != (cols,):
        raise matrix.refuse(f"has group indices for {list(g_idx.shape)} columns instead of {cols}")
    if g_idx.min(initial=0) < 0 or g_idx.max(initial=0) >= groups:
        raise matrix.refuse(f"has group indices outside its {groups} groups")
    sizes = np.bincount(g_idx, minlength=groups)
    group = int(sizes[0])
    if (sizes[:-1] != group).any() or not 0 < sizes[-1] <= group:
        raise matrix.refuse("has groups of different sizes; convert the original float checkpoint")
    order = np.argsort(g_idx, kind="stable")
    in_order = bool((order == np.arange(cols)).all())
    return (0 if groups == 1 else group), (None if in_order else order)


def whole_number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer of the quantisation config."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(
            f"config.json: {key} of the quantisation is {str(value)[:40]}, not a whole number"
        )
    return value
