"""Generation: feed a prompt, sample, stream text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.model import Model
from halfbyte.runtime.sampler import Sampler, Sampling
from halfbyte.runtime.session import Session


class Generation(Iterator[str]):
    """An answer in progress: iterate for pieces of text.

    ids: the tokens produced so far. finish_reason: None while running, then 'stop' (an end token or a
    stop string), 'length' (max_tokens) or 'context' (the model's context is full).
    """

    def __init__(self, model: Model, prompt_ids: list[int], max_tokens: int, sampling: Sampling,
                 stop: tuple[str, ...], session: Session | None):  # fmt: skip
        if max_tokens < 0:
            raise UsageError(f"max_tokens must not be negative, not {max_tokens}")
        self.session = session or model.session()
        if not prompt_ids and not self.session.position:
            raise UsageError("the prompt is empty and the model has no start token: give some text")
        self.model, self.prompt_ids, self.max_tokens, self.stop = model, prompt_ids, max_tokens, stop
        self.sampler = Sampler(sampling)
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self.prefill_seconds = self.decode_seconds = 0.0
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self) -> Iterator[str]:
        tokens = self._tokens()
        if not self.model.has_tokenizer:
            for token in tokens:
                yield f"{token} "
            return
        stream = self.model.tokenizer.stream()
        longest = max((len(s) for s in self.stop), default=0)
        held = ""  # text that could still turn out to be the start of a stop string
        for token in tokens:
            held += stream.push(token)
            cut = min((i for i in (held.find(s) for s in self.stop) if i >= 0), default=-1)
            if cut >= 0:
                self.finish_reason = "stop"
                if held[:cut]:
                    yield held[:cut]
                return
            keep = _overlap(held, self.stop) if longest else 0
            if len(held) > keep:
                yield held[: len(held) - keep]
                held = held[len(held) - keep :]
        held += stream.flush()
        if held:
            yield held

    def _tokens(self) -> Iterator[int]:
        eos = set(self.model.eos_ids)
        start = time.perf_counter()
        logits = self.session.feed(self.prompt_ids) if self.prompt_ids else None
        self.prefill_seconds = time.perf_counter() - start
        while True:
            if len(self.ids) >= self.max_tokens:
                self.finish_reason = "length"
                return
            start = time.perf_counter()
            if self.ids:
                if self.session.position >= self.model.context_length:
                    self.finish_reason = "context"
                    return
                logits = self.session.feed(self.ids[-1:])
            assert logits is not None
            token = self.sampler.sample(logits, self.session.ids)
            self.decode_seconds += time.perf_counter() - start
            if token in eos:
                self.finish_reason = "stop"
                return
            self.ids.append(token)
            yield token

    def speed(self) -> str:
        """One line: tokens and tokens per second of prompt and answer."""
        prompt, answer = len(self.prompt_ids), len(self.ids)
        parts = [f"prompt {prompt} tokens"]
        if self.prefill_seconds > 0:
            parts[0] += f" at {prompt / self.prefill_seconds:.1f} tokens/s"
        parts.append(f"answer {answer} tokens")
        if self.decode_seconds > 0 and answer:
            parts[1] += f" at {answer / self.decode_seconds:.1f} tokens/s"
        return ", ".join(parts)


def _overlap(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that a stop string starts with."""
    return max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


def generate(
    model: Model,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 64,
    stop: Sequence[str] = (),
    session: Session | None = None,
    special: bool = True,
    **sampling: Any,
) -> Generation:
    """Continue a prompt (text or token ids), yielding pieces of text that never split a character.

    sampling: the fields of `runtime.sampler.Sampling` (temperature, top_k, top_p, min_p, penalties,
    seed). stop: strings that end the answer and are not part of it. session: continue this one.
    special: whether special tokens written out in the prompt are recognised. A model without a
    tokenizer takes ids and yields ids as text.
    """
    unknown = set(sampling) - set(Sampling.__dataclass_fields__)
    if unknown:
        raise UsageError(f"unknown option {sorted(unknown)[0]!r} for generate")
    if isinstance(prompt, str):
        bos = None if session is None or not session.position else False
        ids = model.tokenizer.encode(prompt, bos=bos, special=special)
    else:
        ids = [int(i) for i in prompt]
    return Generation(model, ids, max_tokens, Sampling(**sampling), tuple(s for s in stop if s), session)
