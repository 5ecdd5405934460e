"""One answer in progress, and what a client hears of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from halfbyte.runtime.constrain import Grammar
from halfbyte.runtime.kv import KV
from halfbyte.runtime.model import Model
from halfbyte.runtime.sampler import Sampler, Sampling, logprobs
from halfbyte.runtime.speculate import accept, guesser
from halfbyte.runtime.stopping import StopStrings


@dataclass(frozen=True)
class Request:
    """What a client wants of the model.

    prompt        token ids, at least one, shorter than the context
    max_tokens    of each answer, at least 0
    stop          strings that end an answer and are not shown
    n             answers; answer i draws with seed + i, so the first is what n=1 gives
    top_logprobs  None for no log probabilities, else how many of the likeliest tokens to tell
    grammar       what the answers must match
    lookup        tokens guessed at most in a step; changes no answer
    shown         special tokens that the text shows nevertheless
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    n: int = 1
    top_logprobs: int | None = None
    grammar: Grammar | None = None
    lookup: int = 0
    shown: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Token:
    """A token of answer `choice`; `text` is what became certain with it; `at`: when, by time.perf_counter."""

    choice: int
    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    at: float = field(default_factory=time.perf_counter, compare=False)


@dataclass(frozen=True)
class Finished:
    """Answer `choice` ended: 'stop', 'length' or 'context'. `text` is what was held back."""

    choice: int
    reason: str
    text: str = ""


@dataclass(frozen=True)
class Failed:
    """The whole request ended without an answer. kind: 'timeout', 'shutdown', 'request' or 'bug'."""

    kind: str
    message: str


Event = Token | Finished | Failed


class Ticket:
    """A request that the engine took; `cancel` it from any thread."""

    def __init__(self, request: Request, deliver: Callable[[list[Event]], None], deadline: float | None):
        self.request, self.deliver, self.deadline = request, deliver, deadline
        self.cancelled = False
        self.submitted = time.monotonic()
        self.first_token: float | None = None
        self.cached_tokens = 0
        self.outbox: list[Event] = []
        self.open = request.n  # answers not finished

    def cancel(self) -> None:
        """Stop at the next step; nothing more is delivered."""
        self.cancelled = True

    def flush(self) -> None:
        """Hand over what was produced. A client that cannot be reached any more is cancelled."""
        events, self.outbox = self.outbox, []
        if events and not self.cancelled:
            try:
                self.deliver(events)
            except RuntimeError:  # its event loop is closed
                self.cancelled = True


class Answer:
    """An answer: `ids` are the prompt and the tokens drawn, of which the first `fed` are in `kv`.

    With everything fed but the drawn token, it decodes; with more to feed, it fills. A sequence whose keys and
    values were taken away is one that fills again, and goes on as if nothing had happened.
    """

    def __init__(self, model: Model, ticket: Ticket, choice: int, draft: Model | None = None):
        request = ticket.request
        self.model, self.ticket, self.request, self.choice = model, ticket, request, choice
        self.ids = list(request.prompt)
        self.kv: KV | None = None
        self.fed = 0
        how = request.sampling
        if choice:
            how = Sampling(**{**how.__dict__, "seed": (how.seed + choice) % 2**64})
        self.sampler = Sampler(how)
        self.guesses = guesser(self.ids, request.lookup, model, draft)
        self.matcher = request.grammar.matcher() if request.grammar else None
        self.draft: list[int] = []
        self.finished = False
        self.followers: list[Answer] = []  # answers that wait for this one's prompt
        self._stop = StopStrings(request.stop)
        self._stream = model.tokenizer.stream(True, request.shown) if model.has_tokenizer else None
        self._eos = frozenset(model.eos_ids)

    @property
    def pending(self) -> int:
        """Tokens to feed before the next one can be drawn; 1 while decoding."""
        return len(self.ids) - self.fed

    @property
    def produced(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - len(self.request.prompt)

    def guess(self, limit: int) -> None:
        """Set `draft` for the next step: at most `limit` tokens."""
        room = min(self.model.context_length - len(self.ids), self.request.max_tokens - self.produced - 1)
        draft = self.guesses.draft(min(limit, room))
        ends = [i for i, token in enumerate(draft) if token in self._eos]
        draft = draft[: ends[0]] if ends else draft
        if self.matcher and draft:
            draft = draft[: self.matcher.count_valid(draft)]
        self.draft = draft

    def begin(self) -> None:
        """Before the first draw: an answer of no tokens is finished."""
        if self.request.max_tokens == 0:
            self._finish("length")

    def advance(self, logits: np.ndarray) -> None:
        """Draw from float32[len(draft) + 1, vocab], the logits after the last token and after each guess."""
        draft, self.draft = self.draft, []
        start = len(self.ids)
        drawn = accept(self.sampler, logits, draft, self.ids, self._allow(draft) if self.matcher else None)
        assert self.kv is not None
        self.fed = start + len(drawn) - 1
        if len(drawn) <= len(draft):
            self.kv.truncate(self.fed)
        self.guesses.verified(len(draft), len(drawn) - 1)
        self.guesses.extend(drawn)
        for row, token in zip(logits, drawn):
            if token in self._eos:
                return self._finish("stop")
            self._take(token, row)
            if self.finished:
                return
        if self.matcher and self.matcher.consume(drawn[-1]):
            return self._finish("stop")
        if self.produced >= self.request.max_tokens:
            return self._finish("length")
        if len(self.ids) > self.model.context_length:
            return self._finish("context")

    def _allow(self, draft: list[int]) -> Callable[[np.ndarray, int], np.ndarray]:
        matcher = self.matcher
        assert matcher is not None

        def allow(row: np.ndarray, i: int) -> np.ndarray:
            if i:
                matcher.consume(draft[i - 1])
            return matcher.masked(row)

        return allow

    def _take(self, token: int, row: np.ndarray) -> None:
        self.ids.append(token)
        if self._stream is None:
            shown = f"{token} "
        else:
            shown = self._stop.push(self._stream.push(token))
        top = self.request.top_logprobs
        if top is None:
            self.ticket.outbox.append(Token(self.choice, token, shown))
        else:
            value, best = logprobs(row, token, top)
            self.ticket.outbox.append(Token(self.choice, token, shown, value, tuple(best)))
        if self._stop.found:
            self._finish("stop")

    def _finish(self, reason: str) -> None:
        text = ""
        if self._stream is not None and not self._stop.found:
            text = self._stop.push(self._stream.flush())
            reason = "stop" if self._stop.found else reason
            text += self._stop.flush()
        self.finished = True
        self.ticket.open -= 1
        self.ticket.outbox.append(Finished(self.choice, reason, text))
