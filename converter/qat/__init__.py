"""Quantisation-aware training: a checkpoint in, a `.hb` file out whose codes were trained (extra `qat`: PyTorch)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from halfbyte.formats.errors import UsageError

__all__ = ["train_qat"]

Progress = Callable[[str, int, int], None]


def train_qat(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    text: Sequence[str | os.PathLike[str]] = (),
    heldout: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    context: int | None = None,
    proof: bool | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a checkpoint with its weights fake-quantised, write the file, and return how training went.

    source, tokenizer, context, proof: as in `halfbyte.convert`. text: files to train on, as for calibration, beside
    what the float model writes itself (option own_text). heldout: a text that decides which step is
    kept, by default a sixteenth of the sequences, not trained on. options: see `converter.qat.options.Options`.

    The codes and scales of the file are those of the graph that was trained, bit for bit. A checkpoint
    `.OUT.qat` beside the file is replaced every `every` steps; with `resume` training goes on from it and computes the
    same numbers. It goes when the file is written.

    Returns step and nll of the weights kept, measured [(step, held-out nll, held-out KL)], and the curve of losses.
    Raises UsageError (also without PyTorch) or CheckpointError, each in one line.
    """
    from halfbyte.converter.qat.options import Options

    known = Options.__dataclass_fields__.keys()
    if options.keys() - known:
        raise TypeError(f"unknown option {sorted(options.keys() - known)[0]!r}")
    asked = Options(**options)
    asked.check()
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UsageError("training needs PyTorch: pip install 'halfbyte[qat]'") from None
    from halfbyte.converter.qat.run import run

    return run(
        Path(source),
        Path(out),
        asked,
        texts=[Path(t) for t in text],
        heldout=None if heldout is None else Path(heldout),
        tokenizer=None if tokenizer is None else Path(tokenizer),
        context=context,
        proof=proof,
        resume=resume,
        progress=progress,
        note=note,
    )
