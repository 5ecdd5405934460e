"""What the three text APIs have in common: a request made ready, and events made into an answer."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.constrain import Grammar, Guide
from halfbyte.runtime.model import Model
from halfbyte.runtime.server.answer import Event, Failed, Finished, Request, Token
from halfbyte.runtime.server.fields import ApiError, Fields, dump

REASONS = {"stop": "stop", "length": "length", "context": "length"}
STATUS = {"timeout": 504, "shutdown": 503, "request": 400, "bug": 500}


@dataclass
class Service:
    """What the routes know: the model, its public name, and the limits of a request."""

    model: Model
    name: str
    max_tokens: int | None = None
    lookup: int = 0
    max_n: int = 16
    guide: Guide | None = None

    def __post_init__(self) -> None:
        self.created = int(time.time())

    def tokens_allowed(self, fields: Fields, names: Iterable[str], prompt: int, default: int | None) -> int:
        """max_tokens of a request: the first of these fields, else the default, else what the context leaves."""
        limit = self.max_tokens or self.model.context_length
        for name in names:
            if fields.has(name):
                return min(fields.whole(name, 0, 0, 2**31 - 1), limit)
        left = self.model.context_length - prompt
        return min(limit, left if default is None else default)

    def checked_prompt(self, ids: list[int]) -> list[int]:
        """Refuse prompts that do not fit, with the code that OpenAI's clients know."""
        if not ids:
            raise ApiError("the prompt is empty and the model has no start token: give some text")
        context = self.model.context_length
        if len(ids) >= context:
            raise ApiError(
                f"the prompt has {len(ids)} tokens; the model's context is {context}",
                code="context_length_exceeded",
            )
        return ids

    def grammar(self, syntax: str, source: Any, where: str) -> Grammar:
        """A compiled grammar. Raises ApiError naming the field."""
        try:
            if self.guide is None:
                self.guide = Guide(self.model)
            return self.guide.compile(syntax, source)
        except UsageError as error:
            raise ApiError(str(error), where) from None

    def response_format(self, given: Fields | None) -> Grammar | None:
        """OpenAI's response_format (or text.format): text, json_object, json_schema; and a grammar."""
        if given is None:
            return None
        kind = given.choice("type", ("text", "json_object", "json_schema", "grammar"), "text")
        if kind == "text":
            return None
        if kind == "json_object":
            return self.grammar("json_schema", {"type": "object"}, given.path("type"))
        if kind == "grammar":
            syntax = given.choice("syntax", ("lark", "regex", "gbnf"), "lark")
            return self.grammar(syntax, given.text("definition"), given.path("definition"))
        holder = given.object("json_schema") or given  # the responses API has the schema beside the type
        schema = holder.values.get("schema", {})
        if not isinstance(schema, (dict, bool)):
            raise holder.wrong("schema", "must be an object")
        return self.grammar("json_schema", schema, holder.path("schema"))


@dataclass
class Usage:
    """Tokens of an answer; `thought` are those of them that the model thought."""

    prompt: int = 0
    cached: int = 0
    answer: int = 0
    thought: int = 0
    start: float = 0.0
    first: float = 0.0
    last: float = 0.0

    def add(self, at: float) -> None:
        """Count a token that was drawn at a time."""
        self.answer += 1
        self.first, self.last = self.first or at, at

    def timings(self) -> dict[str, Any]:
        """As llama.cpp's server tells them: milliseconds to the first token, and from there to the last."""
        first, more = max(0.0, self.first - self.start), max(0.0, self.last - self.first)
        return {
            "prompt_n": self.prompt - self.cached,
            "prompt_ms": round(1e3 * first, 3),
            "predicted_n": self.answer,
            "predicted_ms": round(1e3 * more, 3),
            "predicted_per_second": round((self.answer - 1) / more, 3) if more > 0 else None,
        }

    def body(self) -> dict[str, Any]:
        """As the chat and completions APIs tell it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.thought},
        }


class Reply(ABC):
    """An answer of one API. `request` goes to the engine; its events come back, one after the other."""

    done = b"data: [DONE]\n\n"

    def __init__(self, service: Service, request: Request, stream: bool, prefix: str):
        self.service, self.request, self.stream = service, request, stream
        self.id = prefix + secrets.token_hex(12)
        self.created = int(time.time())
        self.usage = Usage(prompt=len(request.prompt), start=time.perf_counter())
        self.open = request.n

    def events(self, events: Iterable[Event]) -> list[Any]:
        """What a stream sends for these events. Raises ApiError for a failure."""
        found: list[Any] = []
        for event in events:
            if isinstance(event, Failed):
                raise ApiError(event.message, status=STATUS[event.kind])
            if isinstance(event, Token):
                self.usage.add(event.at)
                found += self.token(event)
            else:
                self.open -= 1
                found += self.finished(event)
        return found

    def frame(self, body: Any) -> bytes:
        """One server-sent event."""
        return b"data: " + dump(body) + b"\n\n"

    def begin(self) -> list[Any]:
        """What a stream sends at first."""
        return []

    @abstractmethod
    def token(self, event: Token) -> list[Any]:
        """Take a token; what a stream sends for it."""

    @abstractmethod
    def finished(self, event: Finished) -> list[Any]:
        """Take the end of one answer; what a stream sends for it."""

    def end(self) -> list[Any]:
        """What a stream sends when all answers are finished."""
        return []

    @abstractmethod
    def whole(self) -> Any:
        """The body, where it is not streamed."""
