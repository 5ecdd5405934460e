"""What is trained and measured on: sequences of tokens, and the batch of every step."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.converter.assemble import assemble_float
from halfbyte.converter.builder import Builder
from halfbyte.converter.qat.options import Options
from halfbyte.converter.weights import Weights
from halfbyte.formats.errors import UsageError

HELD_OUT = 16  # of so many sequences one is kept for measuring, where no held-out text is given
ROUND = 128  # sequences written at once

Sequences = list[list[int]]


def sequences(
    b: Builder,
    meta: dict[str, Any],
    tokenizer: bytes,
    template: str,
    options: Options,
    texts: Sequence[Path],
    heldout: Path | None,
    folder: Path,
) -> tuple[Sequences, Sequences]:
    """(to train on, held out) of texts, then of the float model itself, which is written to `folder` meanwhile.

    Raises UsageError for texts that cannot be used and where there is too little.
    """
    from halfbyte.converter import calibrate

    if not tokenizer and (texts or heldout):
        raise UsageError("a text needs a tokenizer, and the model has none")
    reader = calibrate.tokenizer_of(tokenizer, meta) if tokenizer else None
    length = min(options.length, b.context_limit)

    def read(path: Path) -> Sequences:
        assert reader is not None
        return calibrate.sequences(reader, template, path, length, None)

    found = [s for path in texts for s in read(path)]
    count = options.own_text
    if count and tokenizer:
        with tempfile.TemporaryDirectory(prefix=".halfbyte-", dir=folder) as temporary:
            path = Path(temporary) / "float.hb"
            assemble_float(b, path, meta, tokenizer, Weights(b))
            for i, start in enumerate(range(0, count, ROUND)):
                seed = options.seed * 1_000_003 + i + 1000
                found += calibrate.own_text(path, length, min(ROUND, count - start), seed)
    if heldout is not None:
        measured = read(heldout)
    else:
        measured = found[HELD_OUT - 1 :: HELD_OUT]
        found = [s for i, s in enumerate(found) if i % HELD_OUT != HELD_OUT - 1]
    if not found or not measured:
        raise UsageError(f"too little text to train on; give --text with {HELD_OUT * length} tokens or more")
    return found, measured


def batch(n: int, step: int, size: int, seed: int) -> list[int]:
    """Which of n sequences a step sees.

    A function of its arguments: every epoch has a permutation of its own, so that a training can go on anywhere.
    """
    chosen = []
    for at in range(step * size, (step + 1) * size):
        epoch, i = divmod(at, n)
        chosen.append(int(np.random.default_rng([seed, epoch]).permutation(n)[i]))
    return chosen


def padded(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """(ids int64[sequences, T], targets bool[sequences, T - 1]): side by side, short ones filled up on the right."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    real = torch.zeros(len(sequences), longest - 1, dtype=torch.bool)
    for i, s in enumerate(sequences):
        ids[i, : len(s)] = torch.tensor(s)
        real[i, : len(s) - 1] = True
    return ids, real
