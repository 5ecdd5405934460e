"""Draw training text for the demo model from two small published story models.

Run as a file or a module:  sample.py --data DIR --out FILE --teacher stories260k [--minutes N]

Both teachers are Llama-shaped: rmsnorm, rope, grouped-query attention, SwiGLU. Stories are drawn a
few hundred at a time with one key/value cache; finished rows are compacted away. A share of the
stories continues the first sentence of a real training story, because from an empty prompt these
models begin nearly every story the same way.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

try:
    from halfbyte.converter.demo.stories import SEPARATOR, first_sentence, real_stories
except ImportError:  # run as a file, without the package installed
    from stories import SEPARATOR, first_sentence, real_stories  # type: ignore[no-redef]


@dataclass(frozen=True)
class Teacher:
    """One story model: weights as float32 torch tensors, rope in the half-split order.

    `layers[i]` maps att_norm, wq, wk, wv, wo, ffn_norm, w1 (gate), w2 (down), w3 (up) to tensors
    of shape [dim] or [rows, cols].
    """

    heads: int
    kv_heads: int
    context: int
    eps: float
    theta: float
    bos: int
    eos: frozenset[int]
    embedding: Tensor
    final_norm: Tensor
    layers: list[dict[str, Tensor]]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


class ScoredTokenizer:
    """llama2.c's `tokenizer.bin`: pieces with scores, merged best score first."""

    def __init__(self, path: Path, vocab: int) -> None:
        raw = path.read_bytes()
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        at = 4
        for _ in range(vocab):
            score, length = struct.unpack_from("<fi", raw, at)
            self.pieces.append(raw[at + 8 : at + 8 + length])
            self.scores.append(score)
            at += 8 + length
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for char in " " + text:
            piece = char.encode()
            # ids 3..258 are the raw bytes
            ids += [self.ids[piece]] if piece in self.ids else [byte + 3 for byte in piece]
        while True:
            merges = [
                (self.scores[merged], -i, merged)
                for i in range(len(ids) - 1)
                if (merged := self.ids.get(self.pieces[ids[i]] + self.pieces[ids[i + 1]])) is not None
            ]
            if not merges:
                return ids
            _, i, merged = max(merges)
            ids[-i : -i + 2] = [merged]

    def decode(self, ids: list[int]) -> str:
        out = bytearray()
        for i in ids:
            byte = re.fullmatch(rb"<0x([0-9A-F]{2})>", self.pieces[i])
            out += bytes([int(byte[1], 16)]) if byte else self.pieces[i]
        return out.decode("utf-8", errors="replace").strip()


def load_stories260k(folder: Path) -> Teacher:
    """Read the llama2.c legacy file: seven int32, then float32 tensors in a fixed order."""
    import numpy as np
    import torch

    raw = (folder / "stories260K.legacy_f32.bin").read_bytes()
    dim, hidden, depth, heads, kv_heads, vocab, context = struct.unpack_from("<7i", raw)
    values = torch.from_numpy(np.frombuffer(raw, "<f4", offset=28).copy())
    head_dim, at = dim // heads, 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        count = int(np.prod(shape))
        at += count
        return values[at - count : at].reshape(shape)

    def half_split(weights: Tensor, n: int) -> Tensor:
        # llama2.c rotates neighbouring pairs; move pair members head_dim/2 apart
        return (
            weights.reshape(depth, n, head_dim // 2, 2, dim).transpose(2, 3).reshape(depth, n * head_dim, dim)
        )

    embedding = take(vocab, dim)
    stacks = {"att_norm": take(depth, dim), "wq": half_split(take(depth, dim, dim), heads)}
    stacks["wk"] = half_split(take(depth, kv_heads * head_dim, dim), kv_heads)
    stacks["wv"] = take(depth, kv_heads * head_dim, dim)
    stacks["wo"] = take(depth, dim, dim)
    stacks["ffn_norm"] = take(depth, dim)
    stacks["w1"] = take(depth, hidden, dim)
    stacks["w2"] = take(depth, dim, hidden)
    stacks["w3"] = take(depth, hidden, dim)
    layers = [{name: stack[i].contiguous() for name, stack in stacks.items()} for i in range(depth)]
    tokens = ScoredTokenizer(folder / "tok512.bin", vocab)
    # llama2.c ends a story with either of its two markers
    eos = frozenset({1, 2})
    return Teacher(
        heads,
        kv_heads,
        context,
        1e-5,
        10000.0,
        1,
        eos,
        embedding,
        take(dim),
        layers,
        tokens.encode,
        tokens.decode,
    )


def load_tinystories656k(folder: Path) -> Teacher:
    """Read the Hugging Face folder; its only embedding is stored as lm_head.weight."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    names = {
        "att_norm": "input_layernorm",
        "wq": "self_attn.q_proj",
        "wk": "self_attn.k_proj",
        "wv": "self_attn.v_proj",
        "wo": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "w1": "mlp.gate_proj",
        "w2": "mlp.down_proj",
        "w3": "mlp.up_proj",
    }
    layers = [
        {ours: weights[f"model.layers.{i}.{theirs}.weight"].float() for ours, theirs in names.items()}
        for i in range(config["num_hidden_layers"])
    ]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Teacher(
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["max_position_embeddings"],
        config["rms_norm_eps"],
        config["rope_theta"],
        config["bos_token_id"],
        # this model spells its end marker out in ordinary pieces; "<|" opens nothing else
        frozenset({config["eos_token_id"], config["bos_token_id"], 0, tokenizer.token_to_id("<|") or 0}),
        weights["lm_head.weight"].float(),
        weights["model.norm.weight"].float(),
        layers,
        # its pieces end with the space that follows a word
        lambda text: tokenizer.encode(text + " ", add_special_tokens=False).ids,
        lambda ids: tokenizer.decode(ids).strip(),
    )


TEACHERS = {
    "stories260k": (load_stories260k, "stories260K"),
    "tinystories656k": (load_tinystories656k, "tinystories-656k"),
}


class Cache:
    """Keys and values of one batch, [layers, batch, kv_heads, context, head_dim] each."""

    def __init__(self, teacher: Teacher, batch: int) -> None:
        import torch

        head_dim = teacher.embedding.shape[1] // teacher.heads
        shape = (len(teacher.layers), batch, teacher.kv_heads, teacher.context, head_dim)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)

    def keep(self, rows: Tensor, filled: int) -> None:
        """Drop every batch row that is not in `rows` (int64 [n], ascending)."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old[:, : len(rows)]
            new[:, :, :, :filled] = old[:, rows, :, :filled]
            setattr(self, name, new)


def step(teacher: Teacher, cache: Cache, tokens: Tensor, position: int) -> Tensor:
    """One token of every row: tokens int64 [batch], all at `position`; returns logits [batch, vocab]."""
    import torch
    from torch.nn.functional import rms_norm, silu

    batch, head_dim = len(tokens), cache.keys.shape[-1]
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    angle = position * teacher.theta ** (-2 * pairs / head_dim)
    cos, sin = angle.cos(), angle.sin()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], weight, teacher.eps)

    def rope(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

    x = teacher.embedding[tokens]
    for i, w in enumerate(teacher.layers):
        h = norm(x, w["att_norm"])
        q = rope((h @ w["wq"].T).view(batch, teacher.kv_heads, -1, head_dim))
        cache.keys[i, :, :, position] = rope((h @ w["wk"].T).view(batch, teacher.kv_heads, head_dim))
        cache.values[i, :, :, position] = (h @ w["wv"].T).view(batch, teacher.kv_heads, head_dim)
        keys, values = cache.keys[i, :, :, : position + 1], cache.values[i, :, :, : position + 1]
        weights = torch.softmax(q @ keys.transpose(-1, -2) * head_dim**-0.5, dim=-1)
        x = x + (weights @ values).reshape(batch, -1) @ w["wo"].T
        h = norm(x, w["ffn_norm"])
        x = x + (silu(h @ w["w1"].T) * (h @ w["w3"].T)) @ w["w2"].T
    return norm(x, teacher.final_norm) @ teacher.embedding.T


def sample_batch(
    teacher: Teacher, prompts: list[str], temperature: float, min_p: float, generator: Any
) -> tuple[list[str], int]:
    """Continue every prompt until its story ends; returns (finished stories, tokens computed).

    A story that reaches the end of the context unfinished is dropped. `min_p` removes the tokens
    less likely than that share of the likeliest one.
    """
    import torch

    rows = [[teacher.bos, *(teacher.encode(p) if p else [])] for p in prompts]
    forced = max(len(row) for row in rows)
    open_ = [True] * len(rows)
    stories: list[str] = []
    cache, computed = Cache(teacher, len(rows)), 0
    for position in range(teacher.context - 1):
        logits = step(teacher, cache, torch.tensor([row[position] for row in rows]), position)
        computed += len(rows)
        probabilities = torch.softmax(logits / temperature, dim=-1)
        probabilities[probabilities < min_p * probabilities.amax(-1, keepdim=True)] = 0
        noise = torch.empty_like(probabilities).exponential_(generator=generator)
        picked = (probabilities / noise).argmax(-1).tolist()
        for i, (row, token) in enumerate(zip(rows, picked)):
            if len(row) > position + 1:  # still inside its prompt
                continue
            if open_[i] and token in teacher.eos:
                stories.append(teacher.decode(row[1:]))
                open_[i] = False
            row.append(token)
        alive = [i for i, unfinished in enumerate(open_) if unfinished]
        if len(alive) < 0.85 * len(rows):  # copying the cache costs about one step
            rows, open_ = [rows[i] for i in alive], [True] * len(alive)
            cache.keep(torch.tensor(alive, dtype=torch.int64), position + 1)
        # the long tail keeps few rows busy and would mostly run into the end of the context
        if len(alive) < len(prompts) // 16 and position > forced:
            break
    return stories, computed


def bits_per_character(teacher: Teacher, stories: list[str]) -> float:
    """Mean bits a character of `stories`, each scored alone after the start marker; its end is not scored.

    A story longer than the context is cut there, in tokens and in characters.
    """
    import torch

    rows = [[teacher.bos, *teacher.encode(story)][: teacher.context] for story in stories]
    cache, nats = Cache(teacher, len(rows)), 0.0
    with torch.inference_mode():
        for position in range(max(map(len, rows)) - 1):
            tokens = torch.tensor([row[min(position, len(row) - 1)] for row in rows])
            scores = step(teacher, cache, tokens, position).log_softmax(-1)
            nats -= sum(
                float(scores[i, row[position + 1]]) for i, row in enumerate(rows) if position + 1 < len(row)
            )
    return nats / math.log(2) / sum(len(teacher.decode(row[1:])) for row in rows)


def draw(
    name: str,
    data: Path,
    out: Path,
    *,
    minutes: float,
    seed: int = 0,
    batch: int = 384,
    temperature: float = 0.75,
    min_p: float = 0.03,
    prompted: float = 0.5,
) -> None:
    """Write about `minutes` of stories by teacher `name` to `out`, each followed by a separator line."""
    import torch

    load, folder = TEACHERS[name]
    teacher = load(data / folder)
    openings = [s for s in map(first_sentence, real_stories(data)[0]) if s]
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    begun, tokens, count = time.monotonic(), 0, 0
    with out.open("w", encoding="utf-8") as file, torch.inference_mode():
        while time.monotonic() - begun < minutes * 60:
            prompts = [choose.choice(openings) if choose.random() < prompted else "" for _ in range(batch)]
            stories, computed = sample_batch(teacher, prompts, temperature, min_p, generator)
            for story in stories:
                file.write(f"{story}\n{SEPARATOR}\n")
            file.flush()
            tokens, count = tokens + computed, count + len(stories)
            rate = tokens / (time.monotonic() - begun)
            print(
                f"{name}: {count} stories, {file.tell()} bytes, {tokens} tokens, {rate:.0f} tokens/s",
                flush=True,
            )


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the teachers and text/tinystories.txt"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="text file, stories separated by " + SEPARATOR
    )
    parser.add_argument("--teacher", choices=sorted(TEACHERS), required=True)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--batch", type=int, default=384)
    parser.add_argument("--temperature", type=float, default=0.75)
    parser.add_argument("--min-p", type=float, default=0.03)
    parser.add_argument(
        "--prompted", type=float, default=0.5, help="share that continues a real first sentence"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    options = {k: v for k, v in vars(args).items() if k not in ("data", "out", "teacher")}
    draw(args.teacher, args.data, args.out, **options)


if __name__ == "__main__":
    main()
