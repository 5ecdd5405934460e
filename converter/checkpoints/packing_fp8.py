"""8-bit float checkpoints: `fp8` (DeepSeek's 128 x 128 blocks, or a scale a tensor) and `fbgemm_fp8` (a scale a row).

weight  F8_E4M3 [out, in], with weight_scale_inv [out / 128, in / 128], which multiplies in spite of its
name, or with weight_scale [], [1] or [out, 1]. Facts after transformers' integrations/finegrained_fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.converter.checkpoints.quantized_matrix import Opener, Parts, QuantizedMatrix
from halfbyte.converter.checkpoints.scaled_matrix import BYTE_DTYPES, ScaledMatrix
from halfbyte.formats.errors import CheckpointError

# Scales of activations, which a runtime chooses for itself.
_ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub")


def reader(config: Mapping[str, Any]) -> Opener:
    """What opens the modules of a checkpoint with quant_method fp8 or fbgemm_fp8."""
    block = config.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)
    ):
        raise CheckpointError("config.json: weight_block_size of the quantisation is not two whole numbers")
    blocks = {(block[0], block[1])} if block else {(128, 128)}

    def open_module(name: str, parts: Parts) -> QuantizedMatrix | None:
        scale = next((s for s in ("weight_scale_inv", "weight_scale") if s in parts), None)
        if scale is None or "weight" not in parts or parts["weight"].dtype not in BYTE_DTYPES[1:]:
            return None
        return ScaledMatrix(name, parts, scale, set(), blocks, _ACTIVATIONS)

    return open_module
