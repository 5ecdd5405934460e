"""Which quantised Hugging Face checkpoints are read: one row a `quant_method`, one module a packing."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from halfbyte.converter.checkpoints.quantized_matrix import Opener, QuantizedMatrix
from halfbyte.converter.checkpoints.stored import StoredTensor
from halfbyte.formats.errors import CheckpointError

METHODS = {
    "gptq": "packing_gptq",
    "awq": "packing_awq",
    "auto-round": "packing_auto_round",
    "intel/auto-round": "packing_auto_round",
    "compressed-tensors": "packing_compressed_tensors",
    "fp8": "packing_fp8",
    "fbgemm_fp8": "packing_fp8",
    "bitnet": "packing_bitnet",
}
# Scales of a quantised key/value cache: the runtime chooses its own.
_CACHE_SCALES = re.compile(r"\.self_attn\.([qkv]_scale|kv_scale|prob_output_scale|[kv]_proj\.output_scale)$")


class Quantization:
    """How the weights of one checkpoint are quantised.

    config is config.json's quantization_config. Raises CheckpointError, naming it, for a method that is not
    read or a variant of one that is not.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        guess = "bitsandbytes" if config.get("load_in_4bit") or config.get("load_in_8bit") else "unnamed"
        self._method = str(config.get("quant_method") or guess)
        if self._method not in METHODS:
            raise CheckpointError(
                f"its weights are quantised by {self._method[:40]}, which is not readable"
                f" ({', '.join(METHODS)} are): convert the original float checkpoint"
            )
        packing = importlib.import_module(f"{__package__}.{METHODS[self._method]}")
        self._open: Opener = packing.reader(config)

    def take(self, tensors: dict[str, StoredTensor]) -> tuple[dict[str, QuantizedMatrix], set[str]]:
        """Take the parts of all quantised matrices out of `tensors`.

        Returns the matrices by tensor name (`<module>.weight`), and the names of those of the other tensors
        that need not be used.
        """
        modules: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in tensors.items():
            module, _, suffix = name.rpartition(".")
            if suffix != "bias":
                modules.setdefault(module, {})[suffix] = tensor
        matrices: dict[str, QuantizedMatrix] = {}
        for module, parts in modules.items():
            matrix = self._open(module, parts)
            if matrix is not None:
                matrices[f"{module}.weight"] = matrix
                for suffix in parts:
                    del tensors[f"{module}.{suffix}"]
        spare = {name for name in tensors if _CACHE_SCALES.search(name)}
        if self._method == "gptq":
            spare |= {name for name in tensors if _is_empty_bias(name, tensors[name], matrices)}
        return matrices, spare


def _is_empty_bias(name: str, tensor: StoredTensor, matrices: Mapping[str, QuantizedMatrix]) -> bool:
    """AutoGPTQ gave every module a bias, of zeros where the model has none."""
    stem, _, suffix = name.rpartition(".")
    return suffix == "bias" and f"{stem}.weight" in matrices and not np.any(tensor.all())
