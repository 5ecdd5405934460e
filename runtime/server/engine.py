"""The engine: one thread that owns the model's steps and shares each of them between all answers.

Whatever is mixed into a step, an answer is the one that `model.generate` gives for the same prompt, options
and seed: logits do not depend on the other rows, and every answer draws from its own random stream.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import psutil

from halfbyte.formats.errors import HalfbyteError, UsageError
from halfbyte.runtime.kv import KV, PAGE
from halfbyte.runtime.model import CHUNK, Model
from halfbyte.runtime.server.answer import Answer, Event, Failed, Request, Ticket, Token
from halfbyte.runtime.server.memory import Memory
from halfbyte.runtime.server.metrics import Metrics
from halfbyte.runtime.server.prefix import Prefixes, common
from halfbyte.runtime.server.scheduler import build, plan
from halfbyte.runtime.speculate import MAX_DRAFT, Ahead, check_draft

MAX_SLOTS = CHUNK // 2  # half of a step at least is for prompts
log = logging.getLogger("halfbyte.server")


class BusyError(HalfbyteError):
    """The queue is full."""


class ClosedError(HalfbyteError):
    """The engine is shutting down."""


class Engine:
    """Runs requests on a model.

    slots         answers that run at once, 1 .. MAX_SLOTS
    queue         requests that wait at most; one more raises BusyError
    memory        bytes of keys and values, the draft model's included, or None for a quarter of what is free
    prefix_share  part of `memory` that remembered prompts may take, 0 .. 1
    timeout       seconds that a request may take from submission to its end, or None
    draft         a smaller model of the same tokenizer that guesses while few answers run; UsageError for another's
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 32,
        queue: int = 128,
        memory: int | None = None,
        prefix_share: float = 0.5,
        timeout: float | None = None,
        draft: Model | None = None,
    ):
        if not 1 <= slots <= MAX_SLOTS:
            raise UsageError(f"slots must lie between 1 and {MAX_SLOTS}, not {slots}")
        if not 0 <= prefix_share <= 1:
            raise UsageError(f"the share of the prefix cache must lie between 0 and 1, not {prefix_share}")
        self.model, self.slots, self.queue, self.timeout = model, slots, queue, timeout
        if draft is not None:
            check_draft(model, draft)
        self.draft = draft
        self.memory = Memory(model, memory)
        self._draft_memory = None if draft is None else Memory(draft, self.memory.limit, 0)
        self.prefixes = Prefixes(int(prefix_share * self.memory.limit))
        self.metrics = Metrics()
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []  # oldest first
        self._changed = threading.Condition()
        self._closing = False
        self._drain_until: float | None = None
        self._thread = threading.Thread(target=self._work, name="halfbyte-engine", daemon=True)
        self._thread.start()

    # ---- from any thread ------------------------------------------------------------------------

    def submit(self, request: Request, deliver: Callable[[list[Event]], None]) -> Ticket:
        """Queue a request; `deliver` gets its events, in order, on the engine's thread.

        Raises UsageError for what the model cannot do, BusyError and ClosedError.
        """
        self._check(request)
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        ticket = Ticket(request, deliver, deadline)
        answers = [Answer(self.model, ticket, i, self.draft) for i in range(request.n)]
        answers[0].followers = answers[1:]
        with self._changed:
            if not self.accepting:
                raise ClosedError("the server is shutting down")
            waiting = sum(not a.ticket.cancelled for a in self._waiting)
            if waiting >= self.queue:
                raise BusyError(f"{waiting} requests are waiting already; try again later")
            self._waiting.append(answers[0])
            self._changed.notify()
        return ticket

    def drain(self, seconds: float) -> None:
        """Take no more requests; end those that still run after `seconds`."""
        with self._changed:
            self._drain_until = min(self._drain_until or float("inf"), time.monotonic() + seconds)
            self._changed.notify()

    def drain_soon(self, seconds: float) -> None:
        """`drain`, for signal handlers, which must not wait for a lock."""
        threading.Thread(target=self.drain, args=(seconds,), daemon=True).start()

    @property
    def accepting(self) -> bool:
        """Whether requests are taken."""
        return not self._closing and self._drain_until is None and self._thread.is_alive()

    def close(self) -> None:
        """End everything and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def state(self) -> dict[str, int]:
        """Gauges: answers running, requests waiting, bytes held."""
        return {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "resident_bytes": psutil.Process().memory_info().rss,
            "kv_bytes": self.memory.held,
            "kv_limit_bytes": self.memory.limit,
            "prefix_entries": len(self.prefixes),
            "prefix_bytes": self.prefixes.nbytes,
        }

    def _check(self, request: Request) -> None:
        prompt, model = request.prompt, self.model
        if not prompt:
            raise UsageError("the prompt is empty and the model has no start token: give some text")
        if len(prompt) >= model.context_length:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens; the model's context of {model.context_length} leaves "
                "no room for an answer"
            )
        if not all(0 <= i < model.vocab_size for i in prompt):
            raise UsageError(f"token ids must lie in 0..{model.vocab_size - 1}")
        if request.max_tokens < 0:
            raise UsageError(f"max_tokens must not be negative, not {request.max_tokens}")
        if not 1 <= request.n <= self.slots:
            raise UsageError(f"n must lie between 1 and {self.slots}, not {request.n}")
        biased = max(request.sampling.logit_bias or (), default=0)
        if biased >= model.vocab_size:
            raise UsageError(f"logit_bias names token {biased}; the model has {model.vocab_size} tokens")

    # ---- on the engine's thread -------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closing):
                    self._changed.wait()
            if self._closing:
                self._fail_all("shutdown", "the server is shutting down")
                return
            try:
                self._turn()
            except HalfbyteError as error:
                self._fail_all("request", str(error))
            except Exception:
                log.exception("a step failed")
                self._fail_all("bug", "the server failed; its log says more")

    def _turn(self) -> None:
        self._expire()
        self._admit()
        self._ask_drafts()
        chosen = self._reserved(plan(self._running))
        if not chosen:
            return
        step = build(chosen)
        started = time.perf_counter()
        logits = self.model.run(step)
        self.metrics.step(step.rows, time.perf_counter() - started)
        at = 0
        for answer, rows in chosen:
            filled = rows == answer.pending
            answer.fed += rows
            if filled:
                picked = logits[at : at + 1 + len(answer.draft)]
                at += len(picked)
                self._guarded(self._draw, answer, picked)
        tickets = {id(a.ticket): a.ticket for a, _ in chosen}
        for ticket in tickets.values():
            ticket.flush()
        self._retire()

    def _draw(self, answer: Answer, logits: np.ndarray) -> None:
        metrics, ticket = self.metrics, answer.ticket
        assert answer.kv is not None
        if not answer.produced:  # the prompt is in
            self.prefixes.add(answer.ids[: answer.fed], answer.kv)
            metrics.prompt_tokens += len(answer.ids)
            metrics.cached_tokens += ticket.cached_tokens
            for follower in answer.followers:
                follower.kv, follower.fed = answer.kv.fork(answer.fed), answer.fed
                self._running.append(follower)
                self._guarded(self._draw_one, follower, logits)
            answer.followers = []
        self._draw_one(answer, logits)
        if ticket.first_token is None and any(isinstance(e, Token) for e in ticket.outbox):
            ticket.first_token = time.monotonic()
            metrics.first_token(ticket.first_token - ticket.submitted)

    def _draw_one(self, answer: Answer, logits: np.ndarray) -> None:
        guessed = len(answer.draft)
        before = answer.produced
        if not before:
            answer.begin()
        if not answer.finished:
            answer.advance(logits)
        self.metrics.produced(answer.produced - before, guessed)

    def _guarded(self, act: Callable[[Answer, np.ndarray], None], answer: Answer, logits: np.ndarray) -> None:
        """What goes wrong in one answer ends its request only."""
        try:
            act(answer, logits)
        except HalfbyteError as error:
            self._fail(answer.ticket, "request", str(error))
        except Exception:
            log.exception("an answer failed")
            self._fail(answer.ticket, "bug", "the server failed; its log says more")

    def _retire(self) -> None:
        """Let go of answers that are finished; their keys and values serve the next turn of the chat."""
        for answer in self._running:
            if answer.finished and answer.kv is not None:
                self.prefixes.add(answer.ids[: answer.fed], answer.kv)
                answer.kv = None
        if any(a.finished or a.ticket.cancelled for a in self._running):
            self._running = [a for a in self._running if not (a.finished or a.ticket.cancelled)]
            self._recount()

    def _expire(self) -> None:
        """Drop what was cancelled and end what took too long."""
        now = time.monotonic()
        with self._changed:
            for answer in [a for a in self._waiting if a.ticket.cancelled]:
                self._waiting.remove(answer)
            waiting = list(self._waiting)
        for ticket in {id(a.ticket): a.ticket for a in [*waiting, *self._running]}.values():
            if self._drain_until is not None and now >= self._drain_until:
                self._fail(ticket, "shutdown", "the server is shutting down")
            elif ticket.deadline is not None and now >= ticket.deadline:
                self._fail(ticket, "timeout", f"the request took longer than {self.timeout:g} seconds")
        self._retire()

    def _fail(self, ticket: Ticket, kind: str, message: str) -> None:
        if ticket.cancelled:
            return
        ticket.outbox.append(Failed(kind, message))
        ticket.flush()
        ticket.cancelled = True
        with self._changed:
            for answer in [a for a in self._waiting if a.ticket is ticket]:
                self._waiting.remove(answer)
        self.metrics.failures += 1

    def _fail_all(self, kind: str, message: str) -> None:
        with self._changed:
            tickets = {id(a.ticket): a.ticket for a in [*self._waiting, *self._running]}
        for ticket in tickets.values():
            self._fail(ticket, kind, message)
        self._running = []
        self._recount()

    # ---- memory -----------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Start waiting requests while there are slots and memory; in order, so that none starves."""
        while True:
            with self._changed:
                answer = self._waiting[0] if self._waiting else None
            if answer is None:
                return
            started = len(self._running) + sum(len(a.followers) for a in self._running)
            if self._running and started + 1 + len(answer.followers) > self.slots:
                return
            found = self.prefixes.find(answer.ids)
            kv, fed = found if found else (self.model.new_kv(), 0)
            fresh = 0 if found else kv.nbytes
            if self._running and (self._soon_known(answer, fed) or not self._fits(answer, kv, fed, fresh)):
                return
            self.prefixes.count(fed)
            answer.kv, answer.fed = kv, fed
            self.memory.held += fresh
            if not answer.produced:
                answer.ticket.cached_tokens = fed
            with self._changed:
                if self._waiting and self._waiting[0] is answer:
                    self._waiting.popleft()
            if not answer.ticket.cancelled:
                self._running.append(answer)

    def _soon_known(self, answer: Answer, fed: int) -> bool:
        """Whether a prompt that is being fed now will spare this one more than the `fed` tokens known."""
        if not self.prefixes.limit:
            return False
        ids = np.asarray(answer.ids[:-1])
        filling = (a for a in self._running if a.pending > 1 and not a.produced)
        return any(common(np.asarray(a.ids), ids) >= fed + PAGE for a in filling)

    def _fits(self, answer: Answer, kv: KV, fed: int, fresh: int) -> bool:
        """Whether there is memory for this prompt, for what others have still to feed, and a page for each."""
        room = (
            fresh
            + self.memory.need(kv, fed, len(answer.ids))
            + (1 + len(self._running)) * self.memory.page_bytes
        )
        for running in self._running:
            if running.kv is not None:
                room += self.memory.need(running.kv, running.fed, len(running.ids))
        return self._make_room(room)

    def _reserved(self, chosen: list[tuple[Answer, int]]) -> list[tuple[Answer, int]]:
        """Make the positions of a step writable; answers that find no memory give theirs up or wait."""
        ready: list[tuple[Answer, int]] = []
        for answer, rows in chosen:
            if answer.kv is None:  # it gave up its memory to an older one
                continue
            end = answer.fed + rows + len(answer.draft)
            need = self.memory.need(answer.kv, answer.fed, end)
            while not self._make_room(need):
                victim = self._running[-1]
                if victim is answer and len(self._running) == 1:
                    raise HalfbyteError("keys and values of this answer do not fit the memory")
                self._preempt(victim)
                if victim is answer:
                    break
            if answer.kv is not None:
                answer.kv.reserve(end, answer.fed)
                self.memory.held += need
                ready.append((answer, rows))
        return [(a, rows) for a, rows in ready if a.kv is not None]

    def _make_room(self, need: int) -> bool:
        """Whether `need` more bytes fit; remembered prompts are forgotten for it, oldest first."""
        if self.memory.held + need <= self.memory.limit:
            return True
        while self._recount() + need > self.memory.limit:
            if not self.prefixes.evict() and not self._release_drafts():
                return False
        return True

    def _ask_drafts(self) -> None:
        """Let the draft model be asked where its keys and values fit too."""
        if self._draft_memory is None:
            return
        for answer in self._running:
            if isinstance(guesses := answer.guesses, Ahead):
                end = min(len(answer.ids) + MAX_DRAFT, self._draft_memory.context_length)
                kv = guesses.kv
                need = self._draft_memory.of(end) if kv is None else self._draft_memory.need(kv, 0, end)
                guesses.asks = answer.pending == 1 and self.memory.held + need <= self.memory.limit
                self.memory.held += need if guesses.asks else 0

    def _release_drafts(self) -> bool:
        """Whether a draft model's keys and values were given up."""
        holding = [a for a in self._running if a.guesses.kv is not None]
        for answer in holding:
            answer.guesses.release()
        return bool(holding)

    def _preempt(self, answer: Answer) -> None:
        """Take an answer's memory; it waits at the head of the queue and later feeds its tokens again."""
        self._running.remove(answer)
        answer.kv, answer.fed, answer.draft = None, 0, []
        answer.guesses.release()
        self.metrics.preemptions += 1
        with self._changed:
            self._waiting.appendleft(answer)

    def _recount(self) -> int:
        kvs = [kv for a in self._running for kv in (a.kv, a.guesses.kv) if kv is not None]
        return self.memory.recount([*kvs, *self.prefixes.kvs()])
