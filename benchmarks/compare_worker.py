"""One engine in a process of its own: JSON commands on stdin, one JSON answer each on stdout.

Standard library and NumPy only, so that it also runs under a peer's interpreter. `engine_*.py` are the engines;
each is a script that ends in `serve(ITS_CLASS)`.

    {"do": "load", ...}                                  the engine's options; how long it took, facts
    {"do": "fill", "depths": [0, 2048], "room": 512}     one cache a depth, holding that many tokens
    {"do": "prefill" | "decode", "depth": 2048, "tokens": 512}    seconds; the cache is as before
    {"do": "memory"}                                     MiB, of this process so far
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

WARM_TOKENS = 32  # fed before anything is timed: faults in the weights, wakes the threads
FIRST_ROOM = 1024  # tokens that the cache of a cold start has room for


class Engine(Protocol):
    """What a peer must be able to do. A cache is whatever the engine makes of it."""

    def load(self, **options: Any) -> dict[str, Any]:
        """Open a model. Returns facts for the record, `vocab_size` among them."""

    def fill(self, ids: list[int], depths: list[int], room: int) -> dict[int, Any]:
        """For each depth a cache that holds the first `depth` ids and has room for `room` more tokens."""

    def feed(self, cache: Any, ids: list[int]) -> float:
        """Append tokens and compute the logits after the last; returns one of them, so that none is lazy."""

    def rewind(self, cache: Any, depth: int) -> None:
        """Forget everything after the first `depth` tokens."""


def token_ids(vocab: int, count: int, seed: int) -> list[int]:
    """The text of every engine: random, since speed does not depend on it."""
    return np.random.default_rng(seed).integers(0, vocab, count).tolist()


def memory() -> dict[str, float]:
    """MiB of this process: the largest resident set, and what is private and not a mapped file now (Linux)."""
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    return {
        name: int(status[key].split()[0]) / 1024 for name, key in (("peak", "VmHWM"), ("private", "RssAnon"))
    }


class Server:
    """The commands above, for one engine."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.caches: dict[int, Any] = {}
        self.ids: list[int] = []
        self.vocab = self.seed = 0

    def load(self, seed: int = 0, **options: Any) -> dict[str, Any]:
        """Open the model; `load_s` counts from after the interpreter's start."""
        start = time.perf_counter()
        facts = self.engine.load(**options)
        self.vocab, self.seed = facts["vocab_size"], seed
        return {"load_s": time.perf_counter() - start, "facts": facts}

    def fill(self, depths: list[int], room: int) -> dict[str, Any]:
        """Make the caches and feed a few tokens."""
        start = time.perf_counter()
        depths = sorted(set(depths))
        self.ids = token_ids(self.vocab, depths[-1] + room, self.seed)
        self.caches = self.engine.fill(self.ids, depths, room)
        first = depths[0]
        self.engine.feed(self.caches[first], self.ids[first : first + min(WARM_TOKENS, room)])
        self.engine.rewind(self.caches[first], first)
        return {"fill_s": time.perf_counter() - start}

    def first(self) -> dict[str, Any]:
        """The first token of a cold start: an empty cache, one token, its logits."""
        start = time.perf_counter()
        self.ids = token_ids(self.vocab, FIRST_ROOM + 1, self.seed)
        self.caches = self.engine.fill(self.ids, [0], FIRST_ROOM + 1)
        logit = self.engine.feed(self.caches[0], self.ids[:1])
        took = time.perf_counter() - start
        self.engine.rewind(self.caches[0], 0)
        return {"first_s": took, "logit": logit}

    def prefill(self, depth: int, tokens: int) -> dict[str, Any]:
        """Seconds for `tokens` tokens at once."""
        cache = self.caches[depth]
        start = time.perf_counter()
        logit = self.engine.feed(cache, self.ids[depth : depth + tokens])
        took = time.perf_counter() - start
        self.engine.rewind(cache, depth)
        return {"seconds": took, "logit": logit}

    def decode(self, depth: int, tokens: int) -> dict[str, Any]:
        """Seconds for `tokens` tokens one by one, after one that is not counted."""
        cache, logit = self.caches[depth], 0.0
        self.engine.feed(cache, self.ids[depth : depth + 1])
        start = time.perf_counter()
        for i in range(depth + 1, depth + 1 + tokens):
            logit = self.engine.feed(cache, self.ids[i : i + 1])
        took = time.perf_counter() - start
        self.engine.rewind(cache, depth)
        return {"seconds": took, "logit": logit}

    def memory(self) -> dict[str, Any]:
        """See `memory`."""
        return memory()


def serve(engine: Engine) -> None:
    """Answer until stdin closes. What libraries print goes to stderr; an error ends the process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = Server(engine)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(server, command.pop("do"))(**command)
        except Exception as error:  # reported to the parent, which names the engine
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)
        if "error" in answer:
            raise SystemExit(1)
