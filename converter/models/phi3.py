"""Phi 3, 3.5 and 4 mini: qkv and gate/up arrive merged, rope may be partial or LongRoPE."""

from __future__ import annotations

from halfbyte.converter.blocks import ACTIVATIONS, Heads, attention, gated_mlp, head, window_of
from halfbyte.converter.builder import Builder, Slot
from halfbyte.converter.rope import rope


def build(b: Builder) -> Slot:
    """Pre-norm layers, rotary attention, gated MLP, no biases."""
    c = b.config
    heads = Heads.of(b)
    table = rope(c, heads.dim)
    eps = c.number("rms_norm_eps", 1e-5)
    activation = c.choice("hidden_act", ACTIVATIONS, "silu")
    x = b.embed()
    for _, p in b.each_layer():
        y = b.rmsnorm(x, f"{p}.input_layernorm.weight", eps)
        window = window_of(b, True)
        b.add(x, attention(b, y, f"{p}.self_attn", heads, rope=table, window=window, merged="qkv_proj"))
        y = b.rmsnorm(x, f"{p}.post_attention_layernorm.weight", eps)
        b.add(x, gated_mlp(b, y, f"{p}.mlp", activation, merged="gate_up_proj"))
    return head(b, x, lambda r: b.rmsnorm(r, "model.norm.weight", eps))
