"""How GGUF says what a Hugging Face folder says: architectures, tensor names, config keys.

Facts after llama.cpp's converter (conversion/*.py) and loader (src/models/*.cpp),
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from halfbyte.formats.errors import CheckpointError

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Computed from the config, or read into it: not weights.
NOT_WEIGHTS = re.compile(r"(rope_(freqs|factors_long|factors_short)|blk\.[0-9]+\.attn_rot_embd)\.weight")

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SANDWICH = {**_POST_NORMS, "attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
_LLAMA = {**_ATTENTION, **_MLP, **_PRE_NORMS}
_PHI3 = {
    **_PRE_NORMS,
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Architecture:
    """One value of general.architecture.

    model_type    Hugging Face's name of it
    class_name    Hugging Face's class, for the config's `architectures`
    blocks        names within a layer: GGUF -> Hugging Face
    interleaved   query and key rows are stored in interleaved rope order
    norm_offset   what llama.cpp adds to every RMSNorm weight
    specific      adds the config keys that only this architecture has
    """

    model_type: str
    class_name: str
    blocks: dict[str, str]
    interleaved: bool = False
    norm_offset: float = 0.0
    specific: Callable[[dict[str, Any], Metadata], None] | None = None


class Metadata:
    """The metadata of one model under the prefix of its architecture, with checked types."""

    def __init__(self, architecture: str, get: Callable[[str], Any], source: str) -> None:
        self._architecture = architecture
        self._get = get
        self._source = source

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; without a default the key has to be there."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
            raise CheckpointError(f"{self._source}: {self._architecture}.{key} is not a number")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number in 1..2^31. An array with one value for all layers counts as that value."""
        value = self._value(key, default)
        if hasattr(value, "tolist"):
            values = set(value.tolist())
            if len(values) != 1:
                raise CheckpointError(
                    f"{self._source}: {self._architecture}.{key} differs between layers: not supported"
                )
            (value,) = values
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise CheckpointError(f"{self._source}: {self._architecture}.{key} is not a valid size")
        return value

    def optional_size(self, key: str) -> int | None:
        """As `size`; None if the key is absent or 0, which is how GGUF says that there is none."""
        return None if self.value(key) is None or _is_zero(self.value(key)) else self.size(key)

    def text(self, key: str) -> str | None:
        """A text; None if the key is absent."""
        value = self.value(key)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{self._source}: {self._architecture}.{key} is not a text")
        return value

    def value(self, key: str) -> Any:
        """Whatever the key holds; None if it is absent."""
        return self._get(f"{self._architecture}.{key}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.value(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self._source} lacks the metadata {self._architecture}.{key}")
        return value


def _is_zero(value: Any) -> bool:
    return isinstance(value, int) and value == 0


def plain_name(architecture: Architecture, name: str, layers: int) -> str | None:
    """The Hugging Face name of a GGUF tensor; None if this architecture has no such tensor."""
    stem, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        return None
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{suffix}"
    parts = stem.split(".")
    if len(parts) != 3 or parts[0] != "blk" or not re.fullmatch(r"0|[1-9][0-9]{0,5}", parts[1]):
        return None
    if int(parts[1]) >= layers or parts[2] not in architecture.blocks:
        return None
    return f"model.layers.{parts[1]}.{architecture.blocks[parts[2]]}.{suffix}"


def translate_config(architecture: Architecture, metadata: Metadata, vocab_size: int) -> dict[str, Any]:
    """The config that Hugging Face's config.json would hold, but for what the tensors tell."""
    heads = metadata.size("attention.head_count")
    width = metadata.size("embedding_length")
    head_dim = metadata.size("attention.key_length", max(width // heads, 1))
    if metadata.size("attention.value_length", head_dim) != head_dim:
        raise CheckpointError("keys and values of different widths are not supported")
    if metadata.optional_size("expert_count"):
        raise CheckpointError("mixtures of experts in GGUF are not supported")
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_size": width,
        "intermediate_size": metadata.size("feed_forward_length"),
        "num_hidden_layers": metadata.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": metadata.size("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": float(metadata.number("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(metadata),
        "hidden_act": "silu",
    }
    rope_dim = metadata.size("rope.dimension_count", head_dim)
    if rope_dim > head_dim:
        raise CheckpointError(f"rope over {rope_dim} of {head_dim} columns of a head makes no sense")
    if rope_dim < head_dim:
        config["partial_rotary_factor"] = rope_dim / head_dim
    if architecture.specific is not None:
        architecture.specific(config, metadata)
    return config


def _rope_scaling(metadata: Metadata) -> dict[str, Any] | None:
    """rope_scaling in Hugging Face's terms. longrope's factors are tensors, which the reader adds."""
    kind = metadata.text("rope.scaling.type")
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0))
    if kind in (None, "none", "linear"):
        return None if kind == "none" or factor in (0.0, 1.0) else {"rope_type": "linear", "factor": factor}
    if kind == "longrope":
        scaling: dict[str, Any] = {"rope_type": "longrope"}
        if metadata.value("rope.scaling.attn_factor") is not None:
            scaling["attention_factor"] = metadata.number("rope.scaling.attn_factor")
        return scaling
    if kind != "yarn":
        raise CheckpointError(f"rope scaling {kind[:40]!r} is not supported")
    scaling = {"rope_type": "yarn", "factor": factor}
    for key, ours in (
        ("rope.scaling.original_context_length", "original_max_position_embeddings"),
        ("rope.scaling.yarn_attn_factor", "attention_factor"),
        ("rope.scaling.yarn_beta_fast", "beta_fast"),
        ("rope.scaling.yarn_beta_slow", "beta_slow"),
    ):
        if metadata.value(key) is not None:
            scaling[ours] = metadata.number(key)
    return scaling


def _layer_types(config: dict[str, Any], metadata: Metadata, period: int) -> None:
    """Which layers attend through the window: all but each `period`-th, or what the metadata says."""
    layers = config["num_hidden_layers"]
    pattern = metadata.value("attention.sliding_window_pattern")
    if hasattr(pattern, "tolist"):
        windowed = [bool(w) for w in pattern.tolist()]
        if len(windowed) < layers:
            raise CheckpointError("attention.sliding_window_pattern has fewer entries than there are layers")
    else:
        period = metadata.size("attention.sliding_window_pattern", period)
        windowed = [(layer + 1) % period != 0 for layer in range(layers)]
        config["sliding_window_pattern"] = period
    config["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windowed[:layers]]


def _llama(config: dict[str, Any], metadata: Metadata) -> None:
    # Only Mistral's llama-like models have a window.
    if metadata.optional_size("attention.sliding_window"):
        config["model_type"], config["architectures"] = "mistral", ["MistralForCausalLM"]
        config["sliding_window"] = metadata.size("attention.sliding_window")


def _qwen(config: dict[str, Any], metadata: Metadata) -> None:
    config["use_sliding_window"] = False


def _gemma(config: dict[str, Any], metadata: Metadata, largest: int) -> None:
    """Common to Gemma 2 and 3; only the largest of each scales by the width per head."""
    del config["hidden_act"]
    config["hidden_activation"] = "gelu_pytorch_tanh"
    per_head = config["hidden_size"] // config["num_attention_heads"]
    is_largest = config["num_hidden_layers"] == largest
    config["query_pre_attn_scalar"] = per_head if is_largest else config["head_dim"]


def _gemma2(config: dict[str, Any], metadata: Metadata) -> None:
    _gemma(config, metadata, largest=46)
    config["sliding_window"] = metadata.size("attention.sliding_window", 4096)
    config["attn_logit_softcapping"] = metadata.number("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = metadata.number("final_logit_softcapping", 30.0)
    _layer_types(config, metadata, period=2)


def _gemma3(config: dict[str, Any], metadata: Metadata) -> None:
    _gemma(config, metadata, largest=62)
    config["rope_theta"] = float(metadata.number("rope.freq_base", 1000000.0))
    config["rope_local_base_freq"] = float(metadata.number("rope.freq_base_swa", 10000.0))
    config["attn_logit_softcapping"] = None
    softcap = metadata.number("final_logit_softcapping", 0.0)
    config["final_logit_softcapping"] = softcap or None
    if metadata.optional_size("attention.sliding_window"):
        config["sliding_window"] = metadata.size("attention.sliding_window")
        _layer_types(config, metadata, period=6)
    else:
        config["sliding_window"] = None
        config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]


def _phi3(config: dict[str, Any], metadata: Metadata) -> None:
    original = metadata.size("rope.scaling.original_context_length", config["max_position_embeddings"])
    config["original_max_position_embeddings"] = original
    # Phi-4 writes a window of 0 for none.
    config["sliding_window"] = metadata.optional_size("attention.sliding_window")


def _smollm3(config: dict[str, Any], metadata: Metadata) -> None:
    # GGUF has no key for it: each fourth layer goes without rope (1 = with rope).
    config["no_rope_layer_interval"] = 4
    config["no_rope_layers"] = [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]


def _olmo2(config: dict[str, Any], metadata: Metadata) -> None:
    if metadata.optional_size("attention.sliding_window"):
        config["model_type"], config["architectures"] = "olmo3", ["Olmo3ForCausalLM"]
        config["sliding_window"] = metadata.size("attention.sliding_window")
        _layer_types(config, metadata, period=4)


def _granite(config: dict[str, Any], metadata: Metadata) -> None:
    config["attention_multiplier"] = metadata.number("attention.scale", config["head_dim"] ** -0.5)
    config["embedding_multiplier"] = metadata.number("embedding_scale", 1.0)
    config["residual_multiplier"] = metadata.number("residual_scale", 1.0)
    config["logits_scaling"] = metadata.number("logit_scale", 1.0)


_GEMMA3 = {**_ATTENTION, **_MLP, **_SANDWICH, **_QK_NORMS}
_OLMO2 = {**_ATTENTION, **_MLP, **_POST_NORMS, **_QK_NORMS}
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _LLAMA, interleaved=True, specific=_llama),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _LLAMA, specific=_qwen),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {**_LLAMA, **_QK_NORMS}, specific=_qwen),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", {**_ATTENTION, **_MLP, **_SANDWICH}, norm_offset=1.0, specific=_gemma2
    ),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", _GEMMA3, norm_offset=1.0, specific=_gemma3),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", _PHI3, specific=_phi3),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", _LLAMA, interleaved=True, specific=_smollm3),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", _OLMO2, specific=_olmo2),
    "granite": Architecture("granite", "GraniteForCausalLM", _LLAMA, interleaved=True, specific=_granite),
}
