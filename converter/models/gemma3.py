"""Gemma 3 (text): five local layers to one global, a rope base for each kind, normed queries and keys."""

from __future__ import annotations

from halfbyte.converter.blocks import (
    ACTIVATIONS,
    FULL,
    SLIDING,
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
    c.defaults(rope_theta=1e6, rope_local_base_freq=1e4, head_dim=256, sliding_window=4096)
    c.defaults(tie_word_embeddings=True)  # published text configs omit all of these
    heads = Heads.of(b)
    tables = {True: rope(c, heads.dim, SLIDING), False: rope(c, heads.dim, FULL)}
    eps = c.number("rms_norm_eps", 1e-6)
    activation = c.choice(
        "hidden_activation", ACTIVATIONS, c.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh")
    )
    scale = c.number("query_pre_attn_scalar", 256) ** -0.5
    final_cap = c.number("final_logit_softcapping", 0.0)
    pattern = c.integer("sliding_window_pattern", c.integer("_sliding_window_pattern", 6))
    slides = sliding_layers(b, lambda i: (i + 1) % pattern != 0)
    bias = bool(c.get("attention_bias", False))

    def rms(x: Slot, name: str) -> Slot:
        return b.rmsnorm(x, name, eps, plus_one=True)

    x = b.unary(b.embed(), "scale", b.hidden**0.5)
    for i, p in b.each_layer():

        def norm(q: Slot, k: Slot, p: str = p) -> None:
            for s, name in ((q, "q_norm"), (k, "k_norm")):
                b.rmsnorm(s, f"{p}.self_attn.{name}.weight", eps, dim=heads.dim, plus_one=True, in_place=True)

        slide = slides[i]
        y = attention(
            b, rms(x, f"{p}.input_layernorm.weight"), f"{p}.self_attn", heads, rope=tables[slide], scale=scale,
            window=window_of(b, slide), bias=bias, out_bias=bias, norm=norm,
        )  # fmt: skip
        b.add(x, rms(y, f"{p}.post_attention_layernorm.weight"))
        y = gated_mlp(b, rms(x, f"{p}.pre_feedforward_layernorm.weight"), f"{p}.mlp", activation)
        b.add(x, rms(y, f"{p}.post_feedforward_layernorm.weight"))
    logits = head(b, x, lambda r: rms(r, "model.norm.weight"))
    return b.unary(logits, "softcap", final_cap) if final_cap else logits
