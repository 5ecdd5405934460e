"""What tests ask of a server or an engine, and what they compare with."""

from __future__ import annotations

import queue
from dataclasses import dataclass, field
from typing import Any

import httpx

from halfbyte.runtime.generate import generate
from halfbyte.runtime.model import Model
from halfbyte.runtime.sampler import Sampling
from halfbyte.runtime.server.answer import Event, Failed, Finished, Request, Ticket, Token
from halfbyte.runtime.server.engine import Engine


@dataclass
class Running:
    """A server: its address, a client, its engine."""

    url: str
    client: httpx.Client
    engine: Engine

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """POST JSON."""
        return self.client.post(path, json=body, **options)


@dataclass
class Got:
    """What came of a request: text, ids and reason of each answer, or a failure."""

    texts: list[str]
    ids: list[list[int]]
    reasons: list[str]
    failure: Failed | None = None
    tokens: list[Token] = field(default_factory=list)


class Asked:
    """A request that was submitted."""

    def __init__(self, engine: Engine, request: Request):
        self.request = request
        self.events: queue.Queue[list[Event]] = queue.Queue()
        self.ticket: Ticket = engine.submit(request, self.events.put)

    def wait(self, timeout: float = 120) -> Got:
        """Until it is finished."""
        n = self.request.n
        got = Got([""] * n, [[] for _ in range(n)], [""] * n)
        while not all(got.reasons):
            for event in self.events.get(timeout=timeout):
                if isinstance(event, Failed):
                    got.failure = event
                    return got
                got.texts[event.choice] += event.text
                if isinstance(event, Finished):
                    got.reasons[event.choice] = event.reason
                else:
                    got.ids[event.choice].append(event.id)
                    got.tokens.append(event)
        return got


def serial(model: Model, request: Request, choice: int = 0) -> tuple[str, list[int], str]:
    """(text, ids, reason) of `model.generate` alone, for the same request."""
    how = dict(request.sampling.__dict__)
    how["seed"] = (how["seed"] + choice) % 2**64
    answer = generate(model, request.prompt, max_tokens=request.max_tokens, stop=request.stop, **how)
    text = "".join(answer)
    assert answer.finish_reason is not None
    return text, answer.ids, answer.finish_reason


def greedy(prompt: list[int], max_tokens: int, **options: Any) -> Request:
    """A request for the likeliest tokens."""
    return Request(prompt, max_tokens, Sampling(), **options)
