"""Counters of the server, in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping

_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_WINDOW = 10.0  # seconds that the current speed is taken over


class Metrics:
    """Counts; each field is written by one thread only."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # (route, status)
        self.prompt_tokens = self.cached_tokens = self.answer_tokens = 0
        self.guessed = self.guessed_right = 0
        self.steps = self.rows = self.preemptions = self.failures = 0
        self.step_seconds = 0.0
        self.first_token_seconds = 0.0
        self.first_tokens = 0
        self._first_token_buckets = [0] * len(_BUCKETS)
        self._recent: deque[tuple[float, int]] = deque(maxlen=4096)

    def step(self, rows: int, seconds: float) -> None:
        """A step of the model."""
        self.steps += 1
        self.rows += rows
        self.step_seconds += seconds

    def produced(self, tokens: int, guessed: int) -> None:
        """Tokens of an answer out of one step, of which some were guessed."""
        self.answer_tokens += tokens
        self.guessed += guessed
        self.guessed_right += max(0, min(tokens - 1, guessed))
        self._recent.append((time.monotonic(), tokens))

    def first_token(self, seconds: float) -> None:
        """Time from submission to the first token."""
        self.first_tokens += 1
        self.first_token_seconds += seconds
        for i, bound in enumerate(_BUCKETS):
            self._first_token_buckets[i] += seconds <= bound

    def tokens_per_second(self) -> float:
        """Answer tokens a second over the last ten seconds."""
        since = time.monotonic() - _WINDOW
        return sum(n for when, n in list(self._recent) if when >= since) / _WINDOW

    def text(self, state: Mapping[str, int], hits: int, misses: int) -> str:
        """The exposition."""
        lines: list[str] = []

        def put(name: str, kind: str, about: str, value: float) -> None:
            lines.extend(
                (
                    f"# HELP halfbyte_{name} {about}",
                    f"# TYPE halfbyte_{name} {kind}",
                    f"halfbyte_{name} {value}",
                )
            )

        lines += ["# HELP halfbyte_requests_total HTTP requests.", "# TYPE halfbyte_requests_total counter"]
        for (route, status), count in sorted(self.requests.copy().items()):
            lines.append(f'halfbyte_requests_total{{route="{route}",status="{status}"}} {count}')
        for name, about, value in (
            ("prompt_tokens", "Tokens of prompts.", self.prompt_tokens),
            ("prompt_tokens_cached", "Tokens of prompts found in the prefix cache.", self.cached_tokens),
            ("answer_tokens", "Tokens produced.", self.answer_tokens),
            ("guessed_tokens", "Tokens guessed by prompt lookup.", self.guessed),
            ("guessed_tokens_right", "Guesses that were right.", self.guessed_right),
            ("steps", "Steps of the model.", self.steps),
            ("step_rows", "Rows of all steps.", self.rows),
            ("step_seconds", "Seconds in steps.", self.step_seconds),
            ("preemptions", "Answers that gave up their memory for a while.", self.preemptions),
            ("failures", "Requests that ended in an error after they were queued.", self.failures),
            ("prefix_hits", "Prompts that continued a remembered one.", hits),
            ("prefix_misses", "Prompts that did not.", misses),
        ):
            put(f"{name}_total", "counter", about, value)
        for name, about in (
            ("running", "Answers that run."),
            ("waiting", "Requests that wait."),
            ("resident_bytes", "Bytes of the process in memory."),
            ("kv_bytes", "Bytes of keys and values."),
            ("kv_limit_bytes", "Bytes that keys and values may take."),
            ("prefix_entries", "Prompts remembered."),
            ("prefix_bytes", "Bytes of remembered prompts."),
        ):
            put(name, "gauge", about, state[name])
        put("tokens_per_second", "gauge", "Tokens produced a second, lately.", self.tokens_per_second())
        name = "halfbyte_first_token_seconds"
        lines += [f"# HELP {name} Time to the first token.", f"# TYPE {name} histogram"]
        for bound, count in zip(_BUCKETS, self._first_token_buckets):
            lines.append(f'{name}_bucket{{le="{bound}"}} {count}')
        lines.append(f'{name}_bucket{{le="+Inf"}} {self.first_tokens}')
        lines += [f"{name}_sum {self.first_token_seconds}", f"{name}_count {self.first_tokens}"]
        return "\n".join(lines) + "\n"
