"""What every source checkpoint looks like to the converter, whatever file it came from.

A reader translates its format into the terms of a Hugging Face folder: the keys of `config.json`, the
tensor names of `model.safetensors`, rows ordered for half-split rope. Integer codes that arrive
quantised are handed over as `Packed`, untouched.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.formats import encodings
from halfbyte.formats.errors import CheckpointError


@dataclass(frozen=True)
class Packed:
    """A matrix that arrived quantised, `w[row, col]` with its integer codes kept exactly.

    encoding  name of the formula: a row of `formats.encodings` with codes, the q family excepted
    group     columns that share a scale; 0 is the whole row; the last group of a row may be short
    codes     [rows, cols] int8 (q8, i8) or uint8 (all others: code numbers, one to a byte here)
    scales    [rows, ceil(cols / group)] float16, float32 or ml_dtypes.bfloat16; with `super`, the bytes of
              scale type k256 (int8, or uint8 where there are minima)
    mins      like scales, for encodings with a minimum
    zeros     like scales in shape, uint8, for encodings with a zero point
    super     [rows, ceil(cols / 256)] float16: s = super * scales (scale type k256, SPEC.md 5.4), else None
    supermin  like super, for k256 with minima: m = -(supermin * mins)
    """

    encoding: str
    group: int
    codes: np.ndarray
    scales: np.ndarray
    mins: np.ndarray | None = None
    zeros: np.ndarray | None = None
    super: np.ndarray | None = None
    supermin: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, cols] of the matrix."""
        return self.codes.shape

    @property
    def scale_type(self) -> str:
        """The scale type that stores these scales exactly."""
        if self.super is not None:
            return encodings.K256
        return {"float16": "f16", "bfloat16": "bf16"}.get(self.scales.dtype.name, "f32")

    def planes(self) -> dict[str, np.ndarray]:
        """The arrays that are there, by the names of the planes of a file (SPEC.md section 6)."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("encoding", "group")}
        return {name: a for name, a in arrays.items() if a is not None}

    def dequantize(self) -> np.ndarray:
        """The matrix as float32 [rows, cols]; each step rounds to float32 in the order written."""
        return encodings.dequantize(self.encoding, group=self.group, **self.planes())

    def take(self, rows: np.ndarray | slice) -> Packed:
        """The rows with these indices, in this order; codes and parameters stay exact."""
        return Packed(self.encoding, self.group, **{name: a[rows] for name, a in self.planes().items()})


@dataclass(frozen=True)
class TokenizerSource:
    """A tokenizer as it was found, still to be imported.

    kind    'tokenizer.json' | 'sentencepiece' | 'llama2.c' | 'gguf'
    data    the file's bytes; for gguf the `tokenizer.*` metadata: full key -> str, int, float, bool,
            list[str] (token strings may hold any bytes: surrogateescape) or a NumPy array
    config  content of tokenizer_config.json, or {}
    added   content of added_tokens.json (text -> id), or {}
    """

    kind: str
    data: bytes | dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)


class Checkpoint(ABC):
    """An open source checkpoint. Tensors are read on demand; only the one asked for is in memory.

    format            'huggingface' | 'gguf' | 'llama2.c'
    path              what was opened
    config            in the terms of Hugging Face's config.json; always has model_type and
                      tie_word_embeddings
    generation        bos_token_id (int | None), eos_token_id (list[int]), add_bos (bool | None)
    chat_template     Jinja source, or None
    tokenizer_source  None when the checkpoint brings no tokenizer
    ignored           source names of tensors that are known not to be part of the language model
    """

    format: str
    path: Path
    config: dict[str, Any]
    generation: dict[str, Any]
    chat_template: str | None = None
    tokenizer_source: TokenizerSource | None = None
    ignored: tuple[str, ...] = ()

    @abstractmethod
    def names(self) -> list[str]:
        """Hugging Face names of the tensors held, each stored tensor once.

        Where input and output embedding are one tensor it is listed as model.embed_tokens.weight;
        `lm_head.weight` is then still accepted by `in`, `shape`, `read` and `read_rows`.
        """

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Whether `read(name)` works."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, [out, in] for a matrix. Raises CheckpointError for an unknown name."""

    @abstractmethod
    def dtype(self, name: str) -> str:
        """How the tensor is stored: 'f32', 'f16', 'bf16', 'f64', or the encoding of a `Packed` ('q8', 'i4', ...)."""

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray | Packed:
        """Rows start..stop (first axis), equal to `read(name)[start:stop]`, reading little else.

        Float tensors come as float32, float16 or ml_dtypes.bfloat16, as stored (float64 becomes
        float32). Raises CheckpointError for an unknown name, rows out of range or a failing read.
        """

    def input_order(self, name: str) -> np.ndarray | None:
        """The order in which `read_rows` gives the columns of a matrix, int64[in]; None if as the inputs are.

        Column j belongs to input order[j]: matrices quantised with activation order (`g_idx`) come with the
        columns of each group side by side.
        """
        return None

    def read(self, name: str) -> np.ndarray | Packed:
        """The whole tensor; see `read_rows`."""
        shape = self.shape(name)
        if not shape:
            raise CheckpointError(f"tensor {name} is a scalar, which no model here uses")
        return self.read_rows(name, 0, shape[0])

    @abstractmethod
    def sizes(self) -> list[tuple[str, int]]:
        """(file name, bytes) of every file that holds tensors."""

    def digest(self) -> str:
        """sha256 (hex) over names, dtypes, shapes, config and file sizes: cheap, the data is not read."""
        tensors = sorted((name, self.dtype(name), list(self.shape(name))) for name in self.names())
        identity = [self.format, tensors, self.config, sorted(self.sizes())]
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    @abstractmethod
    def close(self) -> None:
        """Close the files. Arrays already read stay valid."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def check_rows(name: str, shape: tuple[int, ...], start: int, stop: int) -> None:
    """Refuse a row range that the tensor does not have."""
    if not shape or not 0 <= start <= stop <= shape[0]:
        raise CheckpointError(f"tensor {name} of shape {list(shape)} has no rows {start}..{stop}")


def token_ids(value: Any) -> list[int]:
    """A token id, a list of them or None, as config files write it, as a list of ints."""
    values: Iterable[Any] = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]
