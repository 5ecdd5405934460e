"""Models and servers for the tests of `halfbyte serve`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Running
from story import story_folder

import halfbyte
from halfbyte.runtime.cli.demo import FILE, built_in_model
from halfbyte.runtime.model import Model
from halfbyte.runtime.server import app, listen
from halfbyte.runtime.server.engine import Engine
from halfbyte.runtime.server.reply import Service

HERMES = (
    "{% if tools %}<tool_call>{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The built-in story model, in four bits."""
    return built_in_model() / FILE


@pytest.fixture(scope="session")
def demo(demo_path: Path) -> Model:
    """The story model on the best backend here."""
    return halfbyte.load(demo_path)


@pytest.fixture(scope="session")
def talker_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of 2048 positions whose chat template knows tools."""
    folder = tmp_path_factory.mktemp("talker")
    return halfbyte.convert(story_folder(folder / "c", HERMES, 2048), folder / "talker.hb", recipe="q8")


@pytest.fixture(scope="session")
def talker(talker_path: Path) -> Model:
    """That model."""
    return halfbyte.load(talker_path)


@contextmanager
def running(model: Model, engine_options: dict[str, Any], app_options: dict[str, Any]) -> Iterator[Running]:
    """A server on a free port of the loopback interface."""
    engine = Engine(model, **engine_options)
    service = Service(model, "tiny", lookup=app_options.pop("lookup", 8))
    listening = listen.bind("127.0.0.1", 0)
    server = listen.server(app.create(engine, service, **app_options), engine, 1.0)
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]))
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Running(url, client, engine)
    finally:
        server.handle_exit(15, None)
        thread.join(30)
        engine.close()
        listening.close()
    assert not thread.is_alive()


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Start servers: start(model, engine options, application options)."""
    open_servers = []

    def begin(model: Model, engine: dict[str, Any] | None = None, **app_options: Any) -> Running:
        manager = running(model, engine or {}, app_options)
        found = manager.__enter__()
        open_servers.append(manager)
        return found

    yield begin
    for manager in open_servers:
        manager.__exit__(None, None, None)


@pytest.fixture(scope="module")
def stories(demo: Model) -> Iterator[Running]:
    """A server of the story model."""
    with running(demo, {}, {}) as found:
        yield found


@pytest.fixture(scope="module")
def talk(talker: Model) -> Iterator[Running]:
    """A server of the model that knows tools."""
    with running(talker, {}, {}) as found:
        yield found
