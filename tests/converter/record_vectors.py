"""Record logits of tiny seeded `transformers` models under `vectors/`; run by hand, never by the tests.

    python -m venv venv && venv/bin/pip install torch transformers safetensors numpy
    venv/bin/python tests/converter/record_vectors.py [CASE ...]

Each case is read by `transformers` from a folder on disk, once with the classic config.json of published
checkpoints and once with the one that transformers 5 saves; both must give the same bits. Every config key
listed under a case's `matters`, and every tensor, must change the logits, so that no vector is blind to it.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny import VECTORS, norm_mean, tiny_weights, weights_sha256, write_folder
from transformers import AutoConfig, AutoModelForCausalLM

Config = dict[str, Any]
SEED = 7
PROMPT, DECODE = 24, 6
CACHE_TOLERANCE = 1e-4  # largest difference of a cached step from the full forward, in logit deviations
LEAST_CHANGE = 0.01  # smallest RMS change, in logit deviations, when a key or a tensor is changed


def base(model_type: str, architecture: str, **keys: Any) -> Config:
    """A published checkpoint's usual keys at tiny sizes; a key given as `...` is left out."""
    config: Config = {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "model_type": model_type,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 0.01,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.46.0",
        "use_cache": True,
        "vocab_size": 160,
    }
    config.update(keys)
    return {key: value for key, value in config.items() if value is not ...}


def llama(**keys: Any) -> Config:
    return base("llama", "LlamaForCausalLM", **{"attention_bias": False, "mlp_bias": False, **keys})


def mistral(**keys: Any) -> Config:
    return base("mistral", "MistralForCausalLM", **{"rope_scaling": ..., **keys})


def qwen2(**keys: Any) -> Config:
    # A window that use_sliding_window false switches off, as all published ones are.
    window = {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 2}
    return base("qwen2", "Qwen2ForCausalLM", **{"rope_scaling": ..., **window, **keys})


def qwen3(**keys: Any) -> Config:
    window = {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 3}
    return base("qwen3", "Qwen3ForCausalLM", **{"attention_bias": False, "head_dim": 32, **window, **keys})


def gemma(model_type: str, architecture: str, **keys: Any) -> Config:
    own: Config = {
        "attention_bias": False,
        "cache_implementation": "hybrid",
        "hidden_act": ...,
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 24,
        "rms_norm_eps": 0.1,
        "rope_scaling": ...,
        "sliding_window": 8,
        "tie_word_embeddings": ...,
    }
    return base(model_type, architecture, **{**own, **keys})


def gemma2(**keys: Any) -> Config:
    return gemma("gemma2", "Gemma2ForCausalLM", **keys)


def gemma3(**keys: Any) -> Config:
    return gemma("gemma3_text", "Gemma3ForCausalLM", **keys)


def phi3(**keys: Any) -> Config:
    own: Config = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "original_max_position_embeddings": 128}
    own |= {"sliding_window": None, "num_key_value_heads": 4}
    return base("phi3", "Phi3ForCausalLM", **{**own, **keys})


def smollm3(**keys: Any) -> Config:
    own: Config = {
        "attention_bias": False,
        "mlp_bias": False,
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "no_rope_layer_interval": 4,
        "rope_theta": 5000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * 4,
        "tie_word_embeddings": True,
    }
    return base("smollm3", "SmolLM3ForCausalLM", **{**own, **keys})


def olmo2(**keys: Any) -> Config:
    return base("olmo2", "Olmo2ForCausalLM", **{"attention_bias": False, "intermediate_size": 88, **keys})


def granite(**keys: Any) -> Config:
    own: Config = {
        "attention_bias": False,
        "mlp_bias": False,
        "attention_multiplier": 0.15,
        "embedding_multiplier": 4.0,
        "logits_scaling": 2.5,
        "residual_multiplier": 0.7,
        "tie_word_embeddings": True,
    }
    return base("granite", "GraniteForCausalLM", **{**own, **keys})


LLAMA3: Config = {"factor": 8.0, "high_freq_factor": 2.0, "low_freq_factor": 1.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_type": "llama3"}
YARN: Config = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARN_OPTIONS: Config = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARN_OPTIONS |= {"beta_fast": 2.0, "beta_slow": 0.25, "attention_factor": 1.3, "truncate": False}
LONGROPE: Config = {"type": "longrope", "short_factor": [1.0, 1.25, 1.5, 2.0, 2.5, 3.0]}
LONGROPE |= {"long_factor": [1.5, 2.5, 4.0, 5.0, 6.0, 8.0]}
PHI4_MINI: Config = {"partial_rotary_factor": 0.75, "rope_scaling": LONGROPE, "rope_theta": 500.0}
PHI4_MINI |= {"original_max_position_embeddings": 16, "max_position_embeddings": 64, "num_key_value_heads": 2}
PHI4_MINI |= {"sliding_window": 262144, "tie_word_embeddings": True}
LINEAR: Config = {"type": "linear", "factor": 4.0}


def each(**keys: Any) -> list[Config]:
    """One config change a key; a tuple of values gives one change a value."""
    return [
        {k: v} for k, values in keys.items() for v in (values if isinstance(values, tuple) else (values,))
    ]


def each_rope(scaling: Config, **keys: Any) -> list[Config]:
    """The same within rope_scaling, and without it altogether."""
    return [{"rope_scaling": {**scaling, **change}} for change in each(**keys)] + [{"rope_scaling": None}]


# Name, config, and config changes that must be visible in the logits.
CASES: dict[str, tuple[Config, list[Config]]] = {
    "llama-plain": (llama(intermediate_size=88), each(rms_norm_eps=1e-5, rope_theta=500.0)),
    # What the first checkpoints say: heads, base, ties and biases are left to their defaults.
    "llama-minimal": (
        base(
            "llama",
            "LlamaForCausalLM",
            num_key_value_heads=...,
            rope_theta=...,
            tie_word_embeddings=...,
        ),
        each(rope_theta=500.0, hidden_act="gelu"),
    ),
    "llama-tied": (llama(tie_word_embeddings=True), []),
    "llama-bias": (llama(attention_bias=True, mlp_bias=True), []),
    "llama-llama3rope": (
        llama(rope_scaling=LLAMA3, rope_theta=500.0, head_dim=32, tie_word_embeddings=True),
        each_rope(
            LLAMA3, factor=3.0, high_freq_factor=3.0, low_freq_factor=1.5, original_max_position_embeddings=32
        ),
    ),
    "llama-linear": (llama(rope_scaling=LINEAR), each_rope(LINEAR, factor=2.0)),
    "llama-yarn": (
        llama(rope_scaling=YARN, rope_theta=50.0, head_dim=32),
        each_rope(YARN, attention_factor=1.0, original_max_position_embeddings=32, truncate=False),
    ),
    "llama-yarn-options": (
        llama(rope_scaling=YARN_OPTIONS, rope_theta=50.0, head_dim=32),
        each_rope(YARN_OPTIONS, beta_fast=32.0, beta_slow=1.0, attention_factor=1.0, truncate=True),
    ),
    "mistral-window": (mistral(sliding_window=8), each(sliding_window=(None, 7, 9))),
    "mistral-full": (
        mistral(sliding_window=None, head_dim=32, intermediate_size=88),
        each(sliding_window=8),
    ),
    "qwen2-plain": (qwen2(tie_word_embeddings=True, num_hidden_layers=4), each(use_sliding_window=True)),
    "qwen2-window": (
        qwen2(use_sliding_window=True, num_hidden_layers=4, intermediate_size=88),
        each(use_sliding_window=False, max_window_layers=(1, 3), sliding_window=9),
    ),
    "qwen3-plain": (qwen3(tie_word_embeddings=True), each(rms_norm_eps=1e-5)),
    "qwen3-yarn-bias": (
        qwen3(attention_bias=True, rope_scaling=YARN, rope_theta=50.0, intermediate_size=88),
        each_rope(YARN, factor=2.0),
    ),
    "gemma2-plain": (
        gemma2(hidden_act="gelu_pytorch_tanh", attn_logit_softcapping=4.0, final_logit_softcapping=6.0),
        each(
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            query_pre_attn_scalar=32,
            sliding_window=(9, 128),
            hidden_activation="silu",
            rms_norm_eps=1e-5,
        ),
    ),
    "gemma2-nocaps": (
        gemma2(num_hidden_layers=3, attn_logit_softcapping=None, final_logit_softcapping=None),
        each(attn_logit_softcapping=4.0, final_logit_softcapping=30.0),
    ),
    "gemma3-plain": (
        gemma3(
            num_key_value_heads=1,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
            rope_theta=1000000.0,
            rope_local_base_freq=100.0,
            sliding_window_pattern=3,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
        ),
        each(
            rope_scaling=None,
            rope_theta=1000.0,
            rope_local_base_freq=10000.0,
            sliding_window_pattern=2,
            sliding_window=9,
            query_pre_attn_scalar=32,
        ),
    ),
    # The pattern and both bases at their defaults (layers 0-4 local, layer 5 global). transformers ignores
    # gemma3's attention softcap, so this vector holds a reader to that.
    "gemma3-defaults": (
        gemma3(
            num_hidden_layers=6,
            rope_theta=...,
            head_dim=16,
            attn_logit_softcapping=4.0,
            final_logit_softcapping=6.0,
        ),
        each(
            rope_theta=1000.0,
            rope_local_base_freq=100.0,
            sliding_window_pattern=4,
            final_logit_softcapping=None,
        ),
    ),
    "phi3-plain": (phi3(), each(sliding_window=8)),
    "phi3-window": (phi3(sliding_window=8, num_key_value_heads=2), each(sliding_window=(None, 9))),
    "phi3-partial": (
        phi3(partial_rotary_factor=0.75, num_key_value_heads=2, intermediate_size=88),
        each(partial_rotary_factor=(0.5, 1.0)),
    ),
    # Every position within the original length: the short factors. 10 + 6 ids is exactly that length.
    "phi3-longrope-short": (
        phi3(**PHI4_MINI),
        each_rope(LONGROPE, short_factor=[1.0] * 6) + each(max_position_embeddings=16),
    ),
    # Longer than the original length from the first forward pass on: the long factors for every position.
    "phi3-longrope-long": (
        phi3(**PHI4_MINI),
        each_rope(LONGROPE, long_factor=[1.0] * 6)
        + each(max_position_embeddings=16, original_max_position_embeddings=32),
    ),
    "smollm3-plain": (smollm3(), each(no_rope_layers=([1, 1, 1, 1], [0, 1, 1, 1]))),
    "smollm3-interval": (
        smollm3(
            no_rope_layers=...,
            layer_types=...,
            no_rope_layer_interval=2,
            num_hidden_layers=3,
            tie_word_embeddings=...,
            use_sliding_window=True,
            sliding_window=8,
        ),
        each(no_rope_layer_interval=3, use_sliding_window=False, sliding_window=9),
    ),
    "olmo2-plain": (olmo2(), each(rms_norm_eps=1e-5)),
    "olmo2-mha": (olmo2(num_key_value_heads=4, rope_theta=500.0), each(rope_theta=10000.0)),
    "granite-plain": (
        granite(),
        each(attention_multiplier=1.0, embedding_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0),
    ),
    "granite-bias": (granite(attention_bias=True, mlp_bias=True, tie_word_embeddings=False), []),
}
PROMPT_LENGTHS = {"phi3-longrope-short": 10}


def load_model(folder: Path) -> torch.nn.Module:
    """A float32 model with eager attention from `folder`; fails on missing or unexpected keys."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    left = {key: value for key, value in info.items() if value}
    if left:
        raise SystemExit(f"{folder.name}: not a clean load: {left}")
    return model.eval()


def checkpoint_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a saved checkpoint of this config holds."""
    settings = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if settings.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def forward(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """Logits after every id, float32 [T, V], in one pass without a cache."""
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0].numpy()


def prefill_and_decode(model: torch.nn.Module, ids: np.ndarray, prompt: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the prompt in one pass [P, V], then of single-token steps over the model's cache [D, V]."""
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.no_grad():
        out = model(tokens[:, :prompt], use_cache=True)
        logits, steps = out.logits[0].numpy(), []
        for t in range(prompt, len(ids)):
            out = model(tokens[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits[0, 0].numpy())
    return logits, np.stack(steps)


def change(changed: np.ndarray, logits: np.ndarray) -> float:
    """Root mean square of the difference in units of the logits' standard deviation."""
    return float(np.sqrt(np.mean((changed - logits) ** 2)) / logits.std())


def check_sensitivity(folder: Path, config: Config, matters: list[Config], ids: np.ndarray) -> float:
    """Least change of the logits over all listed config changes and all tensors (each rolled by one)."""
    model = load_model(folder)
    logits = forward(model, ids)
    changes: dict[str, float] = {}
    for override in matters:
        (folder / "config.json").write_text(json.dumps({**config, **override}))
        changes[str(override)] = change(forward(load_model(folder), ids), logits)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            kept = parameter.clone()
            parameter.copy_(torch.roll(kept, 1, dims=-1))
            changes[name] = change(forward(model, ids), logits)
            parameter.copy_(kept)
    blind = {key: value for key, value in changes.items() if not value > LEAST_CHANGE}
    if blind:
        raise SystemExit(f"{folder.name}: the logits hardly see {blind}")
    return min(changes.values())


def formatted(document: Config) -> str:
    """JSON with one line a key on the top two levels."""
    parts = []
    for key, value in document.items():
        if isinstance(value, dict):
            lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            parts.append(f" {json.dumps(key)}: {{\n{lines}\n }}")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def record(name: str, scratch: Path) -> None:
    """Record one case and write its json and npz."""
    config, matters = CASES[name]
    shapes = checkpoint_shapes(config)
    folder = write_folder(scratch / name, config, shapes, SEED)
    model = load_model(folder)

    prompt = PROMPT_LENGTHS.get(name, PROMPT)
    stream = np.random.Generator(np.random.PCG64(len(name) + SEED * sum(name.encode())))
    ids = stream.integers(3, config["vocab_size"], prompt + DECODE).astype(np.int32)
    logits, steps = prefill_and_decode(model, ids, prompt)
    whole = forward(model, ids)
    cached = float(np.abs(np.concatenate([logits, steps]) - whole).max() / whole.std())
    if not cached < CACHE_TOLERANCE:
        raise SystemExit(f"{name}: cached decode differs from the full forward by {cached:.2e}")

    saved = scratch / f"{name}-v5"
    model.save_pretrained(saved)
    stored = {key: tensor.shape for key, tensor in load_file(saved / "model.safetensors").items()}
    if stored != shapes:
        raise SystemExit(f"{name}: transformers saves other tensors: {set(stored) ^ set(shapes)}")
    config_v5 = json.loads((saved / "config.json").read_text())
    weights = tiny_weights(shapes, SEED, norm_mean(config))
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    again = np.concatenate(prefill_and_decode(load_model(saved), ids, prompt))
    if not np.array_equal(again, np.concatenate([logits, steps])):
        raise SystemExit(f"{name}: the classic and the saved config give different logits")
    least = check_sensitivity(folder, config, matters, ids)

    document = {
        "name": name,
        "recorded_with": {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]},
        "seed": SEED,
        "prompt": prompt,
        "weights_sha256": weights_sha256(weights),
        "config": config,
        "config_v5": config_v5,
        "shapes": shapes,
    }
    VECTORS.mkdir(exist_ok=True)
    (VECTORS / f"{name}.json").write_text(formatted(document))
    np.savez_compressed(VECTORS / f"{name}.npz", ids=ids, logits=logits, decode_logits=steps)
    size = sum((VECTORS / f"{name}{suffix}").stat().st_size for suffix in (".json", ".npz"))
    top = np.exp(whole - whole.max(-1, keepdims=True))
    print(
        f"{name:22s} {size:6d} bytes  logit std {whole.std():5.2f}  "
        f"mean top p {(top.max(-1) / top.sum(-1)).mean():.2f}  cache {cached:.1e}  least change {least:.3f}",
        flush=True,
    )


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(CASES)
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            record(name, Path(scratch))


if __name__ == "__main__":
    main()
