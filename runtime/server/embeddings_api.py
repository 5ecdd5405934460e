"""/v1/embeddings: texts in, vectors of length 1 out."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from halfbyte.runtime.embed import embed
from halfbyte.runtime.server.engine import BusyError, ClosedError, Engine
from halfbyte.runtime.server.fields import ApiError, Fields, dump, parse
from halfbyte.runtime.server.reply import Service

MAX_TEXTS = 2048
MAX_TOKENS = 300_000  # of all texts of a request; both limits are OpenAI's
MAX_WAITING = 16


class Embeddings:
    """The endpoint. One request is worked on at a time, step by step beside the engine's, and a few wait."""

    def __init__(self, engine: Engine, service: Service, pooling: str = "mean"):
        self._engine, self._service, self._pooling = engine, service, pooling
        self._turn = threading.Lock()
        self._waiting = 0

    async def __call__(self, http: HttpRequest, gone: asyncio.Future[None]) -> Response:
        """Answer a request; `gone` is done when its client hung up, and the work then ends at the next step."""
        data = await http.body()
        if not self._engine.accepting:
            raise ClosedError("the server is shutting down")
        if self._waiting >= MAX_WAITING:
            raise BusyError(f"{self._waiting} requests for embeddings are waiting already; try again later")
        left = threading.Event()
        gone.add_done_callback(lambda _: left.set())
        self._waiting += 1
        try:
            return Response(await asyncio.to_thread(self._answer, data, left), media_type="application/json")
        finally:
            self._waiting -= 1
            left.set()

    def _answer(self, data: bytes, left: threading.Event) -> bytes:
        fields = parse(data)
        kind = fields.choice("encoding_format", ("float", "base64"), "float")
        width = self._service.model.width
        if fields.whole("dimensions", width, 1, 1 << 30) != width:
            raise fields.wrong("dimensions", f"must be {width}: the vectors of this model cannot be cut")
        texts = self._texts(fields)
        timeout = self._engine.timeout
        deadline = None if timeout is None else time.monotonic() + timeout

        def between() -> None:
            if left.is_set():
                raise ApiError("nobody reads it", status=499)
            if not self._engine.accepting:
                raise ClosedError("the server is shutting down")
            if deadline is not None and time.monotonic() >= deadline:
                raise ApiError(f"the request took longer than {timeout:g} seconds", status=504)

        while not self._turn.acquire(timeout=0.1):
            between()
        try:
            vectors = embed(self._service.model, texts, self._pooling, between)
        finally:
            self._turn.release()
        found: list[Any] = [v.tolist() for v in vectors]
        if kind == "base64":
            found = [base64.b64encode(v.astype("<f4").tobytes()).decode() for v in vectors]
        tokens = sum(map(len, texts))
        body = {
            "object": "list",
            "data": [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(found)],
            "model": self._service.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return dump(body)

    def _texts(self, fields: Fields) -> list[list[int]]:
        """The token ids of `input`: a text, texts, ids, or lists of ids."""
        given, model = fields.values.get("input"), self._service.model
        if isinstance(given, str) or (isinstance(given, list) and given and _is_id(given[0])):
            given = [given]
        if not isinstance(given, list) or not 1 <= len(given) <= MAX_TEXTS:
            raise fields.wrong("input", f"must be a text, token ids, or a list of 1 to {MAX_TEXTS} of either")
        texts, total = [], 0
        for i, one in enumerate(given):
            if isinstance(one, str):
                ids = model.tokenizer.encode(one, special=False) if one else []
            elif isinstance(one, list) and all(_is_id(v) and 0 <= v < model.vocab_size for v in one):
                ids = one
            else:
                raise fields.wrong(
                    f"input[{i}]", f"must be a text or ids between 0 and {model.vocab_size - 1}"
                )
            if not 0 < len(ids) <= model.context_length:
                what = f"has {len(ids)} tokens; 1 to {model.context_length} are possible"
                raise fields.wrong(f"input[{i}]", what)
            total += len(ids)
            if total > MAX_TOKENS:
                raise fields.wrong("input", f"has more than {MAX_TOKENS} tokens")
            texts.append(ids)
        return texts


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
