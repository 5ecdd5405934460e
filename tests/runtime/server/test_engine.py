"""The engine: whatever is mixed into a step, every answer is the one that comes alone."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from serving import Asked, greedy, serial
from tiny import load_case

import halfbyte
from halfbyte.formats.errors import UsageError
from halfbyte.runtime.backends.backend import Step
from halfbyte.runtime.constrain import Guide
from halfbyte.runtime.model import Model
from halfbyte.runtime.sampler import Sampling
from halfbyte.runtime.server.answer import Request
from halfbyte.runtime.server.engine import BusyError, ClosedError, Engine
from halfbyte.runtime.server.memory import Memory

STARTS = (
    "Once upon a time",
    "One day, a little girl named Lily",
    "Tom saw a dog. Tom saw a dog. Tom saw",
    "The",
)
HOWS = (
    {},
    {"temperature": 0.8},
    {"temperature": 1.1, "top_p": 0.9, "repetition_penalty": 1.1},
    {"temperature": 0.0, "presence_penalty": 0.5},
)


def requests(model: Model, count: int, seed: int = 0, longest: int = 60) -> list[Request]:
    """Random requests, many of which share the start of their prompts."""
    rng, found = random.Random(seed), []
    for i in range(count):
        words = " ".join(rng.choice(("big", "red", "happy dog", "tree")) for _ in range(rng.randrange(80)))
        prompt = model.tokenizer.encode(f"{rng.choice(STARTS)} {words}")[:300]
        how = Sampling(seed=i, **rng.choice(HOWS))
        stop = rng.choice(((), ("dog",), (".", "tree and")))
        found.append(Request(prompt, rng.randrange(longest), how, stop, lookup=rng.choice((0, 8))))
    return found


def ask_all(engine: Engine, wanted: list[Request]) -> list[Asked]:
    """Submit from many threads at random times."""
    asked: list[Asked | None] = [None] * len(wanted)

    def submit(i: int) -> None:
        time.sleep(random.Random(i).random() * 0.2)
        asked[i] = Asked(engine, wanted[i])

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [a for a in asked if a is not None]


@pytest.fixture
def engine(demo: Model):
    """An engine of the story model."""
    found = Engine(demo)
    yield found
    found.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_mixture_of_requests_gets_the_serial_answers(demo: Model, engine: Engine, seed: int) -> None:
    mixture = requests(demo, 40, seed)
    longest = max(mixture, key=lambda r: len(r.prompt))
    for several in (mixture, [longest]):  # the longest again, as the others may all have come at once
        for asked in ask_all(engine, several):
            got = asked.wait()
            assert (got.texts[0], got.ids[0], got.reasons[0]) == serial(demo, asked.request)
    assert engine.metrics.rows > engine.metrics.steps  # steps were shared
    assert engine.prefixes.hits > 0


def test_on_every_backend(demo_path: Path, backend: str) -> None:
    model = halfbyte.load(demo_path, backend=backend)
    engine = Engine(model)
    try:
        for asked in ask_all(engine, requests(model, 12 if backend != "reference" else 5, 7, longest=12)):
            got = asked.wait()
            assert (got.texts[0], got.ids[0], got.reasons[0]) == serial(model, asked.request)
    finally:
        engine.close()


@pytest.mark.parametrize("case", ["mistral-window", "gemma3-plain", "qwen3-plain"])
def test_sliding_windows_and_guesses(tmp_path: Path, case: str) -> None:
    load_case(case).write_folder(tmp_path / "c")
    model = halfbyte.load(halfbyte.convert(tmp_path / "c", tmp_path / "m.hb", recipe="q8"))
    rng, engine = random.Random(3), Engine(model)
    try:
        start = [rng.randrange(5, 50) for _ in range(40)]
        for _ in range(3):  # later rounds continue remembered prompts
            wanted = [
                Request(
                    (start + [rng.randrange(5, 50)] * 9)[: rng.randrange(20, 49)],
                    40,
                    Sampling(seed=i),
                    lookup=8,
                )
                for i in range(8)
            ]
            for asked in ask_all(engine, wanted):
                got = asked.wait()
                assert (got.texts[0], got.ids[0], got.reasons[0]) == serial(model, asked.request)
        assert engine.metrics.guessed_right > 0 and engine.prefixes.hits > 0
    finally:
        engine.close()


def test_several_answers_to_one_prompt(demo: Model, engine: Engine) -> None:
    prompt = demo.tokenizer.encode("Once upon a time there was a big dog")
    request = Request(prompt, 20, Sampling(temperature=1.0, seed=2**64 - 2), n=5)
    got = Asked(engine, request).wait()
    for i in range(5):
        assert (got.texts[i], got.ids[i], got.reasons[i]) == serial(demo, request, i)
    assert len(set(got.texts)) > 1
    nothing = Asked(engine, Request(prompt, 0, n=3)).wait()
    assert nothing.ids == [[], [], []] and nothing.reasons == ["length"] * 3


def test_a_remembered_prompt_gives_the_same_answer(demo: Model, engine: Engine) -> None:
    prompt = demo.tokenizer.encode("Once upon a time there was a big red dog. " * 12)
    first, again = (Asked(engine, greedy(prompt, 30)) for _ in range(2))
    assert first.wait().ids == again.wait().ids == [serial(demo, first.request)[1]]
    third = Asked(engine, greedy(prompt, 30))
    assert third.wait().ids[0] == serial(demo, third.request)[1]
    assert third.ticket.cached_tokens == len(prompt) - 1
    longer = Asked(engine, greedy([*prompt, *demo.tokenizer.encode(" The dog", bos=False)], 30))
    got = longer.wait()
    assert longer.ticket.cached_tokens >= len(prompt)
    assert got.ids[0] == serial(demo, longer.request)[1]


def test_little_memory_costs_time_and_nothing_else(demo: Model) -> None:
    least = Engine(demo, prefix_share=0.0)
    limit = least.memory.of(demo.context_length)
    least.close()
    with pytest.raises(UsageError, match="too few"):
        Engine(demo, memory=limit - 1)
    engine = Engine(demo, memory=limit)
    most = 0
    try:
        short = demo.tokenizer.encode("The")
        endless = {2: float("-inf")}
        wanted = [
            Request(short, 300, Sampling(temperature=1.0, seed=i, logit_bias=endless), n=1 + i % 2)
            for i in range(6)
        ]
        asked = ask_all(engine, [*wanted, *requests(demo, 20, 5)])
        for one in asked:
            got = one.wait()
            most = max(most, engine.state()["kv_bytes"])
            for i in range(one.request.n):
                assert (got.texts[i], got.ids[i], got.reasons[i]) == serial(demo, one.request, i)
        assert engine.metrics.preemptions > 0
        assert most <= limit
    finally:
        engine.close()


def test_the_count_of_bytes_is_right(demo: Model, engine: Engine) -> None:
    for asked in ask_all(engine, requests(demo, 30, 11)):
        asked.wait()
    time.sleep(0.2)
    pages = {id(p): p.bytes.nbytes for kv in engine.prefixes.kvs() for row in kv.pages for p in row if p}
    assert engine.prefixes.nbytes == sum(pages.values()) == engine.state()["kv_bytes"] > 0
    while engine.prefixes.evict():
        pass
    assert engine.prefixes.nbytes == 0 and len(engine.prefixes) == 0


def test_the_prefix_cache_is_bounded(demo: Model) -> None:
    engine = Engine(demo, memory=None, prefix_share=0.5)
    engine.prefixes.limit = 12 * engine.memory.page_bytes
    try:
        for asked in ask_all(engine, requests(demo, 40, 13)):
            asked.wait()
        assert 0 < engine.prefixes.nbytes <= engine.prefixes.limit
    finally:
        engine.close()


def test_cancelled_answers_stop_at_once_and_disturb_nobody(demo: Model, engine: Engine) -> None:
    prompt = demo.tokenizer.encode("Once upon a time")
    endless = {2: float("-inf")}
    kept = Asked(engine, greedy(prompt, 200))
    dropped = [Asked(engine, Request(prompt, 480, Sampling(logit_bias=endless))) for _ in range(10)]
    for asked in dropped:
        asked.events.get(timeout=30)
        asked.ticket.cancel()
    assert kept.wait().ids[0] == serial(demo, kept.request)[1]
    deadline = time.monotonic() + 10
    while engine.state()["running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.state()["running"] == engine.state()["waiting"] == 0


def test_a_full_queue_refuses(demo: Model) -> None:
    engine = Engine(demo, slots=1, queue=2)
    endless = Request(demo.tokenizer.encode("The"), 500, Sampling(logit_bias={2: float("-inf")}))
    try:
        first = Asked(engine, endless)
        first.events.get(timeout=30)
        waiting = [Asked(engine, endless), Asked(engine, endless)]
        with pytest.raises(BusyError):
            Asked(engine, endless)
        for asked in (first, *waiting):
            asked.ticket.cancel()
        assert Asked(engine, greedy(endless.prompt, 3)).wait().reasons == ["length"]
    finally:
        engine.close()


def test_time_runs_out(demo: Model) -> None:
    engine = Engine(demo, timeout=0.0)
    try:
        got = Asked(engine, greedy(demo.tokenizer.encode("The"), 5)).wait()
        assert got.failure is not None and got.failure.kind == "timeout"
    finally:
        engine.close()


def test_draining_ends_what_runs_and_refuses_the_rest(demo: Model, engine: Engine) -> None:
    endless = Request(demo.tokenizer.encode("The"), 500, Sampling(logit_bias={2: float("-inf")}))
    asked = Asked(engine, endless)
    asked.events.get(timeout=30)
    engine.drain(0.0)
    got = asked.wait()
    assert got.failure is None or got.failure.kind == "shutdown"
    with pytest.raises(ClosedError):
        Asked(engine, endless)


def test_what_the_model_cannot_do_is_refused_before_it_is_queued(demo: Model, engine: Engine) -> None:
    prompt = demo.tokenizer.encode("The")
    for wrong in (
        greedy([], 5),
        greedy([5] * demo.context_length, 5),
        greedy([-1], 5),
        greedy([demo.vocab_size], 5),
        greedy(prompt, -1),
        greedy(prompt, 5, n=0),
        greedy(prompt, 5, n=33),
        Request(prompt, 5, Sampling(logit_bias={demo.vocab_size: 1.0})),
    ):
        with pytest.raises(UsageError):
            Asked(engine, wrong)


def test_a_failing_answer_fails_alone(demo: Model, engine: Engine) -> None:
    prompt = demo.tokenizer.encode("Once upon a time")
    forbidden = dict.fromkeys(range(demo.vocab_size), float("-inf"))
    bad = Asked(engine, Request(prompt, 5, Sampling(logit_bias=forbidden)))
    good = Asked(engine, greedy(prompt, 20))
    failure = bad.wait().failure
    assert failure is not None and failure.kind == "request" and "forbids every token" in failure.message
    assert good.wait().ids[0] == serial(demo, good.request)[1]


def test_grammars_hold_with_and_without_guesses(demo: Model, engine: Engine) -> None:
    schema = {"type": "array", "items": {"enum": ["dog", "cat"]}, "minItems": 5, "maxItems": 5}
    grammar = Guide(demo).compile("json_schema", schema)
    prompt = demo.tokenizer.encode("Once upon a time")
    for how in (Sampling(), Sampling(temperature=1.0, seed=4)):
        plain, guessing = (
            Asked(engine, Request(prompt, 480, how, grammar=grammar, lookup=lookup)).wait()
            for lookup in (0, 8)
        )
        assert plain.ids == guessing.ids and plain.texts == guessing.texts
        assert plain.reasons == guessing.reasons == ["stop"]
        assert len(json.loads(plain.texts[0])) == 5


def test_log_probabilities_are_those_of_the_model(demo: Model, engine: Engine) -> None:
    prompt = demo.tokenizer.encode("Once upon a time")
    tokens = Asked(engine, greedy(prompt, 5, top_logprobs=2)).wait().tokens
    session = demo.session()
    logits = session.feed(prompt)
    for token in tokens:
        wide = logits.astype("float64")
        expected = wide[token.id] - wide.max() - np.log(np.exp(wide - wide.max()).sum())
        assert token.logprob == pytest.approx(expected, abs=1e-9)
        assert token.top[0] == (token.id, token.logprob) and token.top[1][1] <= token.top[0][1]
        logits = session.feed([token.id])


def test_a_draft_model_changes_no_answer(demo: Model, demo_path: Path, talker: Model) -> None:
    with pytest.raises(UsageError, match="another tokenizer"):
        Engine(demo, draft=talker)
    drafting = Engine(demo, draft=halfbyte.load(demo_path, policy="f32"))
    try:
        for count, seed in ((2, 5), (12, 6)):  # few answers, which the draft model serves, and many
            for asked in ask_all(drafting, requests(demo, count, seed)):
                got = asked.wait()
                assert (got.texts[0], got.ids[0], got.reasons[0]) == serial(demo, asked.request)
        assert drafting.metrics.guessed_right > 20
    finally:
        drafting.close()


def test_the_draft_models_memory_is_counted(demo: Model, demo_path: Path) -> None:
    prompts = [
        demo.tokenizer.encode(f"Once upon a time there was a {w}") for w in ("dog", "cat", "girl", "boy")
    ]
    requests = [greedy(p, 90, lookup=8) for p in prompts]
    asked = []
    run = demo.run
    for contexts in (1.2, 20):
        limit = int(contexts * Memory(demo, None).of(demo.context_length))
        engine = Engine(demo, memory=limit, draft=halfbyte.load(demo_path))
        most = 0

        def watched(step: Step, engine: Engine = engine) -> np.ndarray:
            nonlocal most
            kvs = [kv for a in engine._running for kv in (a.kv, a.guesses.kv) if kv is not None]
            pages = {id(p): p for kv in [*kvs, *engine.prefixes.kvs()] for row in kv.pages for p in row if p}
            most = max(most, sum(a.guesses.kv is not None for a in engine._running))
            assert sum(p.bytes.nbytes for p in pages.values()) <= engine.memory.held <= engine.memory.limit
            return run(step)

        demo.run = watched  # type: ignore[method-assign]
        try:
            results = [a.wait() for a in [Asked(engine, r) for r in requests]]
            state = engine.state()
        finally:
            demo.run = run  # type: ignore[method-assign]
            engine.close()
        for request, got in zip(requests, results):
            assert got.failure is None and (got.texts[0], got.ids[0], got.reasons[0]) == serial(demo, request)
        assert state["kv_bytes"] <= limit
        asked.append(most)
    assert asked[0] < asked[1] == len(requests)  # where memory is short some are not asked
