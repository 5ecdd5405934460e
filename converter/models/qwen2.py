"""Qwen 2 and 2.5: biases on q, k and v; upper layers may slide."""

from __future__ import annotations

from halfbyte.converter.blocks import (
    ACTIVATIONS,
    Heads,
    attention,
    gated_mlp,
    head,
    upper_layers_slide,
    window_of,
)
from halfbyte.converter.builder import Builder, Slot
from halfbyte.converter.rope import rope


def build(b: Builder) -> Slot:
    """Pre-norm layers, rotary attention with qkv bias, gated MLP."""
    c = b.config
    heads = Heads.of(b)
    table = rope(c, heads.dim)
    eps = c.number("rms_norm_eps", 1e-6)
    activation = c.choice("hidden_act", ACTIVATIONS, "silu")
    slides = upper_layers_slide(b)
    x = b.embed()
    for i, p in b.each_layer():
        y = b.rmsnorm(x, f"{p}.input_layernorm.weight", eps)
        window = window_of(b, slides[i])
        b.add(x, attention(b, y, f"{p}.self_attn", heads, rope=table, window=window, bias=True))
        y = b.rmsnorm(x, f"{p}.post_attention_layernorm.weight", eps)
        b.add(x, gated_mlp(b, y, f"{p}.mlp", activation))
    return head(b, x, lambda r: b.rmsnorm(r, "model.norm.weight", eps))
