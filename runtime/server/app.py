"""The routes, as an ASGI application."""

from __future__ import annotations

import asyncio
import logging
import mimetypes
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from halfbyte.formats.errors import HalfbyteError
from halfbyte.runtime.server.answer import Event, Ticket
from halfbyte.runtime.server.chat_api import ChatReply
from halfbyte.runtime.server.completions_api import CompletionReply
from halfbyte.runtime.server.embeddings_api import Embeddings
from halfbyte.runtime.server.engine import BusyError, ClosedError, Engine
from halfbyte.runtime.server.fields import ApiError, Fields, dump, parse
from halfbyte.runtime.server.guard import Guard
from halfbyte.runtime.server.reply import Reply, Service
from halfbyte.runtime.server.responses_api import ResponseReply

log = logging.getLogger("halfbyte.server")
WEB = Path(__file__).parent / "web"
MAX_BODY = 4 << 20
_TYPES = {
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}


def create(
    engine: Engine,
    service: Service,
    *,
    key: str | None = None,
    max_body: int = MAX_BODY,
    hosts: Iterable[str] = (),
    origins: Iterable[str] = (),
    pooling: str = "mean",
) -> Any:
    """The application of a server: `Guard` around the routes. Every file of the page is read now, so that no
    request ever names one on disk."""
    pages = _pages(WEB)
    routes = [
        _route(engine, "/v1/chat/completions", _text_route(engine, service, ChatReply), "POST"),
        _route(engine, "/v1/completions", _text_route(engine, service, CompletionReply), "POST"),
        _route(engine, "/v1/responses", _text_route(engine, service, ResponseReply), "POST"),
        _route(engine, "/v1/embeddings", _embeddings_route(engine, service, pooling), "POST"),
        _route(engine, "/v1/models", _constant(_models(service)), "GET"),
        _route(engine, "/v1/models/{name:path}", _model_route(service), "GET"),
        _route(engine, "/health", _health_route(engine), "GET"),
        _route(engine, "/metrics", _metrics_route(engine), "GET"),
    ]
    routes += [_route(engine, path, _file_route(*page), "GET") for path, page in pages.items()]
    errors: dict[Any, Any] = {HTTPException: _on_http_error}
    app = Starlette(routes=routes, exception_handlers=errors)
    return Guard(app, key=key, max_body=max_body, hosts=hosts, origins=origins, public=pages)


def _route(engine: Engine, path: str, act: Callable[[HttpRequest], Any], method: str) -> Route:
    async def endpoint(http: HttpRequest) -> Response:
        try:
            response = await act(http)
        except HalfbyteError as error:
            response = _error(error)
        except Exception:
            log.exception("%s failed", path)
            response = _error(ApiError("the server failed; its log says more", status=500))
        engine.metrics.requests[path, response.status_code] += 1
        return response

    return Route(path, endpoint, methods=[method])


def _error(error: HalfbyteError) -> Response:
    """Any error a client can cause, in OpenAI's shape."""
    if isinstance(error, BusyError):
        error = ApiError(str(error), status=429, code="queue_full")
    elif isinstance(error, ClosedError):
        error = ApiError(str(error), status=503)
    elif not isinstance(error, ApiError):
        error = ApiError(str(error))
    headers = {"retry-after": "1"} if error.status == 429 else None
    return Response(dump(error.body()), error.status, headers, "application/json")


async def _on_http_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(ApiError(str(error.detail), status=error.status_code))


def _text_route(
    engine: Engine, service: Service, make: Callable[[Service, Fields], Reply]
) -> Callable[[HttpRequest], Any]:
    async def act(http: HttpRequest) -> Response:
        data = await http.body()
        reply = await asyncio.to_thread(
            lambda: make(service, parse(data))
        )  # templates and grammars take time
        events: asyncio.Queue[list[Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(found: list[Event]) -> None:
            loop.call_soon_threadsafe(events.put_nowait, found)

        ticket = await asyncio.to_thread(engine.submit, reply.request, deliver)
        answer = _Answer(reply, ticket, events)
        if reply.stream:
            return answer
        return await answer.whole(http)

    return act


class _Answer(Response):
    """Follows a ticket and cancels it as soon as nobody listens any more."""

    def __init__(self, reply: Reply, ticket: Ticket, events: asyncio.Queue[list[Event]]):
        self.reply, self.ticket, self.events = reply, ticket, events
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(None, 200, headers, "text/event-stream")
        del self.headers["content-length"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Stream it."""
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._send(send, self.reply.begin())
            try:
                while self.reply.open:
                    found = await self._next(gone)
                    if found is None:
                        return
                    await self._send(send, self.reply.events(found))
                await self._send(send, self.reply.end())
            except ApiError as error:
                await self._send(send, [error.body()])
            await send({"type": "http.response.body", "body": self.reply.done})
        except OSError:
            return
        finally:
            self.ticket.cancel()
            gone.cancel()

    async def whole(self, http: HttpRequest) -> Response:
        """Collect it."""
        gone = asyncio.ensure_future(_disconnect(http.receive))
        try:
            while self.reply.open:
                found = await self._next(gone)
                if found is None:
                    return Response(status_code=499)  # nobody reads it; the word is nginx's
                self.reply.events(found)
            self.reply.usage.cached = self.ticket.cached_tokens
            return Response(dump(self.reply.whole()), media_type="application/json")
        finally:
            self.ticket.cancel()
            gone.cancel()

    async def _next(self, gone: asyncio.Future[None]) -> list[Event] | None:
        """The next events, or None when the client is gone."""
        if self.events.empty():
            coming = asyncio.ensure_future(self.events.get())
            try:
                both: set[asyncio.Future[Any]] = {coming, gone}
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    return None
                found = coming.result()
            finally:
                coming.cancel()
        else:
            await asyncio.sleep(0)  # else a fast model would never let the loop see that the client hung up
            found = self.events.get_nowait()
        self.reply.usage.cached = self.ticket.cached_tokens
        return None if gone.done() else found

    async def _send(self, send: Any, bodies: list[Any]) -> None:
        if bodies:
            data = b"".join(map(self.reply.frame, bodies))
            await send({"type": "http.response.body", "body": data, "more_body": True})


async def _disconnect(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _embeddings_route(engine: Engine, service: Service, pooling: str) -> Callable[[HttpRequest], Any]:
    answer = Embeddings(engine, service, pooling)

    async def act(http: HttpRequest) -> Response:
        await http.body()  # what comes after it is that the client hung up
        gone = asyncio.ensure_future(_disconnect(http.receive))
        try:
            return await answer(http, gone)
        finally:
            gone.cancel()

    return act


def _models(service: Service) -> dict[str, Any]:
    return {"object": "list", "data": [_model(service)]}


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "halfbyte",
        "context_length": service.model.context_length,
        "max_model_len": service.model.context_length,
    }


def _model_route(service: Service) -> Callable[[HttpRequest], Any]:
    async def act(http: HttpRequest) -> Response:
        if http.path_params["name"] != service.name:
            raise ApiError("there is no such model here", "model", 404, "model_not_found")
        return Response(dump(_model(service)), media_type="application/json")

    return act


def _constant(body: Any) -> Callable[[HttpRequest], Any]:
    async def act(_: HttpRequest) -> Response:
        return Response(dump(body), media_type="application/json")

    return act


def _health_route(engine: Engine) -> Callable[[HttpRequest], Any]:
    async def act(_: HttpRequest) -> Response:
        status = "ok" if engine.accepting else "closing"
        return Response(dump({"status": status}), 200 if engine.accepting else 503, None, "application/json")

    return act


def _metrics_route(engine: Engine) -> Callable[[HttpRequest], Any]:
    async def act(_: HttpRequest) -> Response:
        text = engine.metrics.text(engine.state(), engine.prefixes.hits, engine.prefixes.misses)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return act


def _file_route(data: bytes, kind: str) -> Callable[[HttpRequest], Any]:
    async def act(_: HttpRequest) -> Response:
        return Response(data, 200, {"cache-control": "no-cache"}, kind)

    return act


def _pages(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Path -> (bytes, media type) of every file of the page; '/' is index.html."""
    pages = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        name = "/" + path.relative_to(folder).as_posix()
        kind = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        kind += "; charset=utf-8" if kind.startswith("text/") else ""
        pages["/" if name == "/index.html" else name] = path.read_bytes(), kind
    return pages
