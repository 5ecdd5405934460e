"""How close a converted file's answers are to the float model's, on a text that it was not calibrated on.

The float model is the same program with every matrix in the type that its checkpoint has (codes that arrived quantised
as f32, of large models f16), before anything was folded into it. Both run under the default policy, as in
`halfbyte eval FILE --against FLOAT --text TEXT`, which gives the same numbers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfbyte.converter import models
from halfbyte.converter.assemble import assemble
from halfbyte.converter.builder import Builder
from halfbyte.converter.calibrate import LENGTH, sequences, tokenizer_of
from halfbyte.converter.calibration.own_text import own_text
from halfbyte.converter.checkpoints.checkpoint import Checkpoint
from halfbyte.converter.plan import Plan, Progress
from halfbyte.converter.recipe import Recipe, Storage
from halfbyte.formats.errors import HalfbyteError, UsageError
from halfbyte.formats.proof import BINS, Closeness, histogram

BUILT_IN = Path(__file__).parent / "calibration" / "heldout.txt"
OWN, OURS = "the model's own text", "built-in text"
SEED, TOKENS, STREAMS = 1, 4096, 8  # of the model's own text; calibration has seed 0
FLOATS = ("f32", "f16", "bf16")
NOT_FINITE = "the model's output is not finite"


@dataclass(frozen=True)
class HeldOut:
    """What is measured on: a text, or (chats) sequences of token ids."""

    name: str
    text: str
    sha256: str
    ids: Sequence[Sequence[int]] = ()

    @classmethod
    def of(cls, name: str, text: str) -> HeldOut:
        """A text."""
        return cls(name, text, hashlib.sha256(text.encode()).hexdigest())


def given(plan: Plan, path: Path) -> HeldOut:
    """The file that a user gave: a text, all of it, or a `.jsonl` of chats. Raises UsageError if it cannot be used."""
    tokenizer = tokenizer_of(plan.tokenizer, plan.meta)
    ids = sequences(tokenizer, plan.template, path, plan.b.context_limit)
    data = path.read_bytes()
    if path.suffix == ".jsonl":
        return HeldOut(path.name, "", hashlib.sha256(data).hexdigest(), ids)
    return HeldOut.of(path.name, data.decode())


class _AsTrained(Recipe):
    """Floats in their own type; codes become the type that names the recipe."""

    def storage(self, dtype: str, group: int = 0, scale_type: str = "") -> Storage:
        own = "f32" if dtype == "f64" else dtype
        return Storage(own if own in FLOATS else self.name)


def write_float(plan: Plan, checkpoint: Checkpoint, path: Path, small: bool) -> None:
    """Write the model of a conversion as it was trained."""
    b = Builder(checkpoint, _AsTrained("f32" if small else "f16"), plan.b.context)
    models.build(b)
    assemble(b, path, plan.meta, plan.tokenizer, plan.template, lambda name, count: None)


def measure(
    path: Path,
    plan: Plan,
    checkpoint: Checkpoint,
    folder: Path,
    *,
    heldout: HeldOut | None,
    own: bool,
    save: Path | None,
    progress: Progress | None,
) -> Closeness:
    """Compare the file at `path` with the float model of its checkpoint, written to `folder`.

    heldout: the text, by default the float model's `own` where it writes one, else ours. Raises HalfbyteError.
    """
    from halfbyte.runtime.evaluate import measure as compare
    from halfbyte.runtime.evaluate import windows
    from halfbyte.runtime.model import load

    float_path = folder / "float.hb"
    write_float(plan, checkpoint, float_path, own)
    model, against = load(path), load(float_path)
    ctx = min(LENGTH, model.context_length)
    if ctx < 2:
        raise UsageError("the context holds no two tokens")
    text = heldout or HeldOut.of(OWN, own_text(float_path, TOKENS, SEED, STREAMS) if own else "")
    parts = text.ids or windows(model.tokenizer, text.text, ctx)
    if not parts and not heldout:
        text = HeldOut.of(OURS, BUILT_IN.read_text(encoding="utf-8"))
        parts = windows(model.tokenizer, text.text, ctx)
    if not parts:
        raise UsageError("the text is too short: it needs at least two tokens")

    def report(done: int, total: int) -> None:
        if progress:
            progress("held-out text", done, total)

    found = compare(model, parts, against=against, progress=report)
    if not np.isfinite([found["nll_per_token"], found["against_nll_per_token"], found["kld_max"]]).all():
        raise HalfbyteError(NOT_FINITE)
    if save is not None:
        _save(save, text.text)
    return Closeness(
        text=text.name,
        sha256=text.sha256,
        tokens=found["tokens"],
        ctx=ctx,
        policy=model.policy,
        kv=model.kv_mode,
        float_kv=against.kv_mode,
        nll=found["nll_per_token"],
        float_nll=found["against_nll_per_token"],
        ppl=found["ppl"],
        float_ppl=found["against_ppl"],
        kld_mean=found["kld_mean"],
        kld_p99=found["kld_p99"],
        kld_max=found["kld_max"],
        top1_agreement=found["top1_agreement"],
        kld_histogram=histogram(found["kld"]),
    )


def _save(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(text, encoding="utf-8", newline="")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UsageError(f"{path}: {error.strerror or error}") from None


def widest(heldout: HeldOut | None, number: float) -> Closeness:
    """A closeness that takes more bytes than any that is measured on this text: all its numbers are `number`."""
    name = heldout.name if heldout else max(OWN, OURS, key=len)
    tokens = max(10**6, 4 * len(heldout.text)) if heldout else 10**6
    return Closeness(
        text=name,
        sha256="0" * 64,
        tokens=tokens,
        ctx=LENGTH,
        policy="i8g32",
        kv="f16",
        float_kv="f16",
        nll=number,
        float_nll=number,
        ppl=number,
        float_ppl=number,
        kld_mean=number,
        kld_p99=number,
        kld_max=number,
        top1_agreement=number,
        kld_histogram=(tokens,) * BINS,
    )
