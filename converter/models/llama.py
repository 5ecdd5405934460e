"""Llama 2 and 3, TinyLlama, SmolLM and everything else that says model_type llama."""

from __future__ import annotations

from halfbyte.converter.blocks import ACTIVATIONS, Heads, attention, gated_mlp, head
from halfbyte.converter.builder import Builder, Slot
from halfbyte.converter.rope import rope


def build(b: Builder) -> Slot:
    """Pre-norm layers, rotary attention, gated MLP."""
    c = b.config
    heads = Heads.of(b)
    table = rope(c, heads.dim)
    eps = c.number("rms_norm_eps", 1e-6)
    activation = c.choice("hidden_act", ACTIVATIONS, "silu")
    attention_bias, mlp_bias = bool(c.get("attention_bias", False)), bool(c.get("mlp_bias", False))
    x = b.embed()
    for _, p in b.each_layer():
        y = b.rmsnorm(x, f"{p}.input_layernorm.weight", eps)
        y = attention(b, y, f"{p}.self_attn", heads, rope=table, bias=attention_bias, out_bias=attention_bias)
        b.add(x, y)
        y = b.rmsnorm(x, f"{p}.post_attention_layernorm.weight", eps)
        b.add(x, gated_mlp(b, y, f"{p}.mlp", activation, bias=mlp_bias))
    return head(b, x, lambda r: b.rmsnorm(r, "model.norm.weight", eps))
