"""Gemma 2: scaled embedding, norms around both halves, alternating windows, soft caps."""

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
    """Sandwich-normed layers; weights of all norms are stored as w - 1."""
    c = b.config
    c.defaults(head_dim=256, sliding_window=4096, tie_word_embeddings=True)
    c.defaults(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    heads = Heads.of(b)
    table = rope(c, heads.dim)
    eps = c.number("rms_norm_eps", 1e-6)
    activation = c.choice(
        "hidden_activation", ACTIVATIONS, c.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh")
    )
    scale = c.number("query_pre_attn_scalar", 256) ** -0.5
    attention_cap = c.number("attn_logit_softcapping", 0.0)
    final_cap = c.number("final_logit_softcapping", 0.0)
    slides = sliding_layers(b, lambda i: i % 2 == 0)

    def norm(x: Slot, name: str) -> Slot:
        return b.rmsnorm(x, name, eps, plus_one=True)

    x = b.unary(b.embed(), "scale", b.hidden**0.5)
    for i, p in b.each_layer():
        y = norm(x, f"{p}.input_layernorm.weight")
        y = attention(
            b, y, f"{p}.self_attn", heads, rope=table, scale=scale, softcap=attention_cap,
            window=window_of(b, slides[i]), bias=bool(c.get("attention_bias", False)),
            out_bias=bool(c.get("attention_bias", False)),
        )  # fmt: skip
        b.add(x, norm(y, f"{p}.post_attention_layernorm.weight"))
        y = gated_mlp(b, norm(x, f"{p}.pre_feedforward_layernorm.weight"), f"{p}.mlp", activation)
        b.add(x, norm(y, f"{p}.post_feedforward_layernorm.weight"))
    logits = head(b, x, lambda r: norm(r, "model.norm.weight"))
    return b.unary(logits, "softcap", final_cap) if final_cap else logits
