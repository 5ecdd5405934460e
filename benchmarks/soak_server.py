"""Many clients that come, ask and hang up, against `halfbyte serve`: is every answer still its serial one?

    python benchmarks/soak_server.py MODEL.hb... [--clients 64] [--seconds 180] [--kv f16,k8v8,tq4] [--draft FILE]

Every model is served in every mode for an equal part of the time, with fewer slots and a shorter queue than clients and
keys and values for --contexts full contexts, so that requests wait, are refused and lose their memory to older ones.
Clients share long beginnings and leave at random: before the answer, in the middle of it, in the middle of their own
request, in order or by a reset. What finished is compared with `runtime.generate` alone, text by text, with its reason
and its count of tokens; what was left with the beginning of the same text. At the end nothing may run, wait or be held
but remembered prompts, and SIGTERM must end the server with status 0 while answers run. Any failure is status 1.
"""

from __future__ import annotations

import argparse
import http.client
import io
import itertools
import json
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import halfbyte
from halfbyte.formats.errors import UsageError
from halfbyte.runtime.constrain import Guide
from halfbyte.runtime.conversation import prompt_ids
from halfbyte.runtime.generate import generate
from halfbyte.runtime.model import Model
from halfbyte.runtime.server.memory import Memory

COMMAND = (sys.executable, "-c", "import sys; from halfbyte.runtime.cli import main; sys.exit(main())")
BEGINNINGS = (
    "",
    "You tell short stories to small children. " * 3,
    "Once upon a time there was a little girl named Lily who had a big red ball and a small dog. " * 6,
)
WORDS = ("dog", "cat", "big", "red", "tree", "park", "ball", "Lily", "Tom", "\u00e9t\u00e9", "\u72d7")
PATTERN = "(Lily|Tom|dog|cat)( and (Lily|Tom|dog|cat)){2,9}[.!]"
GROWTH = (
    48 << 20
)  # bytes by which the last quarter of a run may exceed the second: far below what a leak would be
GRACE = 2.0


@dataclass(frozen=True)
class Job:
    """A request, and by choice what it gives: (text, reason)."""

    path: str
    body: dict[str, Any]
    answers: tuple[tuple[str, str], ...]
    tokens: int


@dataclass
class Outcome:
    """What came of a run. counts: finished, left, 429 and the like; wrong: one line each."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    before: int = 0
    after: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    shutdown: float = 0.0

    def growth(self) -> int:
        """Bytes by which the last quarter's largest resident set exceeds the second quarter's."""
        n = len(self.rss)
        return max(self.rss[3 * n // 4 :], default=0) - max(self.rss[n // 4 : n // 2], default=0)


# ---- what is asked, and what must come ------------------------------------------------------------


def jobs(model: Model, count: int, tokens: int, seed: int) -> list[Job]:
    """Requests of every kind in turn, with their serial answers."""
    rng, guide = random.Random(seed), Guide(model)
    kinds = itertools.cycle((_plain, _chat, _plain, _several, _plain, _copying, _long, _guided))
    return [kind(model, guide, rng, tokens) for kind, _ in zip(kinds, range(count))]


def _words(rng: random.Random, most: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def _serial(model: Model, ids: list[int], body: dict[str, Any], choices: int = 1) -> dict[str, Any]:
    """The fields of a Job: each answer by `generate`, alone."""
    answers, tokens = [], 0
    for i in range(choices):
        answer = generate(
            model, ids, max_tokens=body["max_tokens"], stop=body.get("stop", ()),
            temperature=body["temperature"], seed=body.get("seed", 0) + i,
        )  # fmt: skip
        answers.append(("".join(answer), "stop" if answer.finish_reason == "stop" else "length"))
        tokens += len(answer.ids)
    return {"body": body, "answers": tuple(answers), "tokens": tokens}


def _completion(model: Model, prompt: str, tokens: int, choices: int = 1, **fields: Any) -> Job:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "n": choices, **fields}
    return Job("/v1/completions", **_serial(model, model.tokenizer.encode(prompt), body, choices))


def _plain(model: Model, _: Guide, rng: random.Random, tokens: int) -> Job:
    stop = {"stop": [rng.choice(WORDS[:4])]} if rng.random() < 0.3 else {}
    return _completion(model, rng.choice(BEGINNINGS) + _words(rng), rng.randint(1, tokens), **stop)


def _several(model: Model, _: Guide, rng: random.Random, tokens: int) -> Job:
    how = {"temperature": 0.8, "seed": rng.randrange(1 << 30)}
    return _completion(model, rng.choice(BEGINNINGS) + _words(rng), rng.randint(1, tokens), 3, **how)


def _copying(model: Model, _: Guide, rng: random.Random, tokens: int) -> Job:
    return _completion(model, (_words(rng, 6) + ". ") * 6, tokens)


def _long(model: Model, _: Guide, rng: random.Random, tokens: int) -> Job:
    """A prompt that leaves little of the context, so that some answers end with it."""
    text = _words(rng)
    while len(model.tokenizer.encode(text)) < model.context_length - tokens:
        text += " " + _words(rng)
    ids = model.tokenizer.encode(text)[: model.context_length - rng.randint(1, tokens)]
    body = {"prompt": ids, "max_tokens": 2 * tokens, "temperature": 0}
    return Job("/v1/completions", **_serial(model, ids, body))


def _chat(model: Model, _: Guide, rng: random.Random, tokens: int) -> Job:
    messages = [{"role": "system", "content": BEGINNINGS[1]}, {"role": "user", "content": _words(rng)}]
    body = {"messages": messages, "max_tokens": rng.randint(1, tokens), "temperature": 0}
    return Job("/v1/chat/completions", **_serial(model, prompt_ids(model, messages), body))


def _guided(model: Model, guide: Guide, rng: random.Random, tokens: int) -> Job:
    """Under a grammar: the likeliest of the tokens that it allows, one after the other."""
    prompt, ids = _words(rng), []
    matcher = guide.compile("regex", PATTERN).matcher()
    session, stream = model.session(), model.tokenizer.stream()
    logits, text, reason = session.feed(model.tokenizer.encode(prompt)), "", "length"
    while len(ids) < tokens:
        token = int(matcher.masked(logits).argmax())
        if token in model.eos_ids:
            reason = "stop"
            break
        ids.append(token)
        text += stream.push(token)
        if matcher.consume(token):
            reason = "stop"
            break
        logits = session.feed([token])
    grammar = {"type": "grammar", "syntax": "regex", "definition": PATTERN}
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "response_format": grammar}
    return Job("/v1/completions", body, ((text + stream.flush(), reason),), len(ids))


# ---- one client -----------------------------------------------------------------------------------


class Client:
    """Asks again and again until the time is over."""

    def __init__(self, port: int, work: list[Job], outcome: Outcome, lock: threading.Lock, seed: int):
        self._port, self._work, self._outcome, self._lock = port, work, outcome, lock
        self._rng = random.Random(seed)
        self._connection: http.client.HTTPConnection | None = None

    def run(self, until: float) -> None:
        """Until time.monotonic() is `until`."""
        try:
            while time.monotonic() < until:
                self._count(*self._ask(self._rng.choice(self._work)))
        except (OSError, http.client.HTTPException) as error:
            self._count("lost", f"a connection that nobody hung up broke: {error!r}")
        finally:
            self._hang_up()

    def _count(self, what: str, wrong: str = "") -> None:
        with self._lock:
            self._outcome.counts[what] += 1
            if wrong:
                self._outcome.wrong.append(wrong)

    def _hang_up(self, reset: bool = False) -> None:
        if self._connection is not None and self._connection.sock is not None:
            if reset:  # not an orderly end: what is on the way is dropped
                self._connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._connection.close()
        self._connection = None

    def _ask(self, job: Job) -> tuple[str, str]:
        rng = self._rng
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        how = rng.choices(("stream", "whole", "leave", "silent", "half", "bad"), (45, 20, 25, 5, 3, 2))[0]
        if how == "half":
            self._connection.connect()
            body = json.dumps(job.body).encode()
            head = f"POST {job.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
            self._connection.sock.sendall(head.encode() + body[: len(body) // 2])
            self._hang_up(rng.random() < 0.5)
            return "half a request", ""
        body = {**job.body, "stream": how in ("stream", "leave") or rng.random() < 0.5}
        if how == "bad":
            body["temperature"] = "hot"
        headers = {"content-type": "application/json"}
        self._connection.request("POST", job.path, json.dumps(body), headers)
        if how == "silent":
            time.sleep(rng.random() * 0.02)
            self._hang_up(rng.random() < 0.5)
            return "left before the answer", ""
        response = self._connection.getresponse()
        try:
            if response.status == 429:
                response.read()
                time.sleep(0.05 + 0.2 * rng.random())  # the header asks for a whole second
                return "429", ""
            if how == "bad" or response.status != 200:
                text = response.read().decode()
                right = how == "bad" and response.status == 400
                return str(response.status), "" if right else f"status {response.status}: {text[:200]}"
            if not body["stream"]:
                return "whole", self._compare_whole(job, json.loads(response.read()))
            leave = rng.randint(0, 12) if how == "leave" else None
            got, wrong = follow(response, job, leave)
            if got == "left":
                response.close()
                self._hang_up(rng.random() < 0.5)
            return got, wrong
        finally:
            response.close()

    @staticmethod
    def _compare_whole(job: Job, body: dict[str, Any]) -> str:
        got = tuple(
            (c["message"]["content"] or "" if "message" in c else c["text"], c["finish_reason"])
            for c in body["choices"]
        )
        if got != job.answers:
            return f"{job.body!r}: {got!r} instead of {job.answers!r}"
        count = body["usage"]["completion_tokens"]
        return "" if count == job.tokens else f"{job.body!r}: {count} tokens were counted, not {job.tokens}"


def follow(response: io.BufferedIOBase, job: Job, leave: int | None = None) -> tuple[str, str]:
    """Read a stream, at most `leave` events of it; (what became of it, what is wrong)."""
    texts, reasons = [""] * len(job.answers), [""] * len(job.answers)
    seen = 0
    while seen != leave:
        line = response.readline()
        if not line or line == b"data: [DONE]\n":
            break
        if not line.startswith(b"data: "):
            continue
        seen += 1
        event = json.loads(line[6:])
        if "error" in event:
            message = event["error"]["message"]
            begun = all(want.startswith(got) for got, (want, _) in zip(texts, job.answers))
            return "ended", "" if "shutting down" in message and begun else message
        for choice in event["choices"]:
            i = choice["index"]
            texts[i] += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            reasons[i] = choice.get("finish_reason") or reasons[i]
    else:
        begun = all(want.startswith(got) for got, (want, _) in zip(texts, job.answers))
        return "left", "" if begun else f"{job.body!r}: {texts!r} does not begin {job.answers!r}"
    response.read()
    right = tuple(zip(texts, reasons)) == job.answers
    return "streamed", "" if right else f"{job.body!r}: {texts!r}, {reasons} instead of {job.answers!r}"


# ---- the server -----------------------------------------------------------------------------------


@contextmanager
def serving(*argv: object) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    """A process that serves, its port, and the file of what it says."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open(Path(folder) / "stderr", "w", encoding="utf-8") as said,
    ):
        process = subprocess.Popen(
            [*COMMAND, "serve", *map(str, argv), "--port", "0"], stderr=said, text=True
        )
        try:
            found = None
            while found is None:
                time.sleep(0.05)
                text = Path(said.name).read_text("utf-8")
                if process.poll() is not None:
                    raise SystemExit(f"the server did not start: {text}")
                found = re.search(r"http://127\.0\.0\.1:(\d+)", text)
            yield process, int(found[1]), Path(said.name)
        finally:
            process.kill()
            process.wait()


def metrics(port: int) -> dict[str, float]:
    """The numbers of /metrics, without those that have labels."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return {name: float(value) for name, value in re.findall(r"^halfbyte_(\w+) (\S+)$", text, re.MULTILINE)}


def soak(
    model: Model, *, clients: int, seconds: float, contexts: float, draft: str | None = None, count: int = 96,
    tokens: int = 64, seed: int = 0, note: Callable[[str], None] = lambda _: None,
) -> Outcome:  # fmt: skip
    """One run of a server of this model's file, in this model's mode."""
    work, outcome, lock = jobs(model, count, tokens, seed), Outcome(), threading.Lock()
    limit = int(contexts * Memory(model, None).of(model.context_length))
    options: list[object] = ["--kv", model.kv_mode, "--slots", max(3, clients // 5), "--queue", clients // 2]
    options += ["--kv-memory", limit, "--grace", GRACE, *(("--draft", draft) if draft else ())]
    with serving(model.file.path, *options) as (process, port, said):
        watched = psutil.Process(process.pid)
        outcome.before = watched.memory_info().rss
        until = time.monotonic() + seconds
        everyone = [Client(port, work, outcome, lock, 1000 * seed + i) for i in range(clients)]
        threads = [threading.Thread(target=c.run, args=(until,), daemon=True) for c in everyone]
        for thread in threads:
            thread.start()
        while any(t.is_alive() for t in threads) and time.monotonic() < until + 120:
            time.sleep(min(0.25, seconds / 40))
            if process.poll() is not None:
                break
            outcome.rss.append(watched.memory_info().rss)
        if any(t.is_alive() for t in threads):
            outcome.wrong.append("clients wait for ever")
        if process.poll() is None:
            _settled(port, outcome)
            outcome.after = watched.memory_info().rss
            _ended(process, port, work, outcome, lock, clients)
        said_all = said.read_text("utf-8")
        if process.returncode != 0 or "Traceback" in said_all or "failed" in said_all:
            outcome.wrong.append(f"the server ended with status {process.returncode}: {said_all[-2000:]}")
    if outcome.growth() > GROWTH:
        outcome.wrong.append(f"memory grew by {outcome.growth()} bytes from the second quarter to the last")
    note(summary(outcome))
    return outcome


def _settled(port: int, outcome: Outcome) -> None:
    """Once all clients are gone nothing may run, wait or be held but remembered prompts."""
    deadline = time.monotonic() + 30
    while True:
        found = outcome.metrics = metrics(port)
        held = found["kv_bytes"] - found["prefix_bytes"]
        if found["running"] == found["waiting"] == held == 0:
            break
        if time.monotonic() > deadline:
            outcome.wrong.append(f"left behind: {found}")
            return
        time.sleep(0.05)
    if found["kv_bytes"] > found["kv_limit_bytes"]:
        outcome.wrong.append(f"{found['kv_bytes']} bytes of keys and values are more than the limit")


def _ended(
    process: subprocess.Popen[str], port: int, work: list[Job], outcome: Outcome, lock: threading.Lock, n: int
) -> None:
    """SIGTERM while answers run: they finish, or are told, and the server ends in good order."""
    begun = threading.Semaphore(0)

    def ask(job: Job) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("POST", job.path, json.dumps({**job.body, "stream": True}))
            response = connection.getresponse()
            begun.release()
            got = follow(response, job) if response.status == 200 else (str(response.status), "")
        except (OSError, http.client.HTTPException):  # it came after the signal
            got = "too late", ""
            begun.release()
        finally:
            connection.close()
        with lock:
            outcome.counts[f"{got[0]} at the end"] += 1
            outcome.wrong += filter(None, got[1:])

    threads = [threading.Thread(target=ask, args=(work[i % len(work)],), daemon=True) for i in range(n)]
    for thread in threads:
        thread.start()
    for _ in range(n // 2):
        begun.acquire(timeout=30)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(GRACE + 30)
    except subprocess.TimeoutExpired:
        outcome.wrong.append("SIGTERM did not end the server")
    outcome.shutdown = time.monotonic() - start
    for thread in threads:
        thread.join(30)


def summary(outcome: Outcome) -> str:
    """One run in a few lines."""
    mib, found = 1 << 20, outcome.metrics
    counts = ", ".join(f"{n} {what}" for what, n in sorted(outcome.counts.items()))
    lines = [f"  requests  {counts}"]
    if found:
        lines.append(
            f"  engine    {found['answer_tokens_total']:.0f} tokens in {found['steps_total']:.0f} steps, "
            f"{found['prompt_tokens_cached_total']:.0f} of {found['prompt_tokens_total']:.0f} prompt tokens known, "
            f"{found['guessed_tokens_right_total']:.0f} of {found['guessed_tokens_total']:.0f} guesses right, "
            f"{found['preemptions_total']:.0f} preemptions, {found['failures_total']:.0f} failures"
        )
    lines.append(
        f"  memory    {outcome.before / mib:.1f} MiB before, {max(outcome.rss, default=0) / mib:.1f} at most, "
        f"{outcome.after / mib:.1f} after; second to last quarter {outcome.growth() / mib:+.1f} MiB"
    )
    lines.append(f"  the end   {outcome.shutdown:.2f} s after SIGTERM; {len(outcome.wrong)} wrong")
    return "\n".join(lines + [f"  WRONG     {line[:600]}" for line in outcome.wrong[:10]])


def main() -> None:
    """Run them all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180.0, help="of all runs together (default: 180)")
    parser.add_argument("--kv", default="f16,k8v8,tq4", help="modes, default: f16,k8v8,tq4")
    parser.add_argument(
        "--contexts", type=float, default=2.0, help="full contexts of keys and values (default: 2)"
    )
    parser.add_argument("--draft", help="a draft model of the same tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    runs = [(path, mode) for path in args.models for mode in args.kv.split(",")]
    wrong, finished = 0, 0
    for i, (path, mode) in enumerate(runs):
        try:
            model = halfbyte.load(path, kv=mode)
        except UsageError as error:
            raise SystemExit(str(error)) from None
        print(f"{Path(path).name}, kv {mode}, {args.clients} clients", flush=True)
        outcome = soak(
            model, clients=args.clients, seconds=args.seconds / len(runs), contexts=args.contexts, draft=args.draft,
            seed=args.seed + i, note=lambda text: print(text, flush=True),
        )  # fmt: skip
        wrong += len(outcome.wrong)
        finished += outcome.counts["streamed"] + outcome.counts["whole"]
    print(f"{finished} answers compared as a whole, {wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
