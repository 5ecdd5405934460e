"""What the server's engine gains: shared steps, remembered prompts, guesses. Every answer is checked.

An answer that differs from its serial one ends the script.

    python benchmarks/concurrency.py MODEL.hb [--streams 8] [--prompt 2048] [--tokens 64] [--rounds 3] [--json]

decode    tokens/s of one stream and of several together, at short context
prefix    seconds to the first token of a prompt that is new, and of one that shares all but its last 16 tokens
lookup    tokens/s of a copying answer without guesses and with them (`text` repeats itself: the copy-heavy case)
Rates are the best of --rounds, which take turns, as other programs may run meanwhile. Token ids are random but for
`lookup`, whose prompt is a short pattern again and again.
"""

from __future__ import annotations

import argparse
import json
import queue
import time
from typing import Any

import numpy as np

import halfbyte
from halfbyte.runtime.generate import generate
from halfbyte.runtime.model import Model
from halfbyte.runtime.sampler import Sampling
from halfbyte.runtime.server.answer import Event, Failed, Finished, Request, Token
from halfbyte.runtime.server.engine import Engine


class Asked:
    """A submitted request, its ids and the time of its first token."""

    def __init__(self, engine: Engine, request: Request):
        self.events: queue.Queue[list[Event]] = queue.Queue()
        self.start = time.perf_counter()
        self.first = 0.0
        self.ids: list[int] = []
        engine.submit(request, self.events.put)

    def wait(self) -> float:
        """Seconds from the first token to the end."""
        while True:
            for event in self.events.get():
                if isinstance(event, Token):
                    self.first = self.first or time.perf_counter()
                    self.ids.append(event.id)
                elif isinstance(event, Finished):
                    return time.perf_counter() - self.first
                elif isinstance(event, Failed):
                    raise SystemExit(event.message)


def serial(model: Model, prompt: list[int], how: Sampling, tokens: int) -> list[int]:
    """Ids of `generate`."""
    answer = generate(model, prompt, max_tokens=tokens, **how.__dict__)
    "".join(answer)
    return answer.ids


def measure(model: Model, streams: int, prompt: int, tokens: int, rounds: int) -> dict[str, Any]:
    """All figures."""
    rng = np.random.default_rng(0)
    how = Sampling(logit_bias=dict.fromkeys(model.eos_ids, float("-inf")))

    def ids(n: int) -> list[int]:
        return rng.integers(3, model.vocab_size, n).tolist()

    def best(name: str, rate: float) -> None:
        found[name] = max(rate, found.get(name, 0.0))

    engine, found = Engine(model, slots=max(32, streams)), dict[str, Any]()
    try:
        Asked(engine, Request(ids(8), 4, how)).wait()
        answers: list[tuple[list[int], list[int]]] = []
        for count in (1, streams) * rounds:
            prompts = [ids(8) for _ in range(count)]
            begin = time.perf_counter()
            asked = [Asked(engine, Request(p, tokens, how)) for p in prompts]
            for one in asked:
                one.wait()
            best(f"decode_{count}", count * tokens / (time.perf_counter() - begin))
            answers += [(p, one.ids) for p, one in zip(prompts, asked)]
        for given, answer in answers[: 2 * (1 + streams)]:
            assert answer == serial(model, given, how, tokens), "an answer differs from its serial one"
        shared = ids(prompt - 16)
        for name in ("cold", "warm"):
            one = Asked(engine, Request(shared + ids(16), 1, how))
            one.wait()
            found[f"first_token_{name}"] = one.first - one.start
        pattern = ids(24) * 8
        wanted = serial(model, pattern, how, tokens)
        for lookup in (0, 10) * rounds:
            one = Asked(engine, Request(pattern, tokens, how, lookup=lookup))
            best(f"lookup_{lookup}", (tokens - 1) / one.wait())
            assert one.ids == wanted, "an answer differs from its serial one"
        found["guesses_right"] = engine.metrics.guessed_right / max(1, engine.metrics.guessed)
    finally:
        engine.close()
    found["shared_gain"] = found[f"decode_{streams}"] / found["decode_1"]
    found["prefix_gain"] = found["first_token_cold"] / found["first_token_warm"]
    found["lookup_gain"] = found["lookup_10"] / found["lookup_0"]
    return found


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = halfbyte.load(args.model)
    found = measure(
        model, args.streams, min(args.prompt, model.context_length - 1), args.tokens, max(1, args.rounds)
    )
    print(json.dumps(found) if args.json else "\n".join(f"{k:20} {v:10.3f}" for k, v in found.items()))


if __name__ == "__main__":
    main()
