"""Mistral 7B, Ministral and Mistral Nemo: Llama with a sliding window on every layer, where it is set."""

from __future__ import annotations

from halfbyte.converter.blocks import ACTIVATIONS, Heads, attention, gated_mlp, head, window_of
from halfbyte.converter.builder import Builder, Slot
from halfbyte.converter.rope import rope


def build(b: Builder) -> Slot:
    """Pre-norm layers, rotary sliding-window attention, gated MLP, no biases."""
    c = b.config
    c.defaults(sliding_window=4096)  # as in the first release; later configs say null
    heads = Heads.of(b)
    table = rope(c, heads.dim)
    eps = c.number("rms_norm_eps", 1e-6)
    activation = c.choice("hidden_act", ACTIVATIONS, "silu")
    x = b.embed()
    for _, p in b.each_layer():
        y = b.rmsnorm(x, f"{p}.input_layernorm.weight", eps)
        window = window_of(b, True)
        b.add(x, attention(b, y, f"{p}.self_attn", heads, rope=table, window=window))
        y = b.rmsnorm(x, f"{p}.post_attention_layernorm.weight", eps)
        b.add(x, gated_mlp(b, y, f"{p}.mlp", activation))
    return head(b, x, lambda r: b.rmsnorm(r, "model.norm.weight", eps))
