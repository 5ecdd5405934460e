"""Qwen 3 (dense): per-head norms of queries and keys before rope; upper layers may slide."""

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
    """Pre-norm layers, q/k-normed rotary attention, gated MLP."""
    c = b.config
    c.defaults(head_dim=128)
    heads = Heads.of(b)
    table = rope(c, heads.dim)
    eps = c.number("rms_norm_eps", 1e-6)
    activation = c.choice("hidden_act", ACTIVATIONS, "silu")
    bias = bool(c.get("attention_bias", False))
    slides = upper_layers_slide(b)
    x = b.embed()
    for i, p in b.each_layer():

        def norm(q: Slot, k: Slot, p: str = p) -> None:
            b.rmsnorm(q, f"{p}.self_attn.q_norm.weight", eps, dim=heads.dim, in_place=True)
            b.rmsnorm(k, f"{p}.self_attn.k_norm.weight", eps, dim=heads.dim, in_place=True)

        y = b.rmsnorm(x, f"{p}.input_layernorm.weight", eps)
        window = window_of(b, slides[i])
        y = attention(
            b, y, f"{p}.self_attn", heads, rope=table, window=window, bias=bias, out_bias=bias, norm=norm
        )
        b.add(x, y)
        y = b.rmsnorm(x, f"{p}.post_attention_layernorm.weight", eps)
        b.add(x, gated_mlp(b, y, f"{p}.mlp", activation))
    return head(b, x, lambda r: b.rmsnorm(r, "model.norm.weight", eps))
