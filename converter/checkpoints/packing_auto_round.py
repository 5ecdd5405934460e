"""AutoRound's own checkpoints: GPTQ's or AWQ's packing under another name.

`extra_config` holds layers of other bits or groups. Facts after https://github.com/intel/auto-round
(export/export_to_autoround, inference/convert_model.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.converter.checkpoints.packing_awq import awq_opener
from halfbyte.converter.checkpoints.packing_gptq import gptq_opener, group_sizes
from halfbyte.converter.checkpoints.quantized_matrix import Opener
from halfbyte.formats.errors import CheckpointError

# packing_format -> AWQ's GEMM packing, or GPTQ's with zero points stored as they are, or less one.
_AWQ, _PLAIN, _MINUS_ONE = "awq", "plain", "minus one"
_PACKINGS = {
    "auto": _MINUS_ONE,
    "auto_round:auto_gptq": _MINUS_ONE,
    "auto_round:gptq": _MINUS_ONE,
    "auto_round": _PLAIN,
    "auto_round:gptqmodel": _PLAIN,
    "auto_round:exllamav2": _PLAIN,
    "auto_round:tritonv2": _PLAIN,
    "auto_round:auto_awq": _AWQ,
    "auto_round:awq": _AWQ,
}


def reader(config: Mapping[str, Any]) -> Opener:
    """What opens the modules of a checkpoint with quant_method auto-round."""
    packing = str(config.get("packing_format") or "auto")
    if str(config.get("data_type") or "int") != "int":
        raise CheckpointError(
            f"AutoRound data type {str(config['data_type'])[:40]!r} is not readable; int is:"
            " convert the original float checkpoint"
        )
    if config.get("rotation_config") or config.get("hadamard_config"):
        raise CheckpointError("AutoRound checkpoints with rotations are not readable")
    # older releases added the kernel they had in mind: auto_round:auto_gptq:exllamav2
    form = _PACKINGS.get(":".join(packing.split(":")[:2]))
    if form is None:
        raise CheckpointError(
            f"AutoRound packing {packing[:40]!r} is not readable: save the model with format auto_round"
        )
    sizes = group_sizes(config)
    return awq_opener(sizes) if form == _AWQ else gptq_opener(form == _MINUS_ONE, sizes)
