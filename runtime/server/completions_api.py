"""/v1/completions: text in, text out."""

from __future__ import annotations

from typing import Any

from halfbyte.runtime.server import fields as read
from halfbyte.runtime.server.answer import Finished, Request, Token
from halfbyte.runtime.server.chat_api import finite
from halfbyte.runtime.server.fields import Fields
from halfbyte.runtime.server.reply import REASONS, Reply, Service

DEFAULT_TOKENS = 16  # as OpenAI's


def prompt_of(service: Service, body: Fields) -> list[int]:
    """Token ids of one prompt: text, token ids, or a list of one of either."""
    value = body.values.get("prompt")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str):
        return service.model.tokenizer.encode(value)
    if not isinstance(value, list) or not value:
        raise body.wrong("prompt", "must be one text or one list of token ids")
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        raise body.wrong(
            "prompt", "must be one text or one list of token ids; several prompts are not supported"
        )
    if not all(0 <= i < service.model.vocab_size for i in value):
        raise body.wrong("prompt", f"must have token ids in 0..{service.model.vocab_size - 1}")
    return value


class CompletionReply(Reply):
    """An answer of /v1/completions."""

    def __init__(self, service: Service, body: Fields):
        body.unsupported("suffix", "echo")
        n = body.whole("n", 1, 1, service.max_n)
        if body.whole("best_of", n, 1, service.max_n) != n:
            raise body.wrong("best_of", "is not supported by this server")
        ids = service.checked_prompt(prompt_of(service, body))
        top = body.whole("logprobs", 0, 0, read.MAX_TOP) if body.has("logprobs") else None
        request = Request(
            ids,
            service.tokens_allowed(body, ("max_tokens",), len(ids), DEFAULT_TOKENS),
            read.sampling(body),
            read.stops(body),
            n,
            top,
            service.response_format(body.object("response_format")),
            service.lookup,
        )
        super().__init__(service, request, body.flag("stream"), "cmpl-")
        options = body.object("stream_options")
        self._tell_usage = bool(options and options.flag("include_usage"))
        self._texts = [""] * n
        self._reasons = [""] * n
        self._logprobs = [_no_logprobs() for _ in range(n)]

    def token(self, event: Token) -> list[Any]:
        """A piece of text."""
        logprobs: dict[str, list[Any]] | None = None
        if event.logprob is not None:
            piece = self.service.model.tokenizer.piece
            logprobs = {
                "tokens": [piece(event.id)],
                "token_logprobs": [finite(event.logprob)],
                "top_logprobs": [{piece(i): finite(value) for i, value in event.top}],
                "text_offset": [len(self._texts[event.choice])],
            }
            for name, values in logprobs.items():
                self._logprobs[event.choice][name] += values
        return self._text(event.choice, event.text, logprobs)

    def finished(self, event: Finished) -> list[Any]:
        """The rest of the text and the reason."""
        self._reasons[event.choice] = REASONS[event.reason]
        return [
            *self._text(event.choice, event.text, None),
            self._body([self._choice(event.choice, "", None, self._reasons[event.choice])]),
        ]

    def end(self) -> list[Any]:
        """Usage, where it was asked for."""
        return [{**self._body([]), "usage": self.usage.body()}] if self._tell_usage else []

    def whole(self) -> Any:
        """The completion."""
        told = self.request.top_logprobs is not None
        choices = [
            self._choice(i, text, self._logprobs[i] if told else None, self._reasons[i])
            for i, text in enumerate(self._texts)
        ]
        return {**self._body(choices), "usage": self.usage.body()}

    def _text(self, i: int, text: str, logprobs: Any) -> list[Any]:
        self._texts[i] += text
        return [self._body([self._choice(i, text, logprobs, None)])] if text or logprobs else []

    def _choice(self, i: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _body(self, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.service.name,
            "choices": choices,
        }


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
