"""Hugging Face folders: config.json with safetensors weights, whole or sharded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.converter.checkpoints.bounded_file import BoundedFile
from halfbyte.converter.checkpoints.checkpoint import Checkpoint, Packed, check_rows, token_ids
from halfbyte.converter.checkpoints.quantized import Quantization
from halfbyte.converter.checkpoints.quantized_matrix import QuantizedMatrix
from halfbyte.converter.checkpoints.safetensors_header import read_safetensors_header
from halfbyte.converter.checkpoints.stored import StoredTensor
from halfbyte.converter.checkpoints.tokenizer_files import (
    read_json,
    read_small,
    tokenizer_at,
    tokenizer_in_folder,
)
from halfbyte.formats.errors import CheckpointError

_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16", "F64": "f64"}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that old releases of transformers saved: computed from the config, not learnt.
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$|\.masked_bias$")
# Where the language model lies within a multimodal wrapper, by release of transformers.
_WRAPPER_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("model.layers.", "model.layers."),
    ("model.embed_tokens.", "model.embed_tokens."),
    ("model.norm.", "model.norm."),
    ("lm_head.", "lm_head."),
)
# Gemma 3's wrapper leaves out of text_config whatever equals the defaults of Gemma3TextConfig.
_GEMMA3_TEXT_DEFAULTS: dict[str, Any] = {
    "model_type": "gemma3_text",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}


class HuggingFaceCheckpoint(Checkpoint):
    """A folder with config.json and model.safetensors, or shards with or without their index.

    Quantised checkpoints come as `Packed`, codes untouched; `quantized.METHODS` says which are read.

    Beyond config.json as written, `config` always has `tie_word_embeddings`, and `rope_theta`,
    `rope_scaling` and `rope_local_base_freq` where newer files say them in `rope_parameters`.
    """

    format = "huggingface"

    def __init__(self, path: str | Path, tokenizer: str | Path | None = None) -> None:
        self.path = Path(path)
        self._files: list[BoundedFile] = []
        self._tensors: dict[str, StoredTensor | QuantizedMatrix] = {}
        self._unlisted: set[str] = set()
        try:
            whole = _read_config(self.path)
            self.config = _language_config(whole)
            wrapped = isinstance(whole.get("text_config"), dict)
            quantization = self._quantization(whole)
            self._take(self._open(wrapped), quantization)
            self._tie()
            self.generation = self._read_generation(whole)
            self.chat_template = _chat_template(self.path)
            source = tokenizer_in_folder(self.path) if tokenizer is None else tokenizer_at(tokenizer)
            self.tokenizer_source = source
        except CheckpointError:
            self.close()
            raise

    def names(self) -> list[str]:
        return [name for name in self._tensors if name not in self._unlisted]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or (name == _HEAD and self._is_tied_head())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        tensor = self._tensor(name)
        return tensor.encoding if isinstance(tensor, QuantizedMatrix) else _DTYPES[tensor.dtype]

    def input_order(self, name: str) -> np.ndarray | None:
        tensor = self._tensor(name)
        return tensor.order if isinstance(tensor, QuantizedMatrix) else None

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray | Packed:
        tensor = self._tensor(name)
        check_rows(name, tensor.shape, start, stop)
        return (
            tensor.read_rows(start, stop) if isinstance(tensor, QuantizedMatrix) else tensor.rows(start, stop)
        )

    def sizes(self) -> list[tuple[str, int]]:
        return [(file.path.name, file.size) for file in self._files]

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _is_tied_head(self) -> bool:
        return bool(self.config["tie_word_embeddings"]) and _EMBEDDING in self._tensors

    def _tensor(self, name: str) -> StoredTensor | QuantizedMatrix:
        key = _EMBEDDING if name == _HEAD and name not in self._tensors and self._is_tied_head() else name
        if key not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self._tensors[key]

    def _open(self, wrapped: bool) -> dict[str, StoredTensor]:
        """Open all weight files; their tensors under plain names."""
        ignored: list[str] = []
        tensors: dict[str, StoredTensor] = {}
        shards, promised = _weight_files(self.path)
        for shard in shards:
            file = BoundedFile(self.path / shard)
            self._files.append(file)
            entries = read_safetensors_header(file)
            for name in (n for n, where in promised.items() if where == shard and n not in entries):
                raise CheckpointError(f"the index of {self.path} names {name}, which {shard} lacks")
            for name, entry in entries.items():
                plain = _plain_name(name, wrapped)
                if plain is None:
                    ignored.append(name)
                    continue
                if plain in tensors:
                    raise CheckpointError(f"{self.path} holds the tensor {plain} twice, again in {shard}")
                tensors[plain] = StoredTensor(file, entry)
        self.ignored = tuple(ignored)
        return tensors

    def _quantization(self, config: dict[str, Any]) -> Quantization | None:
        """How the weights are quantised; None for a float checkpoint."""
        text = config.get("text_config")
        places = [config, text] if isinstance(text, dict) else [config]
        keys = ("quantization_config", "compression_config")
        found = next((place[key] for place in places for key in keys if place.get(key)), None)
        if found is None:
            # before transformers knew them, AutoGPTQ and AutoAWQ each wrote a file of their own
            files = {"gptq": "quantize_config.json", "awq": "quant_config.json"}
            own = [{"quant_method": method, **read_json(self.path / name)} for method, name in files.items()
                   if (self.path / name).is_file()]  # fmt: skip
            if not own:
                return None
            found = own[0]
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.path}: quantization_config of config.json is not an object")
        try:
            return Quantization(found)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    def _take(self, tensors: dict[str, StoredTensor], quantization: Quantization | None) -> None:
        """Quantised matrices out of their parts; what remains has to be floats."""
        if quantization is not None:
            matrices, self._unlisted = quantization.take(tensors)
            self._tensors.update(matrices)
        for name, tensor in tensors.items():
            if tensor.dtype not in _DTYPES and name not in self._unlisted:
                raise CheckpointError(
                    f"tensor {name} of {self.path} is {tensor.dtype};"
                    " only F32, F16, BF16 and F64 are readable"
                )
        self._tensors.update(tensors)

    def _tie(self) -> None:
        """Settle whether input and output embedding are one, and list a single one under its first name."""
        has_embedding, has_head = _EMBEDDING in self._tensors, _HEAD in self._tensors
        tied = self.config.get("tie_word_embeddings")
        if tied is None:
            tied = self.config["tie_word_embeddings"] = not (has_embedding and has_head)
        if has_embedding != has_head and not tied:
            missing = _HEAD if has_embedding else _EMBEDDING
            raise CheckpointError(f"{self.path} lacks {missing} and its config.json does not tie the two")
        if has_head and not has_embedding:
            self._tensors = {(_EMBEDDING if k == _HEAD else k): v for k, v in self._tensors.items()}

    def _read_generation(self, config: dict[str, Any]) -> dict[str, Any]:
        generation = read_json(self.path / "generation_config.json")
        tokens = read_json(self.path / "tokenizer_config.json")
        text = self.config
        ids: dict[str, list[int]] = {}
        for key in ("bos_token_id", "eos_token_id"):
            places = (generation, config, text)
            ids[key] = next((found for place in places if (found := token_ids(place.get(key)))), [])
        add_bos = tokens.get("add_bos_token")
        return {
            "bos_token_id": ids["bos_token_id"][0] if ids["bos_token_id"] else None,
            "eos_token_id": ids["eos_token_id"],
            "add_bos": add_bos if isinstance(add_bos, bool) else None,
        }


def _plain_name(name: str, wrapped: bool) -> str | None:
    """The tensor's name in a text-only checkpoint; None if it is not part of the language model."""
    if _BUFFERS.search(name):
        return None
    if not wrapped:
        return name
    for prefix, plain in _WRAPPER_PREFIXES:
        if name.startswith(prefix):
            return plain + name[len(prefix) :]
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json, so it is not a Hugging Face checkpoint")
    return read_json(folder / "config.json")


def _language_config(whole: dict[str, Any]) -> dict[str, Any]:
    """The language model's config: out of its wrapper, with rope said the way older files say it."""
    wrapped = isinstance(whole.get("text_config"), dict)
    config = dict(whole["text_config"] if wrapped else whole)
    if wrapped:
        for key in ("bos_token_id", "eos_token_id", "tie_word_embeddings", "torch_dtype", "dtype"):
            if config.get(key) is None and whole.get(key) is not None:
                config[key] = whole[key]
    if not isinstance(config.get("model_type", whole.get("model_type")), str):
        raise CheckpointError("config.json does not say its model_type")
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict):
        full = parameters.get("full_attention", parameters)
        local = parameters.get("sliding_attention")
        if isinstance(full, dict):
            config.setdefault("rope_theta", full.get("rope_theta", 10000.0))
            if full.get("rope_type", "default") != "default":
                config.setdefault("rope_scaling", {k: v for k, v in full.items() if k != "rope_theta"})
            if "partial_rotary_factor" in full:
                config.setdefault("partial_rotary_factor", full["partial_rotary_factor"])
        if isinstance(local, dict) and "rope_theta" in local:
            config.setdefault("rope_local_base_freq", local["rope_theta"])
    if wrapped and whole.get("model_type") == "gemma3":
        config = {**_GEMMA3_TEXT_DEFAULTS, **config}
    config.setdefault("model_type", whole.get("model_type"))
    return config


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The files to open, and what the index promises: tensor name -> file (empty without an index)."""
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"], {}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        promised = read_json(index).get("weight_map")
        if not isinstance(promised, dict) or not all(isinstance(v, str) for v in promised.values()):
            raise CheckpointError(f"{index} has no valid weight_map")
        shards = sorted(set(promised.values()))
        for shard in shards:
            if Path(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
                raise CheckpointError(f"{index} names a file outside its folder: {shard!r}")
            if not (folder / shard).is_file():
                raise CheckpointError(f"{folder} lacks the shard {shard}; download it again")
        return shards, promised
    # Mistral's folders also hold the same weights once more, in one file of other names.
    found = sorted(p.name for p in folder.glob("*.safetensors") if not p.name.startswith("consolidated"))
    if found:
        return found, {}
    if any(folder.glob("pytorch_model*.bin")) or any(folder.glob("*.pth")) or any(folder.glob("*.pt")):
        raise CheckpointError(f"{folder} holds only pickled PyTorch weights; convert it to safetensors first")
    raise CheckpointError(f"{folder} has a config.json but no .safetensors weights")


def _chat_template(folder: Path) -> str | None:
    """The chat template: a file of its own, else the (default) one of tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_small(path).decode("utf-8", "replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(folder / name).get("chat_template")
        if isinstance(template, str):
            return template
        if isinstance(template, list):
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            if isinstance(named.get("default"), str):
                return named["default"]
    return None
