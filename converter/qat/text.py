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
from halfbyte.converter.calibration.own_text import own_text
from halfbyte.converter.qat.options import Options
from halfbyte.converter.weights import Weights
from halfbyte.formats.errors import UsageError

HELD_OUT = 16  # of so many sequences one is kept for measuring, where no held-out text is given
STREAMS = 128  # documents of its own that the float model writes at once, at most
SHARE = 1 / 3  # of the sequences are the texts given, repeated for that
TIMES = 4  # at most
SEED = 1000  # of them, plus a large multiple of the option: no other own text has it

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

    What it writes is read like any other text, documents with blank lines between them, in windows: `own_text` of
    them, give or take a few. The sequences of the texts come several times where they are few (`SHARE`).

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
    given = len(found)
    count = options.own_text
    if count and tokenizer:
        with tempfile.TemporaryDirectory(prefix=".halfbyte-", dir=folder) as temporary:
            path, own = Path(temporary) / "float.hb", Path(temporary) / "own.txt"
            assemble_float(b, path, meta, tokenizer, Weights(b))
            seed = options.seed * 1_000_003 + SEED
            written = own_text(path, count * length, seed, min(STREAMS, count))
            if written.strip():
                own.write_text(written, encoding="utf-8", newline="")
                found += read(own)
    if heldout is not None:
        measured = read(heldout)
    else:
        measured = found[HELD_OUT - 1 :: HELD_OUT]
        found = [s for i, s in enumerate(found) if i % HELD_OUT != HELD_OUT - 1]
        given -= given // HELD_OUT
    if not found or not measured:
        raise UsageError(f"too little text to train on; give --text with {HELD_OUT * length} tokens or more")
    if 0 < given < len(found):
        times = round(SHARE / (1 - SHARE) * (len(found) - given) / given)
        found += (min(times, TIMES) - 1) * found[:given]
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
