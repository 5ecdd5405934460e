"""The demo model itself: its shape, its tokenizer, its forward pass, scoring and continuing text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

BOS, EOS = 1, 2
SPECIALS = ["<unk>", "<s>", "</s>"]


@dataclass(frozen=True)
class Shape:
    """The student's sizes. Every width is a multiple of 32, the weight group."""

    vocab: int = 2048
    dim: int = 192
    layers: int = 5
    heads: int = 6
    kv_heads: int = 2
    ffn: int = 352
    context: int = 512
    theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def build_tokenizer(stories: Sequence[str], vocab: int) -> Any:
    """A byte-level BPE of `vocab` tokens that puts <s> in front of a text; any input encodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


class Student:
    """A Llama with its weights in one dict under Hugging Face names; matrices are [rows, cols]."""

    def __init__(self, shape: Shape, seed: int) -> None:
        import torch

        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        kv = shape.kv_heads * shape.head_dim
        sizes = {"model.embed_tokens.weight": (shape.vocab, shape.dim), "model.norm.weight": (shape.dim,)}
        for i in range(shape.layers):
            at = f"model.layers.{i}."
            sizes[at + "input_layernorm.weight"] = (shape.dim,)
            sizes[at + "self_attn.q_proj.weight"] = (shape.dim, shape.dim)
            sizes[at + "self_attn.k_proj.weight"] = (kv, shape.dim)
            sizes[at + "self_attn.v_proj.weight"] = (kv, shape.dim)
            sizes[at + "self_attn.o_proj.weight"] = (shape.dim, shape.dim)
            sizes[at + "post_attention_layernorm.weight"] = (shape.dim,)
            sizes[at + "mlp.gate_proj.weight"] = (shape.ffn, shape.dim)
            sizes[at + "mlp.up_proj.weight"] = (shape.ffn, shape.dim)
            sizes[at + "mlp.down_proj.weight"] = (shape.dim, shape.ffn)
        self.weights: dict[str, Tensor] = {}
        for name, size in sizes.items():
            if len(size) == 1:
                weight = torch.ones(size)
            else:
                # what a layer adds to the residual stream starts smaller with depth
                std = 0.02 if "embed" in name else size[1] ** -0.5
                std *= (2 * shape.layers) ** -0.5 if "o_proj" in name or "down_proj" in name else 1.0
                weight = torch.randn(size, generator=generator) * std
            self.weights[name] = weight.requires_grad_()

    def logits(self, ids: Tensor, *, fast: bool = False) -> Tensor:
        """ids int64 [batch, T] -> float32 [batch, T, vocab]; `fast` multiplies in bfloat16."""
        import torch
        from torch.nn.functional import embedding, linear, rms_norm, silu

        shape, dtype = self.shape, torch.bfloat16 if fast else torch.float32
        batch, length = ids.shape
        pairs = torch.arange(shape.head_dim // 2) * (-2.0 / shape.head_dim)
        angles = torch.outer(torch.arange(length).float(), shape.theta**pairs)
        cos, sin = angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype)
        mask = torch.full((length, length), -torch.inf, dtype=dtype).triu(1)

        def times(x: Tensor, name: str) -> Tensor:
            return linear(x, self.weights[name].to(dtype))

        def norm(x: Tensor, name: str) -> Tensor:
            return rms_norm(x, (shape.dim,), self.weights[name], shape.eps).to(dtype)

        def split(x: Tensor, heads: int) -> Tensor:
            return x.view(batch, length, heads, shape.head_dim)

        def rope(x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

        x = embedding(ids, self.weights["model.embed_tokens.weight"])
        for i in range(shape.layers):
            at = f"model.layers.{i}."
            h = norm(x, at + "input_layernorm.weight")
            q = rope(split(times(h, at + "self_attn.q_proj.weight"), shape.heads)).transpose(1, 2)
            k = rope(split(times(h, at + "self_attn.k_proj.weight"), shape.kv_heads)).transpose(1, 2)
            v = split(times(h, at + "self_attn.v_proj.weight"), shape.kv_heads).transpose(1, 2)
            # the query heads of one kv head stand one under the other: one product serves them all
            q = q.reshape(batch, shape.kv_heads, -1, shape.head_dim) * shape.head_dim**-0.5
            scores = (q @ k.transpose(-1, -2)).view(batch, shape.heads, length, length) + mask
            mixed = scores.softmax(-1).view(batch, shape.kv_heads, -1, length) @ v
            mixed = mixed.view(batch, shape.heads, length, shape.head_dim).transpose(1, 2)
            x = x + times(mixed.reshape(batch, length, -1), at + "self_attn.o_proj.weight")
            h = norm(x, at + "post_attention_layernorm.weight")
            gate = silu(times(h, at + "mlp.gate_proj.weight"))
            x = x + times(gate * times(h, at + "mlp.up_proj.weight"), at + "mlp.down_proj.weight")
        return times(norm(x, "model.norm.weight"), "model.embed_tokens.weight").float()

    def rounded(self) -> Student:
        """A copy whose weights went through bfloat16, as the exported file holds them."""
        import torch

        copy = Student(self.shape, 0)
        copy.weights = {k: w.detach().to(torch.bfloat16).float() for k, w in self.weights.items()}
        return copy


def held_out_loss(student: Student, rows: Sequence[Sequence[int]]) -> tuple[float, int]:
    """(summed negative log likelihood in nats, tokens) of rows that begin with <s>, in float32.

    Every row is scored alone and cut at the context; <s> is given, </s> is not scored.
    """
    import torch
    from torch.nn.functional import cross_entropy

    total, count = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row[: student.shape.context]])
            logits = student.logits(ids[:, :-1])
            total += cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    return total, count


def continue_text(
    student: Student, tokenizer: Any, prompt: str, temperature: float, seed: int, limit: int = 220
) -> str:
    """`prompt` and its continuation up to </s> or `limit` tokens; temperature 0 is greedy."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt).ids
    with torch.inference_mode():
        while len(ids) < limit:
            logits = student.logits(torch.tensor([ids]))[0, -1]
            if temperature:
                odds = (logits / temperature).softmax(-1)
                token = int(torch.multinomial(odds, 1, generator=generator))
            else:
                token = int(logits.argmax())
            if token == EOS:
                break
            ids.append(token)
    return tokenizer.decode(ids, skip_special_tokens=True)
