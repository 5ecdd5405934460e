"""compressed-tensors (llm-compressor): packed integers, plain int8 and 8-bit floats.

pack-quantized   weight_packed int32 [out, in * bits / 32]: code + 2^(bits - 1), one stream a row;
                 weight_scale [out, groups]; weight_shape int64 [2]; weight_zero_point int32, packed along the
                 outputs, [out * bits / 32, groups], where not symmetric; weight_g_idx int32 [in] with act-order
int-quantized, naive-quantized, float-quantized
                 weight int8 or F8_E4M3 [out, in]; weight_scale, weight_zero_point int8 (see scaled_matrix.py)

Bits, groups and symmetry follow from the parts, so that `ignore`, `targets` and mixed formats need no
reading. Facts after https://github.com/vllm-project/compressed-tensors (compressors/).
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
    unpack_fields,
    words_of,
)
from halfbyte.converter.checkpoints.scaled_matrix import BYTE_DTYPES, ScaledMatrix
from halfbyte.formats.errors import CheckpointError

_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "naive-quantized",
    "float-quantized",
    "mixed-precision",
    "dense",
)
# Scales of activations, which a runtime chooses for itself.
_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
_MAX_ACT_ORDER = -1  # weight_g_idx of a matrix without act-order


class PackQuantizedMatrix(QuantizedMatrix):
    """One module of format pack-quantized."""

    def __init__(self, name: str, parts: Parts, bits: set[int], sizes: set[int]) -> None:
        super().__init__(name, parts)
        known = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
        self.only((*known, *_ACTIVATIONS))
        self._packed = self.part("weight_packed", ("I32", "U32"), 2)
        self._scales = self.float_part("weight_scale")
        self._zeros = self.parts.get("weight_zero_point")
        shape = self.part("weight_shape", ("I64", "I32"), 1)
        size = [int(n) for n in shape.all()] if shape.shape == (2,) else []
        out, words = self._packed.shape
        if len(size) != 2 or size[0] != out or not 0 < size[1] <= words * 32 or not out:
            raise self.refuse(f"says that its shape is {size}, which {out} x {words} words do not hold")
        self.shape = (out, size[1])
        fitting = [b for b in sorted(bits) if 2 <= b <= 8 and words_of(size[1], b) == words]
        if len(fitting) != 1:
            raise self.refuse(
                f"has {words} words for {size[1]} columns, which no number of bits of its config gives"
            )
        self.bits = fitting[0]
        scales = self._scales.shape
        groups = scales[1] if len(scales) == 2 else 1
        if scales not in ((), (1,), (1, 1), (out,), (out, groups)) or not groups:
            raise self.refuse(f"of {out} x {size[1]} has scales of shape {list(scales)}")
        self._groups, self._sizes = groups, sizes
        if self._zeros is not None:
            zeros = self.part("weight_zero_point", ("I32", "U32"), 2)
            if zeros.shape != (words_of(out, self.bits), groups):
                raise self.refuse(f"has zero points of shape {list(zeros.shape)}")
        if "weight_g_idx" in parts and self.part("weight_g_idx", ("I32", "I64"), 1).shape[0] != size[1]:
            raise self.refuse(f"has no group index for each of its {size[1]} columns")

    @cached_property
    def _columns(self) -> tuple[int, np.ndarray | None]:
        if "weight_g_idx" in self.parts:
            g_idx = self.parts["weight_g_idx"].all()
            if not (g_idx == _MAX_ACT_ORDER).any():
                return column_order(self, g_idx, self._groups)
        return group_of(self, self._groups, self._sizes), None

    @cached_property
    def order(self) -> np.ndarray | None:
        return self._columns[1]

    @property
    def encoding(self) -> str:
        return integer_encoding(self.bits, self._zeros is None)

    def read_rows(self, start: int, stop: int) -> Packed:
        group, order = self._columns
        codes = unpack_fields(self._packed.rows(start, stop), self.bits, self.shape[1])
        if order is not None:
            codes = np.ascontiguousarray(codes[:, order])
        if len(self._scales.shape) == 2 and self._scales.shape[0] == self.shape[0]:
            scales = self._scales.rows(start, stop)
        else:
            scales = np.broadcast_to(self._scales.all().reshape(-1, 1), (self.shape[0], 1))[start:stop]
        zeros = None if self._zeros is None else self._zero_points(start, stop)
        return integers(codes, self.bits, group, np.ascontiguousarray(scales), zeros)

    def _zero_points(self, start: int, stop: int) -> np.ndarray:
        """Zero points of outputs start..stop, uint8 [outputs, groups]."""
        assert self._zeros is not None
        first, last = start // 32 * 32, min(-(-stop // 32) * 32, self.shape[0])
        words = self._zeros.rows(first * self.bits // 32, words_of(last, self.bits))
        fields = unpack_fields(np.ascontiguousarray(words.T), self.bits, last - first)
        return np.ascontiguousarray(fields[:, start - first : stop - first].T)


def reader(config: Mapping[str, Any]) -> Opener:
    """What opens the modules of a checkpoint with quant_method compressed-tensors."""
    schemes = config.get("config_groups")
    if not isinstance(schemes, dict) or not all(isinstance(s, dict) for s in schemes.values()):
        raise CheckpointError("config.json: config_groups of the compressed-tensors quantisation is missing")
    for form in (config.get("format"), *(s.get("format") for s in schemes.values())):
        if form is not None and form not in _FORMATS:
            raise CheckpointError(
                f"compressed-tensors format {str(form)[:40]!r} is not readable; {', '.join(_FORMATS[:4])} are:"
                " convert the original float checkpoint"
            )
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        raise CheckpointError(f"compressed-tensors sparsity {str(sparsity['format'])[:40]!r} is not readable")
    if config.get("transform_config"):
        raise CheckpointError("compressed-tensors checkpoints with transforms (rotations) are not readable")
    weights = [w for s in schemes.values() if isinstance(w := s.get("weights"), dict)]
    bits = {w["num_bits"] for w in weights if type(w.get("num_bits")) is int}
    sizes = {w["group_size"] for w in weights if type(w.get("group_size")) is int}
    found = [w["block_structure"] for w in weights if isinstance(w.get("block_structure"), list)]
    blocks = {(b[0], b[1]) for b in found if len(b) == 2 and all(type(n) is int and n > 0 for n in b)}

    def open_module(name: str, parts: Parts) -> QuantizedMatrix | None:
        if "weight_packed" in parts:
            return PackQuantizedMatrix(name, parts, bits, sizes)
        if "weight" in parts and parts["weight"].dtype in BYTE_DTYPES and "weight_scale" in parts:
            known = ("weight_zero_point", *_ACTIVATIONS)
            return ScaledMatrix(name, parts, "weight_scale", sizes, blocks, known)
        return None

    return open_module
