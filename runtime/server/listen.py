"""A server that listens: sockets, signals, and an end in good order."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.server.engine import Engine


class Server(uvicorn.Server):
    """uvicorn's server, which on the first SIGINT or SIGTERM lets answers finish and then returns; on the second it
    leaves at once."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float):
        super().__init__(config)
        self._engine, self._grace = engine, grace

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handlers for the duration; unlike uvicorn's, they do not raise the signal again afterwards."""
        previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread
                previous[number] = signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop accepting; what runs has `grace` seconds."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self._engine.drain_soon(self._grace)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UsageError where that address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
        listening.set_inheritable(True)
        return listening
    except OSError as error:
        raise UsageError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def server(app: Any, engine: Engine, grace: float = 5.0) -> Server:
    """A server to `run(sockets=[bind(...)])`."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(grace) + 2,
        limit_concurrency=1024,
    )
    return Server(config, engine, grace)
