"""Tiny seeded models for tests: weights by formula, Hugging Face folders of them, and the recorded logits.

The weights are never stored. `tiny_weights` makes them from names, shapes and a seed with NumPy alone;
`record_vectors.py` loads exactly these into `transformers` models and records the logits under `vectors/`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VECTORS = Path(__file__).resolve().parent / "vectors"
Shapes = Mapping[str, Sequence[int]]


def rounded_to_half(x: np.ndarray) -> np.ndarray:
    """Float32 values rounded so that float32, float16 and bfloat16 all hold them exactly (|x| < 65504)."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    nearest_even = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    bfloat = ((bits + nearest_even) & np.uint32(0xFFFF0000)).view(np.float32)
    # The second rounding moves only values below 2**-17, which float16 keeps to multiples of 2**-24.
    return bfloat.astype(np.float16).astype(np.float32)


def tiny_weights(shapes: Shapes, seed: int, norm_mean: float = 1.0) -> dict[str, np.ndarray]:
    """Seeded float32 weights, one independent PCG64 stream a tensor.

    Matrices [rows, cols] have standard deviation 1.5 / sqrt(cols) (embeddings 0.25), biases 0.3, and norm
    weights `norm_mean` + 0.2 * normal: large enough that every tensor moves the logits. All values are exact
    in float32, float16 and bfloat16, so that one recording serves checkpoints of all three types.
    """
    weights = {}
    for name, shape in shapes.items():
        stream = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
        x = np.random.Generator(np.random.PCG64(stream)).standard_normal(tuple(shape))
        if "embed_tokens" in name:
            x = 0.25 * x
        elif name.endswith(".bias"):
            x = 0.3 * x
        elif len(shape) == 1:
            x = norm_mean + 0.2 * x
        else:
            x = x * (1.5 / np.sqrt(shape[-1]))
        weights[name] = rounded_to_half(x.astype(np.float32))
    return weights


def norm_mean(config: Mapping[str, Any]) -> float:
    """The centre of a model's norm weights: Gemma multiplies by 1 + w, all others by w."""
    return 0.0 if str(config["model_type"]).startswith("gemma") else 1.0


def weights_sha256(weights: Mapping[str, np.ndarray]) -> str:
    """Digest of names and float32 bytes in name order; equal to the recorded one if NumPy's stream is."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + b"\0" + weights[name].astype("<f4").tobytes())
    return digest.hexdigest()


def write_folder(
    path: str | Path,
    config: Mapping[str, Any],
    shapes: Shapes,
    seed: int,
    dtype: str = "float32",
    shards: int = 1,
) -> Path:
    """Write a Hugging Face folder: config.json and model.safetensors (or `shards` files and their index).

    dtype is float32, float16 or bfloat16; the weights are the same numbers in each. Returns `path`.
    """
    from safetensors.numpy import save_file

    if dtype == "bfloat16":
        import ml_dtypes

        element: Any = ml_dtypes.bfloat16
    else:
        element = np.dtype(dtype)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    weights = {n: w.astype(element) for n, w in tiny_weights(shapes, seed, norm_mean(config)).items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file_name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in list(weights)[i::shards]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file_name))
    total = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


@dataclass(frozen=True)
class VectorCase:
    """One recorded model: P prompt ids and D decode ids over a vocabulary of V.

    `logits[i]` are the logits after ids[: i + 1] for i < P, from one forward pass over the prompt;
    `decode_logits[j]` those after ids[: P + j + 1], from single-token steps with a key/value cache.
    """

    name: str
    config: dict[str, Any]
    config_v5: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    seed: int
    weights_sha256: str
    ids: np.ndarray
    logits: np.ndarray
    decode_logits: np.ndarray

    @property
    def all_logits(self) -> np.ndarray:
        """Float32 [P + D, V]: the logits after every id."""
        return np.concatenate([self.logits, self.decode_logits])

    def weights(self) -> dict[str, np.ndarray]:
        """The float32 weights that the logits were recorded with."""
        return tiny_weights(self.shapes, self.seed, norm_mean(self.config))

    def write_folder(
        self, path: str | Path, dtype: str = "float32", shards: int = 1, v5: bool = False
    ) -> Path:
        """Write the case as a Hugging Face folder, with the classic or the transformers 5 config."""
        config = self.config_v5 if v5 else self.config
        return write_folder(path, config, self.shapes, self.seed, dtype, shards)


def case_names() -> list[str]:
    """Names of the recorded cases, sorted."""
    return sorted(file.stem for file in VECTORS.glob("*.json"))


def load_case(name: str) -> VectorCase:
    """Read one recorded case by name."""
    document = json.loads((VECTORS / f"{name}.json").read_text())
    with np.load(VECTORS / f"{name}.npz") as arrays:
        ids, logits, decode_logits = arrays["ids"], arrays["logits"], arrays["decode_logits"]
    return VectorCase(
        name=name,
        config=document["config"],
        config_v5=document["config_v5"],
        shapes={n: tuple(s) for n, s in document["shapes"].items()},
        seed=document["seed"],
        weights_sha256=document["weights_sha256"],
        ids=ids,
        logits=logits,
        decode_logits=decode_logits,
    )
