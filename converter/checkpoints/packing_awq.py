"""AWQ's GEMM packing (AutoAWQ, AutoRound): eight 4-bit codes of neighbouring outputs in a word, interleaved.

qweight  int32 [in, out / 8];  qzeros  int32 [groups, out / 8];  scales  [groups, out]

Nibble n of a word is output 8 w + (0, 2, 4, 6, 1, 3, 5, 7)[n]. w[o, i] = scales[g, o] * (code - zero[g, o]),
g = i / group size. Facts after https://github.com/casper-hansen/AutoAWQ (awq/utils/packing_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from halfbyte.converter.checkpoints.checkpoint import Packed
from halfbyte.converter.checkpoints.packing_gptq import group_sizes
from halfbyte.converter.checkpoints.quantized_matrix import (
    Opener,
    Parts,
    QuantizedMatrix,
    group_of,
    integer_encoding,
    integers,
    is_symmetric,
    unpack_fields,
)
from halfbyte.converter.checkpoints.stored import StoredTensor
from halfbyte.formats.errors import CheckpointError

_BITS, _LANES = 4, 8
_NIBBLE_OF_OUTPUT = np.array([0, 4, 1, 5, 2, 6, 3, 7])


class AWQMatrix(QuantizedMatrix):
    """One module of an AWQ checkpoint."""

    def __init__(self, name: str, parts: Parts, sizes: set[int]) -> None:
        super().__init__(name, parts)
        self.only(("qweight", "qzeros", "scales"))
        self._qweight = self.part("qweight", ("I32", "U32"), 2)
        self._qzeros = self.part("qzeros", ("I32", "U32"), 2)
        self._scales = self.float_part("scales", 2)
        (cols, words), (groups, out) = self._qweight.shape, self._scales.shape
        if 0 in (cols, words, groups) or out != words * _LANES or self._qzeros.shape != (groups, words):
            raise self.refuse("has parts of shapes that do not fit the GEMM packing of 4-bit codes")
        self.shape = (out, cols)
        self.group = group_of(self, groups, sizes)

    @cached_property
    def _symmetric(self) -> bool:
        return is_symmetric(self._outputs(self._qzeros, 0, self.shape[0]), _BITS)

    @property
    def encoding(self) -> str:
        return integer_encoding(_BITS, self._symmetric)

    def read_rows(self, start: int, stop: int) -> Packed:
        codes = self._outputs(self._qweight, start, stop)
        zeros = None if self._symmetric else self._outputs(self._qzeros, start, stop)
        scales = np.ascontiguousarray(self._scales.columns(start, stop).T)
        return integers(codes, _BITS, self.group, scales, zeros)

    @staticmethod
    def _outputs(part: StoredTensor, start: int, stop: int) -> np.ndarray:
        """Fields of outputs start..stop, uint8 [outputs, rows of the part]."""
        first, last = start // _LANES, -(-stop // _LANES)
        words = np.ascontiguousarray(part.columns(first, last))
        fields = unpack_fields(words, _BITS, words.shape[1] * _LANES).reshape(len(words), -1, _LANES)
        outputs = fields[:, :, _NIBBLE_OF_OUTPUT].reshape(len(words), -1)
        begin = start - first * _LANES
        return np.ascontiguousarray(outputs[:, begin : begin + stop - start].T)


def reader(config: Mapping[str, Any]) -> Opener:
    """What opens the modules of a checkpoint with quant_method awq."""
    version = str(config.get("version") or config.get("checkpoint_format") or "gemm").lower()
    if version != "gemm":
        raise CheckpointError(f"AWQ version {version[:40]!r} is not readable: save the model as version gemm")
    bits = config.get("bits", config.get("w_bit", _BITS))
    if bits != _BITS:
        raise CheckpointError(f"AWQ checkpoints of {str(bits)[:20]} bits are not readable; only 4 bits are")
    if config.get("backend") == "llm-awq":
        raise CheckpointError(
            "AWQ checkpoints of llm-awq are not readable: save the model with AutoAWQ (gemm)"
        )
    return awq_opener(group_sizes(config))


def awq_opener(sizes: set[int]) -> Opener:
    """Opens a module that has a qweight; None for any other."""

    def open_module(name: str, parts: Parts) -> QuantizedMatrix | None:
        return AWQMatrix(name, parts, sizes) if "qweight" in parts else None

    return open_module
