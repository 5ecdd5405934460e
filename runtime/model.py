"""A loaded model: immutable, shareable between threads, the owner of one bound backend."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.devices.fit import of_file
from halfbyte.formats import kv_gate, kv_modes
from halfbyte.formats.container import File
from halfbyte.formats.errors import KvWarning, TokenizerError, UsageError
from halfbyte.formats.tiles import P16
from halfbyte.runtime.backends import backend_class
from halfbyte.runtime.backends.backend import Step
from halfbyte.runtime.kv import KV
from halfbyte.runtime.library import find

if TYPE_CHECKING:
    from halfbyte.runtime.session import Session
    from halfbyte.runtime.tokenizer import Tokenizer

CHUNK = 288  # rows of a step: 24 strips of 12 tokens, which the native kernels take in one go


def load(
    path: str | os.PathLike[str],
    backend: str | None = None,
    threads: int | None = None,
    kv: str = "auto",
    policy: str | None = None,
    verify: bool = False,
) -> Model:
    """Open a `.hb` file, or a pulled model by its name, and bind it.

    backend: 'native', 'jit', 'reference' or 'cuda' (default: the best available of the first three).
    threads: default all CPUs this process may use. kv: a mode of `formats.kv_modes`, or 'auto': f32 for
    models stored in f32 and under policy f32, else what `formats.kv_gate` picks by what was measured.
    policy: 'f32' or 'i8g32' (default), and with reference and cuda 'bf16' or 'f8', see SPEC.md section
    10. verify: check every byte first.

    Raises FormatError for a damaged file, UsageError for an impossible request.
    """
    if threads is not None and not 1 <= threads <= 1024:
        raise UsageError(f"threads must be between 1 and 1024, not {threads}")
    file = File(find(path))
    if verify:
        file.verify()
    return Model(file, backend, threads, kv, policy)


class Model:
    """A file bound to a backend. Use `session()` for a timeline or `generate()` for text."""

    def __init__(
        self,
        file: File,
        backend: str | None = None,
        threads: int | None = None,
        kv: str = "auto",
        policy: str | None = None,
    ):
        self.file = file
        self.policy = policy or "i8g32"
        chosen = "f32" if self.policy == "f32" else kv_gate.automatic(file)
        self.kv_mode = kv if kv != "auto" else chosen
        kv_modes.by_cache(self.kv_mode, len(file.caches))
        if doubt := kv_gate.warning(file, self.kv_mode):
            warnings.warn(doubt, KvWarning, stacklevel=3)
        self.vocab_size = int(file.metadata["model.vocab_size"])  # type: ignore[arg-type]
        self.context_length = int(file.metadata["model.context_length"])  # type: ignore[arg-type]
        self._lock = threading.Lock()
        self.backend = backend_class(backend)(file, self.policy, threads)

    def run(self, step: Step) -> np.ndarray:
        """Execute one step; float32[r, vocab]. Steps of concurrent sessions take turns."""
        self._check(step)
        with self._lock:
            return self.backend.run(step)

    def states(self, step: Step) -> np.ndarray:
        """Like `run`, but float32[r, width]: the vectors that the logits are made from, and no logits."""
        self._check(step)
        with self._lock:
            return self.backend.run_to_states(step)

    @property
    def width(self) -> int:
        """Values of a vector of `states`."""
        return int(self.file.slots[self.backend.states_slot]["width"])

    def _check(self, step: Step) -> None:
        if not all(0 <= i < self.vocab_size for i in step.ids.tolist()):
            raise UsageError(f"token ids must lie in 0..{self.vocab_size - 1}")

    def session(self, kv: str | None = None) -> Session:
        """A fresh, empty timeline, in another kv mode where one is named."""
        from halfbyte.runtime.session import Session

        return Session(self, kv)

    def new_kv(self, mode: str | None = None) -> KV:
        """Empty caches, by default in this model's mode."""
        return self.backend.new_kv(mode or self.kv_mode)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file carries a tokenizer."""
        return "TOKN" in self.file.sections

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer. Raises TokenizerError when it has none."""
        from halfbyte.runtime.tokenizer import Tokenizer

        json = self.file.section("TOKN")
        if not json:
            raise TokenizerError(
                f"{self.file.path} has no tokenizer: give token ids, or convert with --tokenizer FILE"
            )
        meta = self.file.metadata
        bos: Any = meta.get("tokenizer.bos_id")
        eos: Any = meta.get("tokenizer.eos_ids", [])
        tokenizer = Tokenizer(json, bos, list(eos), bool(meta.get("tokenizer.add_bos", False)))
        if tokenizer.vocab_size > self.vocab_size:
            raise TokenizerError(
                f"{self.file.path}: the tokenizer has {tokenizer.vocab_size} tokens but the model {self.vocab_size}"
            )
        return tokenizer

    @cached_property
    def chat_template(self) -> str:
        """The Jinja source, or ''."""
        return self.file.section("TMPL").decode()

    @property
    def eos_ids(self) -> list[int]:
        """Token ids that end an answer."""
        return list(self.file.metadata.get("tokenizer.eos_ids", []))  # type: ignore[arg-type]

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Iterator[str]:
        """Pieces of text as they are produced; see `runtime.generate.generate` for the options."""
        from halfbyte.runtime.generate import generate

        return generate(self, prompt, **options)

    def facts(self) -> dict[str, Any]:
        """What `info` and `bench` report: sizes, encodings and bits per weight."""
        meta = dict(self.file.metadata)
        return {**meta, **weight_facts(self.file)}


def weight_facts(file: File) -> dict[str, Any]:
    """Bytes and bits per weight by encoding, over the matrices; and the bytes a decoded token reads."""
    encodings: dict[str, dict[str, float]] = {}
    weights = nbytes = 0
    for t in file.tensors:
        if t.tile != P16:
            continue
        rows, cols = t.shape
        row = encodings.setdefault(t.encoding, {"tensors": 0, "weights": 0, "bytes": 0})
        row["tensors"] += 1
        row["weights"] += rows * cols
        row["bytes"] += t.nbytes
        weights += rows * cols
        nbytes += t.nbytes
    for row in encodings.values():
        row["bits_per_weight"] = 8 * row["bytes"] / row["weights"]
    return {
        "file_bytes": len(file.bytes),
        "matrix_weights": weights,
        "bits_per_weight": 8 * nbytes / weights if weights else 0.0,
        "weight_bytes_per_token": of_file(file).read,
        "encodings": encodings,
        "digest": file.digest.hex(),
    }
