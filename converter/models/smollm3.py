"""SmolLM 3: Llama with no rotation at all on every fourth layer."""

from __future__ import annotations

from halfbyte.converter.blocks import (
    ACTIVATIONS,
    Heads,
    attention,
    gated_mlp,
    head,
    sliding_layers,
    window_of,
)
from halfbyte.converter.builder import Builder, Slot
from halfbyte.converter.rope import rope


def build(b: Builder) -> Slot:
    """Pre-norm layers, rotary or position-free attention, gated MLP."""
    c = b.config
    c.defaults(rope_theta=2e6, tie_word_embeddings=True)
    heads = Heads.of(b)
    table = rope(c, heads.dim)
    eps = c.number("rms_norm_eps", 1e-6)
    activation = c.choice("hidden_act", ACTIVATIONS, "silu")
    interval = c.integer("no_rope_layer_interval", 4)
    rotates = c.per_layer("no_rope_layers", b.layers)  # despite its name, 1 means that rope is used
    if not rotates:
        rotates = [(i + 1) % interval != 0 for i in range(b.layers)]
    slides = sliding_layers(b, lambda i: bool(c.get("use_sliding_window", False)) and not rotates[i])
    attention_bias, mlp_bias = bool(c.get("attention_bias", False)), bool(c.get("mlp_bias", False))
    x = b.embed()
    for i, p in b.each_layer():
        y = b.rmsnorm(x, f"{p}.input_layernorm.weight", eps)
        y = attention(
            b, y, f"{p}.self_attn", heads, rope=table if rotates[i] else None,
            window=window_of(b, slides[i]), bias=attention_bias, out_bias=attention_bias,
        )  # fmt: skip
        b.add(x, y)
        y = b.rmsnorm(x, f"{p}.post_attention_layernorm.weight", eps)
        b.add(x, gated_mlp(b, y, f"{p}.mlp", activation, bias=mlp_bias))
    return head(b, x, lambda r: b.rmsnorm(r, "model.norm.weight", eps))
