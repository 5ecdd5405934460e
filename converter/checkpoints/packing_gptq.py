"""GPTQ's packing (AutoGPTQ, GPTQModel, AutoRound): codes packed along the inputs, transposed.

qweight  int32 [in * bits / 32, out]: the codes of one output run down its column
qzeros   int32 [groups, out * bits / 32]: zero points, one less than they are in checkpoint format `gptq`,
         as they are in `gptq_v2`
scales   [groups, out];  g_idx  int32 [in]: the group of each column (act-order), optional

w[o, i] = scales[g, o] * (code[i, o] - zero[g, o]), g = g_idx[i]. Facts after
https://github.com/ModelCloud/GPTQModel (nn_modules/qlinear, utils/model.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from halfbyte.converter.checkpoints.checkpoint import Packed
from halfbyte.converter.checkpoints.quantized_matrix import (
    Opener,
    Parts,
    QuantizedMatrix,
    column_order,
    group_of,
    integer_encoding,
    integers,
    is_symmetric,
    unpack_fields,
)
from halfbyte.formats.errors import CheckpointError

_FORMATS = {"gptq": True, "gptq_v2": False}  # whether zero points are stored one less


class GPTQMatrix(QuantizedMatrix):
    """One module of a GPTQ checkpoint. Bits and sizes follow from the shapes of its parts."""

    def __init__(self, name: str, parts: Parts, minus_one: bool, group_sizes: set[int]) -> None:
        super().__init__(name, parts)
        self.only(("qweight", "qzeros", "scales", "g_idx"))
        self._qweight = self.part("qweight", ("I32", "U32"), 2)
        self._qzeros = self.part("qzeros", ("I32", "U32"), 2)
        self._scales = self.float_part("scales", 2)
        self._minus_one = minus_one
        (words, out), (groups, outs) = self._qweight.shape, self._scales.shape
        if 0 in (words, out, groups) or outs != out or self._qzeros.shape[0] != groups:
            raise self.refuse("has parts of shapes that do not fit each other")
        self.bits = self._qzeros.shape[1] * 32 // out
        whole = self.bits in range(2, 9) and self._qzeros.shape[1] * 32 == self.bits * out
        if not whole or words * 32 % self.bits:
            raise self.refuse(
                f"has {out} outputs in {self._qzeros.shape[1]} words, no whole number of bits each"
            )
        self.shape = (out, words * 32 // self.bits)
        if "g_idx" in parts and self.part("g_idx", ("I32", "I64"), 1).shape[0] != self.shape[1]:
            raise self.refuse(f"has no group index for each of its {self.shape[1]} columns")
        self._group_sizes = group_sizes
        if "g_idx" not in parts:
            self.group = group_of(self, groups, group_sizes)

    @cached_property
    def _columns(self) -> tuple[int, np.ndarray | None]:
        groups = self._scales.shape[0]
        if "g_idx" not in self.parts:
            return self.group, None
        return column_order(self, self.parts["g_idx"].all(), groups)

    @cached_property
    def order(self) -> np.ndarray | None:
        return self._columns[1]

    @cached_property
    def _symmetric(self) -> bool:
        return is_symmetric(self._zeros(0, self.shape[0]), self.bits)

    @property
    def encoding(self) -> str:
        return integer_encoding(self.bits, self._symmetric)

    def read_rows(self, start: int, stop: int) -> Packed:
        group, order = self._columns
        words = np.ascontiguousarray(self._qweight.columns(start, stop).T)
        codes = unpack_fields(words, self.bits, self.shape[1])
        if order is not None:
            codes = codes[:, order]
        scales = np.ascontiguousarray(self._scales.columns(start, stop).T)
        zeros = None if self._symmetric else self._zeros(start, stop)
        return integers(np.ascontiguousarray(codes), self.bits, group, scales, zeros)

    def _zeros(self, start: int, stop: int) -> np.ndarray:
        """Zero points of outputs start..stop, uint8 [outputs, groups]."""
        first, last = start // 32 * 32, min(-(-stop // 32) * 32, self.shape[0])
        words = self._qzeros.columns(first * self.bits // 32, -(-last * self.bits // 32)).view(np.uint32)
        if self._minus_one and 32 % self.bits == 0:
            # GPTQModel takes one off the packed words as a whole; a zero point of 0 borrows from its neighbour.
            words = words + np.uint32(0xFFFFFFFF // ((1 << self.bits) - 1))
        zeros = unpack_fields(np.ascontiguousarray(words), self.bits, last - first)
        if self._minus_one and 32 % self.bits:
            zeros = (zeros + np.uint8(1)) & np.uint8((1 << self.bits) - 1)
        return np.ascontiguousarray(zeros[:, start - first : stop - first].T)


def reader(config: Mapping[str, Any]) -> Opener:
    """What opens the modules of a checkpoint with quant_method gptq."""
    form = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    form = "marlin" if config.get("is_marlin_format") else form
    if form not in _FORMATS:
        raise CheckpointError(
            f"GPTQ checkpoint format {form[:40]!r} is not readable: save the model as gptq or gptq_v2"
        )
    if config.get("pack_dtype") not in (None, "int32"):
        raise CheckpointError("GPTQ codes packed otherwise than into int32 are not readable")
    return gptq_opener(_FORMATS[form], group_sizes(config))


def gptq_opener(minus_one: bool, sizes: set[int]) -> Opener:
    """Opens a module that has a qweight; None for any other."""

    def open_module(name: str, parts: Parts) -> QuantizedMatrix | None:
        return GPTQMatrix(name, parts, minus_one, sizes) if "qweight" in parts else None

    return open_module


def group_sizes(config: Mapping[str, Any]) -> set[int]:
    """Every group size that the config and its exceptions for single layers (`dynamic`, `extra_config`) name."""
    places = [config]
    for key in ("dynamic", "extra_config"):
        exceptions = config.get(key)
        if isinstance(exceptions, dict):
            places += [p for p in exceptions.values() if isinstance(p, dict)]
    sizes = (place.get(key) for place in places for key in ("group_size", "q_group_size"))
    return {s for s in sizes if isinstance(s, int) and not isinstance(s, bool)}
