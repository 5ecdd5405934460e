"""Write a llama, qwen2 or qwen3 checkpoint of one bf16, f16 or f32 safetensors file as GGUF, with the `gguf` package.

There is no tokenizer in it (`none`): the comparisons feed token ids. Weights are mapped, so memory stays small.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
}  # safetensors' name -> how its bytes are held

# Hugging Face's names -> GGUF's; {} is the layer.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.self_attn.q_norm": "blk.{}.attn_q_norm",
    "model.layers.{}.self_attn.k_norm": "blk.{}.attn_k_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}


def tensors(path: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """(name, dtype, values) of every tensor of a safetensors file; BF16 numbers come as uint16."""
    with path.open("rb") as f:
        size = struct.unpack("<Q", f.read(8))[0]
        header = json.loads(f.read(size))
    data = np.memmap(path, np.uint8, "r", 8 + size)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is {entry['dtype']}, not one of {', '.join(DTYPES)}")
        start, end = entry["data_offsets"]
        yield name, entry["dtype"], data[start:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


def as_float(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 of what `tensors` gives."""
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values.astype(np.float32)


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor. Raises KeyError for one that these models do not have."""
    parts = name.split(".")
    layer = parts[2] if parts[1] == "layers" else ""
    stem, kind = name.rsplit(".", 1)
    if layer:
        parts[2] = "{}"
        stem = ".".join(parts[:-1])
    return f"{NAMES[stem].format(layer)}.{kind}"


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix reordered from halves to pairs, as llama.cpp rotates them for `llama`."""
    return np.ascontiguousarray(w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2)).reshape(w.shape)


def write(checkpoint: Path, out: Path) -> None:
    """`checkpoint`: a folder of config.json and model.safetensors. Raises ValueError for other models."""
    import gguf

    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    arch = config["model_type"]
    if arch not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"no GGUF writer for model type {arch}")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(str(out), arch)
    writer.add_name(checkpoint.name)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(float(config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    found = list(tensors(checkpoint / "model.safetensors"))
    widest = max((dtype for _, dtype, _ in found), key=list(DTYPES).index)
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if widest == "F32" else f"MOSTLY_{widest}"))
    writer.add_tokenizer_model("none")
    for name, dtype, values in found:
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            if "model.embed_tokens.weight" in (n for n, _, _ in found):
                continue
            name = "model.embed_tokens.weight"  # safetensors keep one of two tied names
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), as_float(values, dtype))
            continue
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = interleaved(values, heads if "q_proj" in name else kv_heads)
        raw = getattr(gguf.GGMLQuantizationType, dtype)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(values).view(np.uint8), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
