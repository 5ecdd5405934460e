"""GGUF checkpoints (llama.cpp), translated to what the model's Hugging Face folder holds."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.converter.checkpoints import ggml_types
from halfbyte.converter.checkpoints.bounded_file import BoundedFile
from halfbyte.converter.checkpoints.checkpoint import (
    Checkpoint,
    Packed,
    TokenizerSource,
    check_rows,
    token_ids,
)
from halfbyte.converter.checkpoints.gguf_file import GGUFFile, GGUFTensor
from halfbyte.converter.checkpoints.gguf_names import (
    ARCHITECTURES,
    NOT_WEIGHTS,
    Architecture,
    Metadata,
    plain_name,
    translate_config,
)
from halfbyte.converter.checkpoints.rope_order import read_half_split
from halfbyte.converter.checkpoints.tokenizer_files import tokenizer_at
from halfbyte.formats.errors import CheckpointError

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Byte pair tokenizers (tokenizer.ggml.pre) that start a text with BOS even where no key says so.
_BOS_PRETOKENIZERS = ("llama3", "llama-v3", "llama-bpe", "falcon3")
_MAX_ROPE_FACTORS = 1 << 16


class GGUFCheckpoint(Checkpoint):
    """A GGUF file. Quantised blocks come as `Packed` (`ggml_types.TYPES` says which), floats as stored.

    Undone on the way: the interleaved rope order of llama-like query and key rows, the 1 that is added
    to Gemma's norms. `config['rope_freq_factors']` (a list of head_dim / 2 numbers by which the rope
    frequencies are divided) is there where the file holds them: Llama 3's rope scaling.
    """

    format = "gguf"

    def __init__(self, path: str | Path, tokenizer: str | Path | None = None) -> None:
        self.path = Path(path)
        self._file = BoundedFile(self.path)
        try:
            self._gguf = GGUFFile(self._file)
            self._architecture = self._find_architecture()
            self._tensors = self._translate_names()
            self.config = self._translate_config()
            self._given_tokenizer = None if tokenizer is None else tokenizer_at(tokenizer)
        except CheckpointError as error:
            self.close()
            message = str(error)
            if self.path.name not in message:
                message = f"{self.path.name}: {message}"
            raise CheckpointError(message) from None
        self.generation = self._read_generation()
        self.config["bos_token_id"] = self.generation["bos_token_id"]
        self.config["eos_token_id"] = self.generation["eos_token_id"]
        template = self._gguf.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) else None

    @cached_property
    def tokenizer_source(self) -> TokenizerSource | None:  # type: ignore[override]
        """Read when asked for: a vocabulary is hundreds of thousands of strings."""
        if self._given_tokenizer is not None:
            return self._given_tokenizer
        if not self._gguf.array_length("tokenizer.ggml.tokens"):
            return None
        keys = self._gguf.keys_under("tokenizer.")
        return TokenizerSource("gguf", {key: self._gguf.get(key) for key in keys})

    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or (name == _HEAD and self.config["tie_word_embeddings"])

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        tensor = self._tensor(name)
        kind = ggml_types.TYPES[tensor.type]
        return "f32" if len(tensor.shape) == 1 and kind.unpack else kind.dtype

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray | Packed:
        tensor = self._tensor(name)
        check_rows(name, tensor.shape, start, stop)
        heads = self._interleaved_heads(name)
        if heads:
            head_dim = tensor.shape[0] // heads
            return read_half_split(lambda a, b: self._stored_rows(tensor, a, b), start, stop, head_dim)
        rows = self._stored_rows(tensor, start, stop)
        offset = self._architecture.norm_offset
        if offset and name.endswith("norm.weight") and isinstance(rows, np.ndarray):
            return rows.astype(np.float32) - np.float32(offset)
        return rows

    def sizes(self) -> list[tuple[str, int]]:
        return [(self.path.name, self._file.size)]

    def close(self) -> None:
        self._file.close()

    def _find_architecture(self) -> Architecture:
        name = self._gguf.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise CheckpointError(
                f"{self.path.name} has the architecture {str(name)[:40]!r};"
                f" supported in GGUF are {', '.join(ARCHITECTURES)}"
            )
        parts = self._gguf.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise CheckpointError(
                f"{self.path.name} is one of {parts} parts; join them with llama-gguf-split --merge"
            )
        self._metadata = Metadata(name, self._gguf.get, self.path.name)
        return ARCHITECTURES[name]

    def _translate_names(self) -> dict[str, GGUFTensor]:
        layers = self._metadata.size("block_count")
        if layers > len(self._gguf.tensors):
            raise CheckpointError(f"{self.path.name} claims {layers} layers and holds fewer tensors")
        tensors: dict[str, GGUFTensor] = {}
        ignored = []
        for tensor in self._gguf.tensors.values():
            if NOT_WEIGHTS.fullmatch(tensor.name):
                ignored.append(tensor.name)
                continue
            plain = plain_name(self._architecture, tensor.name, layers)
            if plain is None:
                raise CheckpointError(
                    f"{self.path.name} holds {tensor.name[:80]}, which its architecture does not have"
                )
            tensors[plain] = tensor
        self.ignored = tuple(ignored)
        if _EMBEDDING not in tensors or len(tensors[_EMBEDDING].shape) != 2:
            raise CheckpointError(f"{self.path.name} holds no matrix token_embd.weight")
        return tensors

    def _translate_config(self) -> dict[str, Any]:
        config = translate_config(self._architecture, self._metadata, self._tensors[_EMBEDDING].shape[0])
        config["tie_word_embeddings"] = _HEAD not in self._tensors
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self._tensors
        config["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in self._tensors
        if self._architecture.interleaved:
            self._check_head_rows(config)
        freqs = self._rope_factors("rope_freqs.weight")
        if freqs is not None:
            config["rope_freq_factors"] = freqs
        long, short = (self._rope_factors(f"rope_factors_{which}.weight") for which in ("long", "short"))
        if long is not None and short is not None:
            scaling = {"rope_type": "longrope", **(config["rope_scaling"] or {})}
            config["rope_scaling"] = {**scaling, "long_factor": long, "short_factor": short}
        elif (config["rope_scaling"] or {}).get("rope_type") == "longrope":
            raise CheckpointError(f"{self.path.name} says longrope but lacks its rope_factors tensors")
        return config

    def _check_head_rows(self, config: dict[str, Any]) -> None:
        """Rows that are to be reordered have to be whole heads of an even width."""
        for name, tensor in self._tensors.items():
            projection = name.split(".")[-2]
            if projection in ("q_proj", "k_proj"):
                heads = config["num_attention_heads" if projection == "q_proj" else "num_key_value_heads"]
                if tensor.shape[0] % (2 * heads):
                    raise CheckpointError(f"{tensor.name} has {tensor.shape[0]} rows, not {heads} even heads")

    def _interleaved_heads(self, name: str) -> int:
        """How many heads the rows are to be reordered within; 0 if they are in order."""
        if not self._architecture.interleaved:
            return 0
        key = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        return self.config[key] if key else 0

    def _rope_factors(self, name: str) -> list[float] | None:
        tensor = self._gguf.tensors.get(name)
        if tensor is None:
            return None
        if len(tensor.shape) != 1 or tensor.shape[0] > _MAX_ROPE_FACTORS:
            raise CheckpointError(f"{self.path.name} holds {name} as {list(tensor.shape)}, no rope factors")
        values = self._stored_rows(tensor, 0, tensor.shape[0])
        assert isinstance(values, np.ndarray)
        # The shortest decimal that means the same float32, as in a config file.
        return [float(str(value)) for value in values.astype(np.float32)]

    def _read_generation(self) -> dict[str, Any]:
        """Token ids of tokenizer.ggml.*; those outside the vocabulary (llama.cpp's -1) count as absent."""
        vocab_size = self.config["vocab_size"]

        def ids(key: str) -> list[int]:
            return [i for i in token_ids(self._gguf.get(f"tokenizer.ggml.{key}_token_id")) if i < vocab_size]

        model, pre = (str(self._gguf.get(f"tokenizer.ggml.{key}")) for key in ("model", "pre"))
        bos, eos = ids("bos"), ids("eos")
        if model == "llama":
            # llama.cpp's own defaults for sentencepiece vocabularies.
            bos, eos = bos or [1], eos or [2]
        add_bos = self._gguf.get("tokenizer.ggml.add_bos_token")
        if not isinstance(add_bos, bool):
            add_bos = True if model == "llama" or pre in _BOS_PRETOKENIZERS else None
        return {
            "bos_token_id": bos[0] if bos else None,
            "eos_token_id": list(dict.fromkeys(eos + ids("eot") + ids("eom"))),
            "add_bos": add_bos,
        }

    def _tensor(self, name: str) -> GGUFTensor:
        tied = name == _HEAD and self.config["tie_word_embeddings"]
        tensor = self._tensors.get(_EMBEDDING if tied else name)
        if tensor is None:
            raise CheckpointError(f"{self.path.name} has no tensor {name}")
        return tensor

    def _stored_rows(self, tensor: GGUFTensor, start: int, stop: int) -> np.ndarray | Packed:
        """Rows (of a vector: elements) as the file has them."""
        if len(tensor.shape) == 1:
            whole = self._file.read(tensor.offset, tensor.row_bytes).reshape(1, -1)
            values = ggml_types.decode(whole, tensor.type)
            return (values.dequantize() if isinstance(values, Packed) else values)[0, start:stop]
        data = self._file.read(tensor.offset + start * tensor.row_bytes, (stop - start) * tensor.row_bytes)
        return ggml_types.decode(data.reshape(stop - start, tensor.row_bytes), tensor.type)
