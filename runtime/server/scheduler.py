"""Which rows the next step carries: one for every answer that decodes, guesses while rows are cheap, and the
rest of the step for prompts, oldest first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from halfbyte.runtime.backends.backend import Step
from halfbyte.runtime.model import CHUNK
from halfbyte.runtime.server.answer import Answer

DRAFT_ROWS = 24  # rows of decoding up to which more rows cost little: the weights are read once for all


def plan(answers: Sequence[Answer]) -> list[tuple[Answer, int]]:
    """(answer, tokens of its `ids` to feed) for the next step; sets the guesses of those that decode."""
    decoding = [a for a in answers if a.pending == 1]
    free = CHUNK - len(decoding)
    share = max(0, DRAFT_ROWS - len(decoding)) // max(1, len(decoding))
    chosen = []
    for answer in decoding:
        answer.guess(min(share, free))
        free -= len(answer.draft)
        chosen.append((answer, 1))
    for answer in answers:
        if answer.pending > 1 and free > 0:
            rows = min(answer.pending, free)
            free -= rows
            chosen.append((answer, rows))
    return chosen


def build(chosen: Sequence[tuple[Answer, int]]) -> Step:
    """One step of these rows and their guesses; logits for what is drawn from, in order."""
    ids: list[int] = []
    positions: list[np.ndarray] = []
    sessions: list[np.ndarray] = []
    picks: list[int] = []
    kvs = []
    for i, (answer, rows) in enumerate(chosen):
        assert answer.kv is not None
        total = rows + len(answer.draft)
        first = len(ids)
        ids += answer.ids[answer.fed : answer.fed + rows] + answer.draft
        if rows == answer.pending:
            picks += range(first + rows - 1, first + total)
        positions.append(np.arange(answer.fed, answer.fed + total, dtype=np.int32))
        sessions.append(np.full(total, i, np.int32))
        kvs.append(answer.kv)
    return Step(
        np.asarray(ids, np.int32),
        np.concatenate(positions),
        np.concatenate(sessions),
        np.asarray(picks, np.int32),
        kvs,
    )
