"""The command: listens, says where, ends in good order, and says in one line what is wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from small_model import fails

COMMAND = [
    sys.executable,
    "-c",
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from halfbyte.runtime.cli import main; sys.exit(main())",
]
posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@contextmanager
def command(*argv: object) -> Iterator[tuple[subprocess.Popen, str]]:
    """A process that serves, and its address."""
    process = subprocess.Popen(
        [*COMMAND, "serve", *map(str, argv), "--port", "0"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        found = None
        while found is None:
            line = process.stderr.readline()
            assert line, process.wait()
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_status_0(talker_path: Path, number: int) -> None:
    with command(talker_path) as (process, url):
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "talker"
        process.send_signal(number)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()


@posix
def test_running_answers_are_ended(talker_path: Path) -> None:
    endless = {"prompt": "once", "max_tokens": 2000, "logit_bias": {"1": -100}, "n": 16, "stream": True}
    with command(talker_path, "--grace", 0.3, "--lookup", 0) as (process, url):
        texts: list[str] = []

        def listen() -> None:
            with httpx.stream("POST", f"{url}/v1/completions", json=endless, timeout=60) as response:
                texts.extend(response.iter_lines())

        threads = [threading.Thread(target=listen) for _ in range(4)]
        for thread in threads:
            thread.start()
        while len(texts) < 20:
            time.sleep(0.01)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert time.monotonic() - start < 20
        for thread in threads:
            thread.join(30)
        last = [line for line in texts if "shutting down" in line]
        assert last or texts.count("data: [DONE]") == 4
        assert "Traceback" not in process.stderr.read()


def test_bad_requests(capsys: pytest.CaptureFixture, talker_path: Path, tmp_path: Path) -> None:
    assert "such" in fails(capsys, "serve", tmp_path / "none.hb")
    for option, value in (
        ("--host", "256.1.1.1"), ("--kv-memory", "1k"), ("--kv-memory", "x"), ("--prefix-share", "2"),
        ("--timeout", "nan"), ("--grace", "-1"), ("--slots", "0"), ("--port", "70000"), ("--api-key", ""),
        ("--api-key", "a\nb"), ("--lookup", "65"), ("--max-tokens", "0"),
    ):  # fmt: skip
        fails(capsys, "serve", talker_path, "--port", "0", option, value)


def test_an_address_in_use(capsys: pytest.CaptureFixture, talker_path: Path) -> None:
    with command(talker_path) as (_, url):
        assert "cannot listen" in fails(capsys, "serve", talker_path, "--port", url.rpartition(":")[2])


def test_without_the_extra(
    capsys: pytest.CaptureFixture, talker_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.startswith("halfbyte.runtime.server"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    assert "pip install" in fails(capsys, "serve", talker_path)
