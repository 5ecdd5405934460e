"""The two halves of a transformer layer that the model files compose.

Each returns the half's output before the residual is added; where norms sit and how the residual is
added is what the model files differ in, and they say so themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from halfbyte.converter.builder import Builder, Slot
from halfbyte.converter.rope import Rope
from halfbyte.formats.errors import CheckpointError

# Names of activation functions in config.json, and ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Heads:
    """Shape of attention: query heads, key/value heads, columns a head."""

    q: int
    kv: int
    dim: int

    @classmethod
    def of(cls, b: Builder) -> Heads:
        """From num_attention_heads, num_key_value_heads and head_dim (default hidden / heads)."""
        q = b.config.integer("num_attention_heads")
        kv = b.config.integer("num_key_value_heads", q)
        dim = b.config.integer("head_dim", b.hidden // q)
        if q % kv:
            raise CheckpointError(f"config.json: {q} heads cannot share {kv} key/value heads")
        return cls(q, kv, dim)


def attention(
    b: Builder,
    x: Slot,
    prefix: str,
    heads: Heads,
    *,
    rope: Rope | None,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    bias: bool = False,
    out_bias: bool = False,
    merged: str | None = None,
    norm: Callable[[Slot, Slot], None] | None = None,
) -> Slot:
    """q, k, v, [norm], [rope], attend, output projection.

    merged names a single qkv matrix; norm(q, k) applies query/key norms in place; rope None is NoPE;
    scale defaults to 1 / sqrt(head_dim).
    """
    nq, nkv = heads.q * heads.dim, heads.kv * heads.dim
    if merged:
        qkv = b.linear(x, [f"{prefix}.{merged}.weight"], [nq + 2 * nkv], b.label(f"{prefix}.qkv"), bias)
    else:
        names = [f"{prefix}.{n}_proj.weight" for n in "qkv"]
        qkv = b.linear(x, names, [nq, nkv, nkv], b.label(f"{prefix}.qkv"), bias)
    q, k, v = qkv.view(0, nq), qkv.view(nq, nkv), qkv.view(nq + nkv, nkv)
    if norm:
        norm(q, k)
    if rope:
        b.rope(qkv.view(0, nq + nkv), rope, heads.dim)  # q and k rotate alike, so one op does both
    scale = heads.dim**-0.5 if scale is None else scale
    y = b.attend(q, k, v, kv_heads=heads.kv, scale=scale, window=window, softcap=softcap)
    return b.linear(y, [f"{prefix}.o_proj.weight"], [b.hidden], b.label(f"{prefix}.o_proj"), out_bias)


def gated_mlp(
    b: Builder, x: Slot, prefix: str, activation: str, *, bias: bool = False, merged: str | None = None
) -> Slot:
    """down(act(gate(x)) * up(x)); merged names a single gate-and-up matrix."""
    n = b.config.integer("intermediate_size")
    if merged:
        both = b.linear(x, [f"{prefix}.{merged}.weight"], [2 * n], b.label(f"{prefix}.gate_up"), bias)
    else:
        names = [f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"]
        both = b.linear(x, names, [n, n], b.label(f"{prefix}.gate_up"), bias)
    y = b.glu(both, activation)
    return b.linear(y, [f"{prefix}.down_proj.weight"], [b.hidden], b.label(f"{prefix}.down_proj"), bias)


def head(b: Builder, x: Slot, norm: Callable[[Slot], Slot]) -> Slot:
    """Pick the wanted rows, norm them, and multiply by the (possibly tied) output embedding."""
    x = norm(b.pick(x))
    tied = bool(b.config.get("tie_word_embeddings", False))
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    return b.linear(x, [name], [b.vocab], "embed" if tied else "lm_head")


def sliding_layers(b: Builder, default: Callable[[int], bool]) -> list[bool]:
    """Which layers slide: `layer_types` where the config has it, else `default(layer)`."""
    types = b.config.per_layer("layer_types", b.layers)
    if types is None:
        return [default(i) for i in range(b.layers)]
    for t in types:
        if t not in (SLIDING, FULL):
            raise CheckpointError(f"config.json: layer type {t!r} is not supported")
    return [t == SLIDING for t in types[: b.layers]]


def upper_layers_slide(b: Builder) -> list[bool]:
    """Qwen's rule: layers from max_window_layers on slide, if use_sliding_window is set at all."""
    first = b.layers
    if b.config.get("use_sliding_window", False):
        first = b.config.integer("max_window_layers", 28, minimum=0)
    return sliding_layers(b, lambda i: i >= first)


def window_of(b: Builder, slides: bool) -> int:
    """The window of a layer; 0 is unbounded."""
    return b.config.integer("sliding_window", 0, minimum=0) if slides else 0
