"""Granite 3 (dense): Llama with four scalar multipliers."""

from __future__ import annotations

from halfbyte.converter.blocks import ACTIVATIONS, Heads, attention, gated_mlp, head
from halfbyte.converter.builder import Builder, Slot
from halfbyte.converter.rope import rope


def build(b: Builder) -> Slot:
    """Pre-norm layers with scaled embedding, attention, residual and logits."""
    c = b.config
    heads = Heads.of(b)
    table = rope(c, heads.dim)
    eps = c.number("rms_norm_eps", 1e-6)
    activation = c.choice("hidden_act", ACTIVATIONS, "silu")
    residual = c.number("residual_multiplier", 1.0)
    scale = c.number("attention_multiplier", 1.0)
    attention_bias, mlp_bias = bool(c.get("attention_bias", False)), bool(c.get("mlp_bias", False))
    x = b.unary(b.embed(), "scale", c.number("embedding_multiplier", 1.0))
    for _, p in b.each_layer():
        y = b.rmsnorm(x, f"{p}.input_layernorm.weight", eps)
        y = attention(
            b,
            y,
            f"{p}.self_attn",
            heads,
            rope=table,
            scale=scale,
            bias=attention_bias,
            out_bias=attention_bias,
        )
        b.add(x, y, residual)
        y = b.rmsnorm(x, f"{p}.post_attention_layernorm.weight", eps)
        b.add(x, gated_mlp(b, y, f"{p}.mlp", activation, bias=mlp_bias), residual)
    logits = head(b, x, lambda r: b.rmsnorm(r, "model.norm.weight", eps))
    return b.unary(logits, "scale", 1.0 / c.number("logits_scaling", 1.0))
