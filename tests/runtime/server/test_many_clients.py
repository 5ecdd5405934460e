"""Many clients at once, some of which hang up: no wrong answer, no mixed one, and nothing left behind."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving import Running, greedy, serial

import halfbyte
from halfbyte.runtime.backends.backend import Step
from halfbyte.runtime.model import Model

WORDS = ("dog", "cat", "big", "red", "tree", "park", "ball", "Lily", "Tom")


@pytest.fixture
def slow(talker_path: Path) -> Model:
    """A model that takes its time."""
    model = halfbyte.load(talker_path)
    fast = model.run

    def run(step: Step) -> np.ndarray:
        time.sleep(0.005)
        return fast(step)

    model.run = run  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("clients", [16, 64])
def test_each_answer_is_its_serial_one(demo: Model, start: Callable[..., Running], clients: int) -> None:
    running = start(demo, {"slots": 16, "queue": 200})
    wrong: list[str] = []
    finished = [0] * clients
    answers: dict[tuple[str, int], str] = {}
    lock = threading.Lock()

    def expected(prompt: str, tokens: int) -> str:
        with lock:
            if (prompt, tokens) not in answers:
                answers[prompt, tokens] = serial(demo, greedy(demo.tokenizer.encode(prompt), tokens))[0]
            return answers[prompt, tokens]

    def work(number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(base_url=running.url, timeout=120) as client:
            for _ in range(4):
                start = "Once upon a time there was a little girl named Lily and " * rng.randrange(3)
                prompt = start + " ".join(rng.choice(WORDS) for _ in range(1 + rng.randrange(12)))
                tokens = 1 + rng.randrange(60)
                body = {
                    "prompt": prompt,
                    "max_tokens": tokens,
                    "temperature": 0,
                    "stream": rng.random() < 0.7,
                }
                leave = rng.randrange(1, 8) if body["stream"] and rng.random() < 0.4 else None
                if not body["stream"]:
                    got = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
                else:
                    got, seen, left = "", 0, False
                    with client.stream("POST", "/v1/completions", json=body) as response:
                        for line in response.iter_lines():
                            if line.startswith("data: {"):
                                got += json.loads(line[6:])["choices"][0]["text"]
                                seen += 1
                            if seen == leave:
                                left = True
                                break
                    if left:
                        if not expected(prompt, tokens).startswith(got):
                            wrong.append(got)
                        continue
                if got != expected(prompt, tokens):
                    wrong.append(got)
                finished[number] += 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not wrong and sum(finished) > clients
    deadline = time.monotonic() + 20
    while (
        running.engine.state()["running"] or running.engine.state()["waiting"]
    ) and time.monotonic() < deadline:
        time.sleep(0.02)
    state = running.engine.state()
    assert state["running"] == state["waiting"] == 0
    assert state["kv_bytes"] == state["prefix_bytes"]  # nothing else is held


def test_a_hung_up_client_frees_its_slot(slow: Model, start: Callable[..., Running]) -> None:
    running = start(slow, {"slots": 1, "queue": 10})
    endless = {"prompt": "once", "max_tokens": 2000, "logit_bias": {"1": -100}, "temperature": 0}
    for stream in (True, False):
        with httpx.Client(
            base_url=running.url, timeout=httpx.Timeout(60, read=None if stream else 0.3)
        ) as client:
            if stream:
                with client.stream("POST", "/v1/completions", json={**endless, "stream": True}) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/completions", json=endless)
        answer = running.post("/v1/completions", {"prompt": "two", "max_tokens": 1})
        assert answer.status_code == 200
    before = running.engine.metrics.answer_tokens
    time.sleep(0.2)
    assert running.engine.metrics.answer_tokens == before


def test_429_when_the_queue_is_full(slow: Model, start: Callable[..., Running]) -> None:
    running = start(slow, {"slots": 1, "queue": 1})
    endless = {"prompt": "once", "max_tokens": 2000, "logit_bias": {"1": -100}, "stream": True}
    with (
        httpx.Client(base_url=running.url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=endless) as first,
    ):
        lines = first.iter_lines()  # dropping it would hang up
        next(lines)
        with client.stream("POST", "/v1/completions", json=endless) as second:
            assert second.status_code == 200
            refused = running.post("/v1/completions", {"prompt": "x"})
            assert refused.status_code == 429 and refused.headers["retry-after"]
            assert refused.json()["error"]["type"] == "rate_limit_error"
