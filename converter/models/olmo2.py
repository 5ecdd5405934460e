"""OLMo 2: norms after each half instead of before, queries and keys normed over their full width."""

from __future__ import annotations

from halfbyte.converter.blocks import ACTIVATIONS, Heads, attention, gated_mlp, head
from halfbyte.converter.builder import Builder, Slot
from halfbyte.converter.rope import rope


def build(b: Builder) -> Slot:
    """Post-norm layers, q/k-normed rotary attention, gated MLP."""
    c = b.config
    heads = Heads.of(b)
    table = rope(c, heads.dim)
    eps = c.number("rms_norm_eps", 1e-5)
    activation = c.choice("hidden_act", ACTIVATIONS, "silu")
    bias = bool(c.get("attention_bias", False))
    x = b.embed()
    for _, p in b.each_layer():

        def norm(q: Slot, k: Slot, p: str = p) -> None:
            b.rmsnorm(q, f"{p}.self_attn.q_norm.weight", eps, in_place=True)
            b.rmsnorm(k, f"{p}.self_attn.k_norm.weight", eps, in_place=True)

        y = attention(b, x, f"{p}.self_attn", heads, rope=table, bias=bias, out_bias=bias, norm=norm)
        b.add(x, b.rmsnorm(y, f"{p}.post_attention_layernorm.weight", eps))
        y = gated_mlp(b, x, f"{p}.mlp", activation)
        b.add(x, b.rmsnorm(y, f"{p}.post_feedforward_layernorm.weight", eps))
    return head(b, x, lambda r: b.rmsnorm(r, "model.norm.weight", eps))
