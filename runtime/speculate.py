"""Speculation: drafts are looked up in the text so far, or made by a smaller model, and verified in one step.

Prompt lookup (Saxena 2023): when the last tokens occurred before, what followed them then is a good guess. All
guesses go through the model in one step, and the sampler then draws position by position, going on while
it draws what was guessed. Logits do not depend on how many rows a step has, and the sampler is the same one
in the same order, so the answer is the one that comes without drafts: under greedy and for any seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.sampler import Sampler

if TYPE_CHECKING:
    from halfbyte.runtime.kv import KV
    from halfbyte.runtime.model import Model
    from halfbyte.runtime.session import Session

MAX_DRAFT = 64
_LENGTHS = (4, 3, 2)  # of the n-grams looked up, longest first
_FIRST_TRY = 4  # guesses at first; doubled while all are right, halved when less than half are
_LEAST_AHEAD = 4  # guesses that a step must have room for before a smaller model is asked


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

    @property
    def kv(self) -> KV | None:
        """Keys and values that the guesses need, none here."""
        return None

    def release(self) -> None:
        """Let go of `kv`."""

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


class Ahead(Lookup):
    """Guesses by n-grams, and where there is none by a smaller model of the same tokenizer, greedily.

    draft  the smaller model; it has a session of its own, which follows the certain tokens, from the first guess on
    vocab  rows of the larger model's logits; padding of the smaller one's beyond is never guessed
    """

    def __init__(self, ids: Iterable[int], limit: int, draft: Model, vocab: int):
        super().__init__((), limit)
        self._model, self._vocab = draft, vocab
        self._session: Session | None = None
        self.asks = True  # whether the model may be asked; a server with no memory for that says no
        self.extend(ids)

    @property
    def kv(self) -> KV | None:
        """Keys and values of the smaller model, if it was asked."""
        return None if self._session is None else self._session.kv

    def draft(self, limit: int = MAX_DRAFT) -> list[int]:
        """Guesses of the next tokens, at most `limit`."""
        found = super().draft(limit)
        # A server shares few guesses among many answers, which are not worth a model's steps.
        if limit < _LEAST_AHEAD or not self.asks:
            self.release()
            return found
        limit = min(limit, self._try)
        if found or limit <= 0 or not self._ids:
            return found
        known, model = self._ids, self._model
        session = self._session or model.session()
        room = model.context_length - len(known)
        held = min(_common(session.ids, known), len(known) - 1)
        if room <= 0 or max(known[held:]) >= model.vocab_size:
            return []
        self._session = session
        session.rewind(session.position - held)
        logits = session.feed(known[held:])
        for i in range(min(limit, room)):
            found.append(int(logits[: self._vocab].argmax()))
            if i + 1 < min(limit, room):
                logits = session.feed(found[-1:])
        return found

    def release(self) -> None:
        """Let go of the session's memory; the next draft feeds the tokens again."""
        self._session = None


def guesser(ids: Iterable[int], limit: int, model: Model, draft: Model | None) -> Lookup:
    """What guesses the tokens of `model`: with a draft model, which passes `check_draft`, up to 8 by default."""
    return Lookup(ids, limit) if draft is None else Ahead(ids, limit or 8, draft, model.vocab_size)


def check_draft(model: Model, draft: Model) -> None:
    """Raises UsageError unless both models have the same tokens."""
    mine, other = (m.tokenizer if m.has_tokenizer else None for m in (model, draft))
    if mine is None or other is None or not mine.same_tokens(other):
        raise UsageError("the draft model has another tokenizer: its guesses would mean something else")


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common start."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


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
