"""A model made by hand that needs its context: it finds what followed the same token before, and says it again.

    python benchmarks/induction.py OUT.hb [--recipe f16] [--context 32768]

Two layers of a Llama with one head of 64 channels and no trained weight. The first layer looks at the position
before: its keys are the same everywhere, its queries too, only turned back by one step of the rotary embedding, so
the score of distance n is sum_i cos(theta_i * (n - 1)). The second layer compares this token with what stood before
each token, in channels that the rotary embedding does not turn (its base is 10^18), and copies the token found.
Olsson et al., arXiv 2209.11895, describe such heads in trained models.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

import halfbyte

CODE, HEAD, HIDDEN = 40, 64, 128  # channels of a token's code, of the head, of the residual stream
PAIRS = HEAD // 2
TURNING = 5  # pairs of channels that say where a key stands
BASE = 1e18
MARGIN = 25.0  # nats by which the position before wins over every other one
MATCH = 60.0  # scores of equal codes in the second layer, and logits of the token found
# Parts of the stream: this token's code, that of the token before, that of the token found, and a constant.
TOKEN, BEFORE, FOUND = (slice(a, a + CODE) for a in (0, CODE, 2 * CODE))
ONE = 3 * CODE


def write_checkpoint(folder: Path, vocab: int = 16384, context: int = 32768, seed: int = 0) -> Path:
    """A Hugging Face folder of the model. Ids are 0..vocab-1; there is no tokenizer."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    codes = rng.choice([-1.0, 1.0], (vocab, CODE))
    embedding = np.zeros((vocab, HIDDEN))
    embedding[:, TOKEN], embedding[:, ONE] = codes, 1.0
    still = np.r_[PAIRS - CODE // 2 : PAIRS, HEAD - CODE // 2 : HEAD]  # channels that hardly turn

    theta = BASE ** (-np.arange(TURNING) / PAIRS)
    score = np.cos(theta * (np.arange(context) - 1.0)[:, None]).sum(1)
    weight = MARGIN / (score[1] - np.delete(score, 1).max()) * np.sqrt(HEAD)
    rms = [np.sqrt((CODE * n + 1) / HIDDEN) for n in (1, 2, 3)]  # of the stream before each norm

    def zeros(rows: int, cols: int) -> np.ndarray:
        return np.zeros((rows, cols))

    def copy(
        rows: slice | np.ndarray, cols: slice | np.ndarray, shape: tuple[int, int], by: float
    ) -> np.ndarray:
        matrix = zeros(*shape)
        matrix[np.arange(shape[0])[rows], np.arange(shape[1])[cols]] = by
        return matrix

    query, key = zeros(HEAD, HIDDEN), zeros(HEAD, HIDDEN)
    turn = np.arange(TURNING)
    query[turn, ONE] = np.cos(theta) * np.sqrt(weight) * rms[0]
    query[turn + PAIRS, ONE] = -np.sin(theta) * np.sqrt(weight) * rms[0]
    key[turn, ONE] = np.sqrt(weight) * rms[0]
    match = np.sqrt(MATCH / CODE * np.sqrt(HEAD)) * rms[1]
    into, out = (HEAD, HIDDEN), (HIDDEN, HEAD)
    layers = [
        (query, key, copy(still, TOKEN, into, rms[0]), copy(BEFORE, still, out, 1.0)),
        (
            copy(still, TOKEN, into, match),
            copy(still, BEFORE, into, match),
            copy(still, TOKEN, into, rms[1]),
            copy(FOUND, still, out, 1.0),
        ),
    ]
    head = zeros(vocab, HIDDEN)
    head[:, FOUND] = codes * (MATCH / CODE * rms[2])
    weights = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": head,
        "model.norm.weight": np.ones(HIDDEN),
    }
    for i, matrices in enumerate(layers):
        p = f"model.layers.{i}"
        for name, matrix in zip("qkvo", matrices):
            weights[f"{p}.self_attn.{name}_proj.weight"] = matrix
        for name, shape in (("gate", (32, HIDDEN)), ("up", (32, HIDDEN)), ("down", (HIDDEN, 32))):
            weights[f"{p}.mlp.{name}_proj.weight"] = zeros(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{p}.{name}.weight"] = np.ones(HIDDEN)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": HEAD,
        "max_position_embeddings": context,
        "rope_theta": BASE,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {k: np.ascontiguousarray(v, np.float32) for k, v in weights.items()}, folder / "model.safetensors"
    )
    return folder


def make(out: Path, recipe: str = "f16", vocab: int = 16384, context: int = 32768) -> Path:
    """The model as a `.hb` file."""
    with tempfile.TemporaryDirectory() as folder:
        halfbyte.convert(str(write_checkpoint(Path(folder), vocab, context)), str(out), recipe=recipe)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", default="f16")
    parser.add_argument("--context", type=int, default=32768)
    args = parser.parse_args()
    print(make(args.out, args.recipe, max(1024, args.context // 2), args.context))
