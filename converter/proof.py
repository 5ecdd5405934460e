"""The proof that a conversion writes into its file (SPEC.md section 13.1), computed on the finished bytes.

What is certain is always in it: where the weights come from, the recipe, the relative squared error of every matrix.
How close the answers are to the float model's is measured where that is cheap, or asked for.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.converter.allocation.table import bytes_of, matrices
from halfbyte.converter.blas import spans
from halfbyte.converter.builder import Matrix
from halfbyte.converter.checkpoints.checkpoint import Checkpoint
from halfbyte.converter.plan import OWN_TEXT_WEIGHTS, Plan, Progress
from halfbyte.converter.weights import Weights
from halfbyte.formats import container, proof, tiles
from halfbyte.formats.errors import HalfbyteError, UsageError

BLOCK_WEIGHTS = 1 << 22  # weights compared at once
READ = 1 << 22  # bytes of a source file hashed at once
WHY = 200  # characters of a reason, at most
WIDEST = -1.2345e-300  # no number of a proof takes more characters

LARGE = "the model is large; convert with --proof"
NO_TOKENIZER = "the model has no tokenizer"


def prover(
    plan: Plan,
    checkpoint: Checkpoint,
    wanted: bool | None,
    options: Mapping[str, Any],
    *,
    heldout: str | os.PathLike[str] | None,
    unused: bool,
    save: str | os.PathLike[str] | None,
    **inputs: Any,
) -> Prover | None:
    """What proves a conversion, None where no proof is `wanted`; see `Prover`. Raises UsageError.

    unused: whether the proof is all that the held-out text is for.
    """
    if wanted is False:
        if save is not None or unused:
            raise UsageError("--heldout and --save-heldout are for the proof, which --no-proof leaves out")
        return None
    return Prover(
        plan,
        checkpoint,
        options,
        measure=wanted,
        heldout=None if heldout is None else Path(heldout),
        save=None if save is None else Path(save),
        **inputs,
    )


class Prover:
    """Made before anything is written, so that a held-out text that cannot be used is found at once.

    plan: the conversion; checkpoint: what it started from, with nothing folded in. options: what was asked for besides
    recipe and method, by name. measure: compare answers with the float model; None does so for models of up to
    OWN_TEXT_WEIGHTS weights. heldout: the text to do it on, which says measure; by default what the float model writes
    itself (small models), else a text of ours. save: where to write the text that was used; calibrate: the text of the
    calibration, if one was given. Raises UsageError.
    """

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        options: Mapping[str, Any],
        *,
        measure: bool | None = None,
        heldout: Path | None = None,
        save: Path | None = None,
        calibrate: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ):
        from halfbyte.converter import evaluate

        self.plan, self.checkpoint, self.save, self.progress = plan, checkpoint, save, progress
        self.options = {k: v for k, v in options.items() if v}
        if calibrate is not None:
            text = Path(calibrate)
            self.options["calibrate"] = {"name": text.name, "sha256": sha256_of(text)}
        weights = sum(int(np.prod(t.shape)) for t in plan.b.tensors)
        self.small = weights <= OWN_TEXT_WEIGHTS
        self.why_not = ""
        if not (measure or heldout or save or self.small):
            self.why_not = LARGE
        elif not plan.tokenizer:
            self.why_not = NO_TOKENIZER
        if self.why_not and (heldout or save):
            raise UsageError(f"nothing can be measured on a held-out text: {self.why_not}")
        self.heldout = None if heldout is None else evaluate.given(plan, heldout)
        if save and self.heldout and self.heldout.ids:
            raise UsageError(f"{heldout} holds chats, so there is no text for --save-heldout")
        if save and (save.is_dir() or not save.parent.is_dir()):
            raise UsageError(f"{save}: cannot write there")

    def __call__(self, path: Path) -> bytes:
        """The section for the sealed file at `path`. What cannot be measured is left out, with the reason."""
        file = container.File(path)
        made = self._made(file, *_errors(file, self.plan, self.progress))
        closeness, why_not = None, self.why_not
        if not why_not:
            try:
                closeness = self._closeness(path)
            except HalfbyteError as error:
                why_not = str(error)
            except MemoryError:
                why_not = "there was not enough memory"
            except OSError as error:
                why_not = error.strerror or "the disk cannot be read"
        why_not = " ".join(why_not.split())[:WHY]
        return proof.Proof(**made, closeness=closeness, why_not=why_not).encode()

    def room(self) -> int:
        """Bytes that the section will have at most, with the storages that the matrices have now."""
        from halfbyte.converter import evaluate

        found = [
            proof.MatrixError(t.name, t.storage.encoding, 8 * bytes_of(t) / (t.shape[0] * t.shape[1]), WIDEST)
            for t in matrices(self.plan.b)
        ]
        closeness = None if self.why_not else evaluate.widest(self.heldout, WIDEST)
        made = self._made(None, found, WIDEST)
        return len(proof.Proof(**made, closeness=closeness, why_not=self.why_not).encode())

    def _made(
        self, file: container.File | None, found: list[proof.MatrixError], error: float
    ) -> dict[str, Any]:
        b, meta = self.plan.b, self.plan.meta
        total = sum(t.shape[0] * t.shape[1] for t in matrices(b))
        version = container.VERSION if file is None else file.version
        named = {"name": str(meta.get("general.recipe", "")), "method": self.plan.method}
        return {
            "tool": f"halfbyte {meta.get('general.tool_version', '')}",
            "format": ".".join(map(str, version)),
            "source": {
                "format": self.checkpoint.format,
                "digest": str(meta.get("general.source_digest", "")),
                "files": _files(self.checkpoint, hashes=file is not None),
            },
            "recipe": named | self.options,
            "bits": 8 * sum(map(bytes_of, matrices(b))) / total if total else 0.0,
            "error": error,
            "matrices": found,
        }

    def _closeness(self, path: Path) -> proof.Closeness:
        from halfbyte.converter import evaluate

        with tempfile.TemporaryDirectory(prefix=".halfbyte-", dir=path.parent) as folder:
            try:
                return evaluate.measure(
                    path,
                    self.plan,
                    self.checkpoint,
                    Path(folder),
                    heldout=self.heldout,
                    own=self.small,
                    save=self.save,
                    progress=self.progress,
                )
            except HalfbyteError as error:
                raise type(error)(str(error).replace(f"{folder}/", "")) from None


def _errors(
    file: container.File, plan: Plan, progress: Progress | None
) -> tuple[list[proof.MatrixError], float]:
    """Of every matrix, and of all of them together; memory is a block of rows."""
    stored = {t.name: t for t in file.tensors}
    wanted = matrices(plan.b)
    found, off, norm = [], 0.0, 0.0
    for done, t in enumerate(wanted):
        a, b = _squares(file, stored[t.name], t, plan.weights)
        off, norm = off + a, norm + b
        bits = 8 * stored[t.name].nbytes / (t.shape[0] * t.shape[1])
        found.append(proof.MatrixError(t.name, t.storage.encoding, bits, a / b if b else 0.0))
        if progress:
            progress(f"error of {t.name}", done + 1, len(wanted))
    return found, off / norm if norm else 0.0


def _squares(
    file: container.File, stored: container.Tensor, t: Matrix, weights: Weights
) -> tuple[float, float]:
    """Sums of |w - w_hat|^2 and |w|^2."""
    off = norm = 0.0
    for block in spans(
        t.shape[0], max(tiles.PANEL, BLOCK_WEIGHTS // t.shape[1] // tiles.PANEL * tiles.PANEL)
    ):
        w = weights.rows(t, block.start, block.stop)
        off += float(((w - file.dequantize(stored, block.start, block.stop)) ** 2).sum(dtype=np.float64))
        norm += float((w**2).sum(dtype=np.float64))
    return off, norm


def _files(checkpoint: Checkpoint, hashes: bool) -> list[dict[str, Any]]:
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    return [
        {"name": name, "bytes": n, "sha256": sha256_of(folder / name) if hashes else "0" * 64}
        for name, n in sorted(checkpoint.sizes())
    ]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises UsageError where it cannot be read."""
    h = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while data := file.read(READ):
                h.update(data)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    return h.hexdigest()
