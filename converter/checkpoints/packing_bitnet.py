"""BitNet's ternary checkpoints (transformers' quant_method bitnet): four rows in a byte, one scale a matrix.

weight  uint8 [out / 4, in]: bits 2 q, 2 q + 1 of a byte are 1 + the weight (-1, 0 or 1) of row q * out / 4 + the
byte's row; weight_scale [1]. BitLinear divides by the scale, AutoBitLinear multiplies (transformers'
integrations/bitnet.py). Activations are rounded to int8 there too, which is the runtime's policy here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from halfbyte.converter.checkpoints.checkpoint import Packed
from halfbyte.converter.checkpoints.quantized_matrix import Opener, Parts, QuantizedMatrix
from halfbyte.formats.errors import CheckpointError

_ROWS = 4  # of the matrix in one stored row


class BitNetMatrix(QuantizedMatrix):
    """One ternary module."""

    def __init__(self, name: str, parts: Parts, divide: bool) -> None:
        super().__init__(name, parts)
        self.only(("weight", "weight_scale"))
        self._weight = self.part("weight", ("U8",), 2)
        self._scale = self.float_part("weight_scale")
        if self._scale.shape not in ((), (1,), (1, 1)) or 0 in self._weight.shape:
            raise self.refuse("has not one scale, or no weights")
        stored, cols = self._weight.shape
        self.shape = (stored * _ROWS, cols)
        self._divide = divide

    @property
    def encoding(self) -> str:
        return "i2"

    @cached_property
    def _value(self) -> np.float32:
        value = self._scale.all().reshape(-1)[0].astype(np.float32)
        with np.errstate(divide="ignore"):
            return np.float32(1) / value if self._divide else value

    def read_rows(self, start: int, stop: int) -> Packed:
        stored = self._weight.shape[0]
        codes = np.empty((stop - start, self.shape[1]), np.uint8)
        for quarter in range(_ROWS):
            first, last = max(start, quarter * stored), min(stop, (quarter + 1) * stored)
            if first < last:
                packed = self._weight.rows(first - quarter * stored, last - quarter * stored)
                codes[first - start : last - start] = (packed >> (2 * quarter)) & 3
        if (codes == 3).any():
            raise self.refuse("holds the code 3, which is no ternary weight")
        # i2's code of -1 is 1
        return Packed("i2", 0, codes + np.uint8(1), np.full((stop - start, 1), self._value, np.float32))


def reader(config: Mapping[str, Any]) -> Opener:
    """What opens the modules of a checkpoint with quant_method bitnet."""
    if config.get("quantization_mode", "offline") != "offline":
        raise CheckpointError(
            "BitNet checkpoints of mode 'online' hold float weights to be rounded; use the packed (offline) one"
        )
    if config.get("use_rms_norm"):
        raise CheckpointError("BitNet checkpoints with use_rms_norm are not supported")
    divide = config.get("linear_class", "bitlinear") != "autobitlinear"

    def open_module(name: str, parts: Parts) -> QuantizedMatrix | None:
        packed = "weight" in parts and "weight_scale" in parts
        return BitNetMatrix(name, parts, divide) if packed else None

    return open_module
