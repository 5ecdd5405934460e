"""Speculation without a second model: drafts are looked up in the text so far, and verified in one step.

Prompt lookup (Saxena 2023): when the last tokens occurred before, what followed them then is a good guess. All
guesses go through the model in one step, and the sampler then draws position by position, going on while
it draws what was guessed. Logits do not depend on how many rows a step has, and the sampler is the same one
in the same order, so the answer is the one that comes without drafts: under greedy and for any seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.sampler import Sampler

MAX_DRAFT = 64
_LENGTHS = (4, 3, 2)  # of the n-grams looked up, longest first
_FIRST_TRY = 4  # guesses at first; doubled while all are right, halved when less than half are


class Lookup:
    """Guesses by n-grams of one growing sequence.

    ids    the tokens so far
    limit  guesses at most, 0 .. MAX_DRAFT; 0 never guesses
    """

    def __init__(self, ids: Iterable[int], limit: int):
        if isinstance(limit, bool) or not isinstance(limit, int) or not 0 <= limit <= MAX_DRAFT:
            raise UsageError(f"lookup must be a whole number between 0 and {MAX_DRAFT}, not {limit!r}")
        self.limit = limit
        self.guessed = self.right = 0
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest continuation starts
        self._try = min(_FIRST_TRY, limit)
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Tokens that became certain."""
        if not self.limit:
            return
        known = self._ids
        for token in ids:
            end = len(known)
            for n in _LENGTHS:
                if end >= n:
                    self._after[tuple(known[end - n :])] = end
            known.append(token)

    def draft(self, limit: int = MAX_DRAFT) -> list[int]:
        """Guesses of the next tokens, at most `limit`; often none."""
        limit = min(limit, self._try)
        if limit <= 0:
            return []
        for n in _LENGTHS:
            at = self._after.get(tuple(self._ids[-n:])) if len(self._ids) >= n else None
            if at is not None:
                period = len(self._ids) - at  # a guess beyond the end repeats the guess itself
                return [self._ids[at + i % period] for i in range(limit)]
        return []

    def verified(self, guessed: int, right: int) -> None:
        """How many guesses of the last draft were right; later drafts grow or shrink."""
        if not guessed:
            return
        self.guessed += guessed
        self.right += right
        if right == guessed:
            self._try = min(2 * self._try, self.limit)
        elif 2 * right < guessed:
            self._try = max(self._try // 2, 1)


def accept(
    sampler: Sampler,
    logits: np.ndarray,
    draft: Sequence[int],
    history: Sequence[int],
    allow: Callable[[np.ndarray, int], np.ndarray] | None = None,
) -> list[int]:
    """The tokens that come without drafts: those guessed right, and the first that was not guessed.

    logits   [len(draft) + 1, vocab], after the last certain token and after each guess
    history  ids up to and with the last certain token
    allow    (row of logits, how many tokens were drawn before) -> the row with forbidden tokens at -inf
    """
    drawn: list[int] = []
    seen = list(history) if sampler.sampling.penalizes else []
    for i, row in enumerate(logits):
        token = sampler.sample(row if allow is None else allow(row, i), seen)
        drawn.append(token)
        if i == len(draft) or token != draft[i]:
            break
        if sampler.sampling.penalizes:
            seen.append(token)
    return drawn
