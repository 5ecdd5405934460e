"""Write a checkpoint of random bf16 weights with the exact shapes of a llama-like config.

    python benchmarks/random_checkpoint.py CONFIG.json OUT_FOLDER [--seed 0]

Speed and memory do not depend on the values, so this stands in for weights that cannot be downloaded.
Written tensor by tensor; memory stays small.
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import numpy as np

ROWS = 4096  # rows generated at once


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape for llama, mistral, qwen2 and qwen3."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or hidden // heads
    kv = config.get("num_key_value_heads", heads)
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        out |= {
            p + "input_layernorm.weight": (hidden,),
            p + "self_attn.q_proj.weight": (heads * dim, hidden),
            p + "self_attn.k_proj.weight": (kv * dim, hidden),
            p + "self_attn.v_proj.weight": (kv * dim, hidden),
            p + "self_attn.o_proj.weight": (hidden, heads * dim),
            p + "post_attention_layernorm.weight": (hidden,),
            p + "mlp.gate_proj.weight": (ffn, hidden),
            p + "mlp.up_proj.weight": (ffn, hidden),
            p + "mlp.down_proj.weight": (hidden, ffn),
        }
        if config["model_type"] == "qwen2":
            out |= {
                p + f"self_attn.{n}_proj.bias": (r * dim,) for n, r in (("q", heads), ("k", kv), ("v", kv))
            }
        if config["model_type"] == "qwen3":
            out |= {p + f"self_attn.{n}_norm.weight": (dim,) for n in "qk"}
    out["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        out["lm_head.weight"] = (vocab, hidden)
    return out


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = json.loads(args.config.read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "config.json").write_text(json.dumps(config, indent=2))
    header, at = {}, 0
    for name, shape in shapes(config).items():
        n = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(args.seed)
    with open(args.out / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes(config).values():
            for start in range(0, shape[0], ROWS):
                part = (min(ROWS, shape[0] - start), *shape[1:])
                if len(shape) == 1:
                    w = np.ones(part, np.float32)
                else:
                    w = rng.standard_normal(part, np.float32) * np.float32(shape[1] ** -0.5)
                f.write((w.view(np.uint32) >> 16).astype(np.uint16).tobytes())


if __name__ == "__main__":
    main()
