"""llama2.c checkpoints: the legacy export, version 1 (float32) and version 2 (int8).

Layouts after https://github.com/karpathy/llama2.c (export.py, run.c, runq.c). All little-endian:

legacy  7 int32 (dim, hidden, layers, heads, kv heads, vocab, positions; vocab < 0: the output
        matrix is not the embedding), then float32: embedding, attention norms, wq, wk, wv, wo, ffn norms, w1,
        w2, w3, final norm, two rope tables, output; each group holds all layers
v1      'ak42', int32 1, 7 int32, byte shared, zeros to 256; attention norms, ffn norms, final norm,
        embedding, wq, wk, wv, wo, w1, w2, w3, output
v2      as v1 with int32 group size after the byte; the norms float32, every matrix int8 codes
        followed by float32 scales, one for each group of the flattened matrix
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.converter.checkpoints.bounded_file import BoundedFile
from halfbyte.converter.checkpoints.checkpoint import Checkpoint, Packed, check_rows
from halfbyte.converter.checkpoints.rope_order import read_half_split
from halfbyte.converter.checkpoints.tokenizer_files import tokenizer_at, tokenizer_beside
from halfbyte.formats.errors import CheckpointError

_MAGIC = 0x616B3432  # 'ak42'
_HEADER_BYTES = 256
_MAX_DIMENSION = 1 << 24
_MAX_LAYERS = 1 << 12
_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}
_NORMS = ("attention_norm", "ffn_norm", "norm")
_MATRICES = ("tok_embeddings", "wq", "wk", "wv", "wo", "w1", "w2", "w3")
_LEGACY_ORDER = (
    *("tok_embeddings", "attention_norm", "wq", "wk", "wv", "wo"),
    *("ffn_norm", "w1", "w2", "w3", "norm", "rope_tables"),
)


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    offset: int  # of the values, or of the int8 codes
    scales: int | None  # offset of the float32 scales, None for float32 values
    interleaved: bool


@dataclass(frozen=True)
class _Header:
    version: int  # 0 is the legacy export
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    positions: int
    shared: bool
    group: int

    def shape(self, part: str) -> tuple[int, ...]:
        """Shape of one tensor (of one layer, where a part has one for each)."""
        kv_dim = self.dim // self.heads * self.kv_heads
        return {
            "tok_embeddings": (self.vocab, self.dim),
            "output": (self.vocab, self.dim),
            "wq": (self.dim, self.dim),
            "wk": (kv_dim, self.dim),
            "wv": (kv_dim, self.dim),
            "wo": (self.dim, self.dim),
            "w1": (self.hidden, self.dim),
            "w2": (self.dim, self.hidden),
            "w3": (self.hidden, self.dim),
            "rope_tables": (self.positions, self.dim // self.heads),
        }.get(part, (self.dim,))


class Llama2cCheckpoint(Checkpoint):
    """A llama2.c `.bin`; int8 matrices come as `Packed('i8', ...)`, everything else as float32."""

    format = "llama2.c"

    def __init__(self, path: str | Path, tokenizer: str | Path | None = None) -> None:
        self.path = Path(path)
        self._file = BoundedFile(self.path)
        try:
            self._header = _read_header(self._file)
            self._tensors = _lay_out(self._header, self._file)
            if tokenizer is not None:
                self.tokenizer_source = tokenizer_at(tokenizer)
            else:
                self.tokenizer_source = tokenizer_beside(self.path, self._header.vocab)
        except CheckpointError:
            self.close()
            raise
        self.config = _config(self._header)
        self.generation = {"bos_token_id": 1, "eos_token_id": [2], "add_bos": True}

    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return self._stored_name(name) in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        return "f32" if self._tensor(name).scales is None else "i8"

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray | Packed:
        tensor = self._tensor(name)
        check_rows(name, tensor.shape, start, stop)
        if not tensor.interleaved:
            return self._stored_rows(tensor, start, stop)
        head_dim = self._header.dim // self._header.heads
        return read_half_split(lambda a, b: self._stored_rows(tensor, a, b), start, stop, head_dim)

    def sizes(self) -> list[tuple[str, int]]:
        return [(self.path.name, self._file.size)]

    def close(self) -> None:
        self._file.close()

    def _stored_name(self, name: object) -> object:
        return "model.embed_tokens.weight" if name == "lm_head.weight" and self._header.shared else name

    def _tensor(self, name: str) -> _Tensor:
        tensor = self._tensors.get(self._stored_name(name))  # type: ignore[call-overload]
        if tensor is None:
            raise CheckpointError(f"{self.path.name} has no tensor {name}")
        return tensor

    def _stored_rows(self, tensor: _Tensor, start: int, stop: int) -> np.ndarray | Packed:
        """Rows in the order of the file."""
        cols = tensor.shape[1] if len(tensor.shape) == 2 else 1
        first, count = start * cols, (stop - start) * cols
        if tensor.scales is None:
            values = self._file.read(tensor.offset + 4 * first, 4 * count).view("<f4")
            return values.reshape(stop - start, *tensor.shape[1:])
        codes = self._file.read(tensor.offset + first, count).view(np.int8).reshape(-1, cols)
        # Groups of the flattened matrix may cross rows; the largest group that never does is the
        # common divisor, under which each stored scale is repeated and every weight stays exact.
        stored_group = self._header.group
        group = math.gcd(cols, stored_group)
        first_scale, last_scale = first // stored_group, -(-(first + count) // stored_group)
        stored = self._file.read(tensor.scales + 4 * first_scale, 4 * (last_scale - first_scale)).view("<f4")
        starts = np.arange(first, first + count, group, dtype=np.int64)
        scales = stored[starts // stored_group - first_scale].reshape(stop - start, cols // group)
        return Packed("i8", group, codes, scales)


def _read_header(file: BoundedFile) -> _Header:
    """The header of any version. Raises CheckpointError where its numbers cannot be a model's."""
    if file.size < 28:
        raise CheckpointError(f"{file.path.name} is too short for a llama2.c checkpoint ({file.size} bytes)")
    head = file.read(0, min(file.size, 45)).tobytes()
    magic, version = struct.unpack_from("<Ii", head)
    if magic != _MAGIC:
        dim, hidden, layers, heads, kv_heads, vocab, positions = struct.unpack_from("<7i", head)
        # A negative vocabulary says that the output matrix is not the embedding.
        header = _Header(0, dim, hidden, layers, heads, kv_heads, abs(vocab), positions, vocab > 0, 0)
    elif version not in (1, 2):
        raise CheckpointError(f"{file.path.name} is llama2.c version {version}; legacy, 1 and 2 are readable")
    elif file.size < _HEADER_BYTES:
        raise CheckpointError(f"{file.path.name} is truncated in its header")
    else:
        dim, hidden, layers, heads, kv_heads, vocab, positions = struct.unpack_from("<7i", head, 8)
        shared, group = struct.unpack_from("<Bi", head, 36)
        header = _Header(version, dim, hidden, layers, heads, kv_heads, vocab, positions, bool(shared), group)
    _check_header(header, file.path.name)
    return header


def _check_header(header: _Header, name: str) -> None:
    sizes = (header.dim, header.hidden, header.heads, header.kv_heads, header.vocab, header.positions)
    problem = None
    if not all(0 < size <= _MAX_DIMENSION for size in sizes) or not 0 < header.layers <= _MAX_LAYERS:
        problem = f"its sizes are {sizes} with {header.layers} layers"
    elif header.dim % header.heads or header.heads % header.kv_heads:
        problem = f"{header.heads} heads ({header.kv_heads} for keys) do not divide its width {header.dim}"
    elif header.dim // header.heads % 2:
        problem = f"its heads have the odd width {header.dim // header.heads}"
    elif header.version == 2 and not 0 < header.group <= _MAX_DIMENSION:
        problem = f"its group size is {header.group}"
    if problem is not None:
        raise CheckpointError(f"{name} is not a llama2.c checkpoint: {problem}")


def _lay_out(header: _Header, file: BoundedFile) -> dict[str, _Tensor]:
    """Where each tensor lies, by Hugging Face name. The file has to have exactly the bytes needed."""
    if header.version == 0:
        order: tuple[str, ...] = _LEGACY_ORDER
    else:
        order = _NORMS + _MATRICES
    if not header.shared:
        order = (*order, "output")
    offset = 28 if header.version == 0 else _HEADER_BYTES
    tensors: dict[str, _Tensor] = {}
    # Python's integers do not overflow, and the header check bounds each size by 2^24.
    for part in order:
        shape = header.shape(part)
        values = math.prod(shape)
        quantised = header.version == 2 and part not in _NORMS
        if quantised and values % header.group:
            raise CheckpointError(
                f"{file.path.name} is not a llama2.c checkpoint: {part} is not whole groups"
            )
        for layer in range(header.layers if part in _LAYER_NAMES else 1):
            scales = offset + values if quantised else None
            if part != "rope_tables":
                tensors[_name(part, layer)] = _Tensor(shape, offset, scales, part in ("wq", "wk"))
            offset += values + 4 * (values // header.group) if quantised else 4 * values
            if offset > file.size:
                raise CheckpointError(
                    f"{file.path.name} is truncated or not a llama2.c checkpoint: its header asks for more"
                    f" than its {file.size} bytes"
                )
    if offset != file.size:
        raise CheckpointError(
            f"{file.path.name} is not a llama2.c checkpoint: its header accounts for {offset}"
            f" of its {file.size} bytes"
        )
    return tensors


def _name(part: str, layer: int) -> str:
    whole = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    return f"{whole.get(part) or f'model.layers.{layer}.{_LAYER_NAMES[part]}'}.weight"


def _config(header: _Header) -> dict[str, Any]:
    """The header as a Hugging Face config; what llama2.c leaves unsaid are its code's constants."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": header.dim,
        "intermediate_size": header.hidden,
        "num_hidden_layers": header.layers,
        "num_attention_heads": header.heads,
        "num_key_value_heads": header.kv_heads,
        "head_dim": header.dim // header.heads,
        "vocab_size": header.vocab,
        "max_position_embeddings": header.positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": header.shared,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
