"""Who may speak to the server: checks of Host, Origin, API key and size before any route sees a request.

A web page anywhere can make a browser send requests to 127.0.0.1, and by rebinding its own name to that address
even read the answers. So the Host must be an address, localhost or a name that was allowed, and a browser's
Origin must be this server's own or one that was allowed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from halfbyte.runtime.server.fields import ApiError, dump

OPEN_PATHS = ("/health",)
"""Paths that need no key, beside the page's own files."""

_BODY_SECONDS = 30.0  # for a body to arrive
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    ),
]
Scope = MutableMapping[str, Any]


class Guard:
    """ASGI middleware. Bodies are read here, whole, so that routes only see ones of at most `max_body` bytes.

    hosts    names that may be in Host, besides addresses and localhost
    origins  origins of other sites that may call, such as http://localhost:3000; '*' is any
    public   paths that need no key
    """

    def __init__(
        self,
        app: Any,
        *,
        key: str | None,
        max_body: int,
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
        public: Iterable[str] = (),
    ):
        self.app, self.max_body = app, max_body
        self._key = None if key is None else _digest(key.encode())
        self._hosts = {h.lower().rstrip(".") for h in hosts} | {"localhost"}
        self._origins = {o.lower().rstrip("/") for o in origins}
        self._public = {*OPEN_PATHS, *public}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Check, then pass on; or answer with the error."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        extra = list(_HEADERS)

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        try:
            headers: dict[bytes, list[bytes]] = {}
            for name, value in scope["headers"]:
                headers.setdefault(name.lower(), []).append(value)
            host = self._check_host(headers)
            extra += self._check_origin(headers, host)
            if scope["method"] == "OPTIONS":
                await _answer(sending, 204, b"")
                return
            self._check_key(scope["path"], headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            extra.append((b"connection", b"close"))  # a body may not have been read
            await _answer(sending, error.status, dump(error.body()))
            return
        await self.app(scope, _replay(body, receive), sending)

    def _check_host(self, headers: dict[bytes, list[bytes]]) -> str:
        values = headers.get(b"host", [])
        host = values[0].decode("latin-1").strip().lower() if len(values) == 1 else ""
        if not host or not self._known(_name(f"//{host}")):
            raise ApiError("this Host is not served here (see --allow-host)", status=403)
        return host

    def _known(self, name: str | None) -> bool:
        if name is None:
            return False
        try:
            ipaddress.ip_address(name)
            return True
        except ValueError:
            return name.rstrip(".") in self._hosts

    def _check_origin(self, headers: dict[bytes, list[bytes]], host: str) -> list[tuple[bytes, bytes]]:
        values = headers.get(b"origin", [])
        if not values:
            return []
        origin = values[0].decode("latin-1").strip().lower() if len(values) == 1 else ""
        if origin in (f"http://{host}", f"https://{host}"):
            return []
        if origin and ("*" in self._origins or origin in self._origins):
            allowed = values[0] if "*" not in self._origins else b"*"
            return [
                (b"access-control-allow-origin", allowed),
                (b"access-control-allow-headers", b"authorization, content-type"),
                (b"access-control-allow-methods", b"GET, POST"),
                (b"vary", b"origin"),
            ]
        raise ApiError("requests from this Origin are refused (see --allow-origin)", status=403)

    def _check_key(self, path: str, headers: dict[bytes, list[bytes]]) -> None:
        if self._key is None or path in self._public:
            return
        scheme, _, given = headers.get(b"authorization", [b""])[0].partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(given.strip()), self._key):
            raise ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")

    async def _body(self, headers: dict[bytes, list[bytes]], receive: Any) -> bytes:
        length = headers.get(b"content-length", [b"0"])[0]
        if length.isdigit() and (len(length) > 12 or int(length) > self.max_body):
            raise ApiError(f"the body may have {self.max_body} bytes at most", status=413)
        parts, total = [], 0
        try:
            async with asyncio.timeout(_BODY_SECONDS) if hasattr(asyncio, "timeout") else _NoLimit():
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError("the client went away", status=400)
                    parts.append(message.get("body", b""))
                    total += len(parts[-1])
                    if total > self.max_body:
                        raise ApiError(f"the body may have {self.max_body} bytes at most", status=413)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError("the body took too long to arrive", status=408) from None


class _NoLimit:
    """asyncio.timeout of Python 3.10, which has none."""

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # equal lengths, so that the comparison tells nothing


def _name(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        _ = parts.port
        plain = not (parts.username or parts.password or parts.path or parts.query or parts.fragment)
        return parts.hostname if plain else None
    except ValueError:
        return None


def _replay(body: bytes, receive: Any) -> Any:
    sent = False

    async def replay() -> Any:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _answer(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers if body else []})
    await send({"type": "http.response.body", "body": body})
