"""The soak of benchmarks/soak_server.py, for a few seconds: a process, 64 clients that come and go, and SIGTERM."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest

import halfbyte

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import soak_server as soaking


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_clients_come_and_go(demo_path: Path) -> None:
    model = halfbyte.load(demo_path, kv="k8v8")
    found = soaking.soak(model, clients=64, seconds=5, contexts=2.5, count=32, tokens=40)
    assert not found.wrong, soaking.summary(found)
    finished = found.counts["streamed"] + found.counts["whole"]
    assert finished > 64 and found.counts["left"] and found.counts["left before the answer"]
    assert found.counts["429"] and found.counts["400"] and found.metrics["prompt_tokens_cached_total"]


def stream(*events: object) -> io.BytesIO:
    """A response of these server-sent events."""
    return io.BytesIO(
        b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in events) + b"data: [DONE]\n\n"
    )


def test_the_soak_sees_what_is_wrong() -> None:
    job = soaking.Job("/v1/completions", {}, (("once upon", "length"),), 2)

    def event(text: str, reason: str | None = None) -> dict[str, object]:
        return {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}

    assert soaking.follow(stream(event("once"), event(" upon", "length")), job) == ("streamed", "")
    assert soaking.follow(stream(event("once"), event(" upon", "stop")), job)[1]
    assert soaking.follow(stream(event("once", "length")), job)[1]
    assert soaking.follow(stream(event("once"), event("!")), job, 1) == ("left", "")
    assert soaking.follow(stream(event("twice"), event("!")), job, 1)[1]
    closing, broken = ({"error": {"message": m}} for m in ("the server is shutting down", "a bug"))
    assert soaking.follow(stream(event("once"), closing), job) == ("ended", "")
    assert soaking.follow(stream(event("twice"), closing), job)[1]
    assert soaking.follow(stream(event("once"), broken), job)[1]


def test_growth_is_seen() -> None:
    steady, leaking = (soaking.Outcome(rss=[(100 + rate * i) << 20 for i in range(40)]) for rate in (0, 10))
    assert steady.growth() == 0 and leaking.growth() > soaking.GROWTH
