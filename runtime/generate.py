"""Generation: feed a prompt, sample, stream text."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.model import Model
from halfbyte.runtime.sampler import Sampler, Sampling
from halfbyte.runtime.session import Session
from halfbyte.runtime.speculate import accept, check_draft, guesser
from halfbyte.runtime.stopping import StopStrings


class Generation(Iterator[str]):
    """An answer in progress: iterate for pieces of text.

    ids: the tokens produced so far. finish_reason: None while running, then 'stop' (an end token or a
    stop string), 'length' (max_tokens) or 'context' (the model's context is full).
    """

    def __init__(self, model: Model, prompt_ids: list[int], max_tokens: int, sampling: Sampling,
                 stop: tuple[str, ...], session: Session | None, lookup: int = 0,
                 shown: frozenset[int] = frozenset(), draft: Model | None = None):  # fmt: skip
        if max_tokens < 0:
            raise UsageError(f"max_tokens must not be negative, not {max_tokens}")
        self.session = session or model.session()
        if not prompt_ids and not self.session.position:
            raise UsageError("the prompt is empty and the model has no start token: give some text")
        self.model, self.prompt_ids, self.max_tokens, self.stop = model, prompt_ids, max_tokens, stop
        self.sampler = Sampler(sampling)
        if draft is not None:
            check_draft(model, draft)
        self.guesses = guesser((), lookup, model, draft)
        self.shown = shown
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self.prefill_seconds = self.decode_seconds = 0.0
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End here; the session holds the answer up to the token before the last one shown."""
        self._pieces.close()

    def _run(self) -> Generator[str, None, None]:
        tokens = self._tokens()
        if not self.model.has_tokenizer:
            for token in tokens:
                yield f"{token} "
            return
        stream, text = self.model.tokenizer.stream(True, self.shown), StopStrings(self.stop)
        try:
            for token in tokens:
                shown = text.push(stream.push(token))
                if text.found:
                    self.finish_reason = "stop"
                if shown:
                    yield shown
                if text.found:
                    return
            shown = text.push(stream.flush())
            if text.found:
                self.finish_reason = "stop"
            shown += text.flush()
            if shown:
                yield shown
        finally:
            tokens.close()

    def _tokens(self) -> Generator[int, None, None]:
        eos = set(self.model.eos_ids)
        start = time.perf_counter()
        logits = self.session.feed(self.prompt_ids)[None] if self.prompt_ids else None
        self.prefill_seconds = time.perf_counter() - start
        base, fed = self.session.position, 0  # the session shall hold the first `fed` tokens of the answer
        self.guesses.extend(self.session.ids)
        draft: list[int] = []
        try:
            while True:
                if len(self.ids) >= self.max_tokens:
                    self.finish_reason = "length"
                    return
                start = time.perf_counter()
                if self.ids:
                    room = self.model.context_length - self.session.position
                    if room <= 0:
                        self.finish_reason = "context"
                        return
                    draft = self.guesses.draft(min(room, self.max_tokens - len(self.ids)) - 1)
                    logits = self.session.feed_all([self.ids[-1], *draft])
                assert logits is not None
                fed = len(self.ids)
                drawn = accept(self.sampler, logits, draft, self.session.ids[: base + fed])
                self.session.rewind(len(draft) - (len(drawn) - 1))
                self.guesses.verified(len(draft), len(drawn) - 1)
                self.guesses.extend(drawn)
                self.decode_seconds += time.perf_counter() - start
                for token in drawn:
                    fed = len(self.ids)
                    if token in eos:
                        self.finish_reason = "stop"
                        return
                    self.ids.append(token)
                    yield token
        finally:  # guesses that were right but never shown
            self.session.rewind(max(0, self.session.position - base - fed))

    def speed(self) -> str:
        """One line: tokens and tokens per second of prompt and answer."""
        prompt, answer = len(self.prompt_ids), len(self.ids)
        parts = [f"prompt {prompt} tokens"]
        if self.prefill_seconds > 0:
            parts[0] += f" at {prompt / self.prefill_seconds:.1f} tokens/s"
        parts.append(f"answer {answer} tokens")
        if self.decode_seconds > 0 and answer:
            parts[1] += f" at {answer / self.decode_seconds:.1f} tokens/s"
        if self.guesses.guessed:
            parts.append(f"{self.guesses.right} of {self.guesses.guessed} guesses right")
        return ", ".join(parts)


def generate(
    model: Model,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 64,
    stop: Sequence[str] = (),
    session: Session | None = None,
    special: bool = True,
    lookup: int = 0,
    shown: frozenset[int] = frozenset(),
    draft: Model | None = None,
    **sampling: Any,
) -> Generation:
    """Continue a prompt (text or token ids), yielding pieces of text that never split a character.

    sampling: the fields of `runtime.sampler.Sampling` (temperature, top_k, top_p, min_p, penalties,
    seed). stop: strings that end the answer and are not part of it. session: continue this one.
    special: whether special tokens written out in the prompt are recognised. lookup: how many tokens a step
    may guess from the text so far (`runtime.speculate`), which makes copying faster and changes no answer.
    draft: a smaller model of the same tokenizer, which guesses up to lookup tokens (8 where lookup is 0) where the
    text does not; that changes no answer either. shown: special tokens that the text shows nevertheless. A model
    without a tokenizer takes ids and yields ids as text.
    """
    unknown = set(sampling) - set(Sampling.__dataclass_fields__)
    if unknown:
        raise UsageError(f"unknown option {sorted(unknown)[0]!r} for generate")
    if isinstance(prompt, str):
        bos = None if session is None or not session.position else False
        ids = model.tokenizer.encode(prompt, bos=bos, special=special)
    else:
        ids = [int(i) for i in prompt]
    stops = tuple(s for s in stop if s)
    return Generation(model, ids, max_tokens, Sampling(**sampling), stops, session, lookup, shown, draft)
