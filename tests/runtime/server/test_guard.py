"""Strangers stay out, and nothing a client sends is a 500 or a hang."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving import Running

from halfbyte.runtime.model import Model

KEY = "s3cret"
POSTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")


def raw(running: Running, request: bytes) -> bytes:
    """Bytes of an answer to bytes."""
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(65536):
            found += part
    return found


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("127.0.0.1:8080", 200), ("localhost:1", 200), ("LOCALHOST", 200), ("[::1]:80", 200),
        ("my.host", 200), ("my.host.:80", 200), ("evil.com", 403), ("evil.com:8080", 403), ("localhost.evil.com", 403),
        ("127.0.0.1.evil.com", 403), ("127.0.0.1@evil.com", 403), ("evil.com/127.0.0.1", 403), ("", 403),
        ("[", 403), ("localhost:x", 403), ("2130706433", 403),
    ],
)  # fmt: skip
def test_host(talker: Model, start: Callable[..., Running], host: str, status: int) -> None:
    running = start(talker, hosts=["my.host"])
    assert running.client.get("/health", headers={"host": host}).status_code == status
    assert running.client.get("/", headers={"host": host}).status_code == status


def test_host_given_twice_or_never(talk: Running) -> None:
    for lines in (b"Host: localhost\r\nHost: localhost\r\n", b""):
        answer = raw(talk, b"GET /health HTTP/1.1\r\n" + lines + b"Connection: close\r\n\r\n")
        assert answer.split()[1] in (b"400", b"403")


def test_origin(talker: Model, start: Callable[..., Running]) -> None:
    running = start(talker, origins=["http://good.example:3000"])
    get = running.client.get
    assert get("/v1/models", headers={"origin": running.url}).status_code == 200
    good = get("/v1/models", headers={"origin": "http://good.example:3000"})
    assert (
        good.status_code == 200 and good.headers["access-control-allow-origin"] == "http://good.example:3000"
    )
    for origin in (
        "http://evil.com",
        "null",
        "http://localhost:1",
        "https://good.example:3000",
        "http://127.0.0.1",
    ):
        refused = get("/v1/models", headers={"origin": origin})
        assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers
    preflight = running.client.options("/v1/chat/completions", headers={"origin": "http://good.example:3000"})
    assert preflight.status_code == 204 and "POST" in preflight.headers["access-control-allow-methods"]


def test_key(talker: Model, start: Callable[..., Running]) -> None:
    running = start(talker, key=KEY)
    for path in ("/health", "/"):
        assert running.client.get(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/v1/models/tiny", "/nothing"):
        for given in (None, "", "Bearer", f"Basic {KEY}", "Bearer s3cre", "Bearer s3crett", KEY):
            headers = {} if given is None else {"authorization": given}
            assert running.client.get(path, headers=headers).status_code == 401
    assert running.client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    refused = running.post("/v1/completions", {"prompt": "x"}).json()
    assert refused["error"]["code"] == "invalid_api_key" and KEY not in json.dumps(refused)


def test_body_size(talker: Model, start: Callable[..., Running]) -> None:
    running = start(talker, max_body=2000)
    big = {"prompt": "x" * 3000}
    assert running.post("/v1/completions", big).status_code == 413

    def pieces() -> Iterator[bytes]:
        yield from (json.dumps(big)[i : i + 100].encode() for i in range(0, 3000, 100))

    assert running.client.post("/v1/completions", content=pieces()).status_code == 413
    assert running.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/%2e%2e/app.py", "/..%2fapp.py", "/app.py", "/web/index.html", "//etc/passwd",
             "/index.html/", "/%00", "/v1/models/../../x", "/v1/nothing"],
)  # fmt: skip
def test_no_request_names_a_file(talk: Running, path: str) -> None:
    answer = raw(talk, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert answer.split()[1] in (b"404", b"400", b"307")
    assert b"def create" not in answer and b"root:" not in answer


def test_methods_and_headers(talk: Running) -> None:
    assert talk.client.get("/v1/completions").status_code == 405
    assert talk.client.delete("/v1/models").status_code == 405
    page = talk.client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert talk.client.get("/nothing").json()["error"]["type"] == "not_found_error"


BAD_NUMBERS: list[Any] = [-1, 1e999, -(10**400), 10**400, "1", True, [], {}, 2.5e9, "NaN"]
HUGE = "[" * 100_000


def messages(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **more}


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
             "n", "max_tokens", "max_completion_tokens", "top_logprobs", "seed", "logit_bias", "stop", "stream"],
)  # fmt: skip
def test_every_number_is_checked(talk: Running, name: str) -> None:
    refused = 0
    for value in BAD_NUMBERS:
        text = json.dumps(messages(**{name: value})).replace("Infinity", "1e999")
        answer = talk.client.post("/v1/chat/completions", content=text)
        if answer.status_code != 200:
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error" and error["message"]
            refused += 1
    assert refused >= 6
    for word in ("NaN", "Infinity", "-Infinity"):
        text = json.dumps(messages(**{name: "@"})).replace('"@"', word)
        assert talk.client.post("/v1/chat/completions", content=text).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": "x"}', b'{"messages": []}', b'{"messages": [1]}',
        b'{"messages": [{}]}', b'{"messages": [{"role": "x", "content": "y"}]}', HUGE.encode(),
        ('{"messages": ' + HUGE).encode(), b'{"messages": [{"role": "user"}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"a": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{"}}]}]}',
        json.dumps(messages(response_format={"type": "json_schema", "json_schema": {"schema": 5}})).encode(),
        json.dumps(messages(response_format={"type": "grammar", "definition": "start: ("})).encode(),
        json.dumps(messages(response_format={"type": "grammar", "syntax": "regex", "definition": "("})).encode(),
        json.dumps(messages(response_format={"type": "grammar", "syntax": "gbnf", "definition": "x"})).encode(),
        json.dumps(messages(tools=[{}])).encode(), json.dumps(messages(tools=[{"function": {}}])).encode(),
        json.dumps(messages(tool_choice="required")).encode(),
        json.dumps(messages(chat_template_kwargs={"messages": 1})).encode(),
        json.dumps(messages(chat_template_kwargs={"a b": 1})).encode(),
        json.dumps(messages(top_logprobs=2)).encode(), json.dumps(messages(logit_bias={"x": 1})).encode(),
        json.dumps(messages(logit_bias={"9999999": 1})).encode(), json.dumps(messages(stop=[""])).encode(),
    ],
)  # fmt: skip
def test_bad_bodies_are_400(talk: Running, body: bytes) -> None:
    answer = talk.client.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def mutated(rng: random.Random, value: Any) -> Any:
    """A body with something in it replaced, dropped or added."""
    odd = [
        None,
        True,
        -1,
        0,
        1e308,
        -(2**70),
        "",
        "\ud800",
        "x" * 300,
        [],
        {},
        [[]],
        {"type": "text"},
        {"type": "allowed_tools", "tools": [{"name": "f"}]},
        [None],
        0.5,
    ]
    if rng.random() < 0.03:
        return rng.choice(odd)
    if isinstance(value, dict):
        found = {k: mutated(rng, v) for k, v in value.items() if rng.random() > 0.02}
        if rng.random() < 0.1:
            found[
                rng.choice(
                    ("tools", "tool_choice", "stop", "n", "logit_bias", "input", "prompt", "text", "seed")
                )
            ] = rng.choice(odd)
        return found
    if isinstance(value, list):
        return [mutated(rng, v) for v in value] * rng.choice((1, 1, 1, 2))
    return value


FULL = {
    "messages": [
        {"role": "system", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "me"},
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "ok"},
    ],
    "prompt": [5, 6, 7],
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]},
              {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
              {"type": "function_call_output", "call_id": "a", "output": "y"}],
    "tools": [{"type": "function", "name": "f", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "auto", "temperature": 0.7, "top_p": 0.9, "n": 2, "seed": 3, "stop": ["a", "b"], "logprobs": None,
    "max_tokens": 3, "max_output_tokens": 3, "logit_bias": {"5": 1.5}, "presence_penalty": 0.1,
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
    "stream": False, "stream_options": {"include_usage": True}, "instructions": "be", "chat_template_kwargs": {"a": 1},
    "parallel_tool_calls": True, "reasoning_effort": "low", "reasoning": {"effort": "low"},
}  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_bodies_are_answered(talk: Running, seed: int) -> None:
    rng, seen = random.Random(seed), set()
    for _ in range(80):
        body = mutated(rng, FULL)
        text = json.dumps(body)
        if rng.random() < 0.1:
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(("", "\\", '"', "}", "\x00")) + text[at + 1 :]
        answer = talk.client.post(rng.choice(POSTS), content=text.encode("utf-8", "replace"))
        assert answer.status_code in (200, 400), (answer.status_code, answer.text, text)
        seen.add(answer.status_code)
    assert seen == {200, 400}
    assert talk.client.get("/health").status_code == 200
