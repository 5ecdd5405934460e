"""What the inputs of every matrix look like on real tokens: one walk through the program, matrix by matrix.

The walk runs the built program on all calibration sequences at once, a stretch of ops at a time. The runtime
executes the ops between two LINEARs (a temporary file holds the program, its vectors and no matrix); EMBED and
LINEAR are computed here, in float32, on the rows that `Weights` gives. Before a LINEAR runs, its input has been
seen for every token, and a *visitor* is handed the matrix and the statistics:

    def visit(matrix: Matrix, statistics: Statistics) -> np.ndarray | None: ...

    Calibration(b, Weights(b), sequences).run(visit)

The visitor may return the float32[rows, cols] that later layers are to see, such as the dequantised result
(true-sequential, as in GPTQ); None means the float weights. A visitor that only looks (AWQ, SmoothQuant) sets
`hessians=False` and returns None; it may register edits in `Weights` or replace vectors of the builder
afterwards, and walk again.

Memory: the activations that live across a cut, for all tokens (mostly hidden states, tokens x hidden x 4 bytes; what
is more than a limit lies in a file), one matrix and its Hessian. Results do not depend on the number of threads.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.converter.blas import Products
from halfbyte.converter.builder import Builder, Matrix
from halfbyte.converter.calibration.activations import Activations
from halfbyte.converter.calibration.cuts import (
    ADD,
    EMBED,
    LINEAR,
    Stage,
    overlap,
    used,
    write_program,
)
from halfbyte.converter.calibration.own_text import own_text
from halfbyte.converter.calibration.route import Route, Visits
from halfbyte.converter.calibration.statistics import Collector, Statistics
from halfbyte.converter.weights import Weights
from halfbyte.formats import ops, program
from halfbyte.formats.errors import UsageError

if TYPE_CHECKING:
    from halfbyte.runtime.tokenizer import Tokenizer

SEQUENCES, LENGTH = 64, 512  # tokens to calibrate on, at most
BUILT_IN = Path(__file__).parent / "calibration" / "mix.txt"

ACTIVATIONS = 1 << 30  # bytes of activations that are held in memory, unless told otherwise
EMBED_ROWS = 1 << 14  # rows of an embedding table read at once


# visit(matrix, statistics of its input) -> float32[rows, cols] that later layers see, or None for the float weights
Visit = Callable[[Matrix, Statistics], "np.ndarray | None"]
# progress(matrix, multiply-adds done, multiply-adds in all)
Progress = Callable[[str, int, int], None]


class Calibration:
    """Walks the program of a builder over token sequences. One object may walk several times."""

    def __init__(
        self,
        b: Builder,
        weights: Weights,
        sequences: Sequence[Sequence[int]],
        *,
        backend: str | None = None,
        threads: int | None = None,
        folder: Path | None = None,
        memory: int = ACTIVATIONS,
    ):
        """sequences: token ids, each sequence from position 0. Raises UsageError when there are none.

        memory: bytes of activations to hold; what is more lies in unnamed files in `folder` (default: where temporary
        files are).
        """
        self.b, self.weights = b, weights
        self.ids = [np.asarray(s, np.int64) for s in sequences if len(s)]
        if not self.ids:
            raise UsageError("calibration needs at least one sequence of tokens")
        if any(int(s.min()) < 0 or int(s.max()) >= b.vocab for s in self.ids):
            raise UsageError(f"calibration ids must lie in 0..{b.vocab - 1}")
        self.backend, self.threads = backend, threads
        self.folder, self.memory = folder, memory
        self.tokens = sum(map(len, self.ids))

    def run(
        self,
        visit: Visit,
        *,
        hessians: bool = True,
        drift: bool = False,
        sample: int = 0,
        only: Container[str] | None = None,
        stored: Callable[[Matrix], np.ndarray | None] | None = None,
        embedding: Callable[[Matrix, np.ndarray], np.ndarray] | None = None,
        visits: Visits | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Call `visit` once for every matrix that a LINEAR uses, in the order of the program.

        hessians: collect x x^T, which most of the time goes into. drift: carry the float model's activations
        along as well and collect what the outputs miss (more than twice the time and memory). sample: rows to keep.
        only: names of the matrices to visit; the others cost no statistics, and the walk ends with the last one.
        stored(matrix) -> float32[rows, cols] is what later layers see of one that is not visited, None its weights.
        embedding(matrix, ids) -> float32[n, hidden] replaces the rows of an embedding table.
        visits(matrix): multiply-adds of a visit, for the progress.
        """
        with (
            tempfile.TemporaryDirectory(prefix="halfbyte-") as folder,
            Activations(self.tokens, self.folder, self.memory) as activations,
            Products(self.threads) as products,
        ):
            walk = _Walk(self, only, Path(folder) / "program.hb", products, activations)
            walk.go(
                visit,
                hessians,
                drift,
                sample,
                stored,
                embedding or self.embedding,
                visits or _nothing,
                progress,
            )

    def on(self, sequences: Sequence[Sequence[int]]) -> Calibration:
        """The same on other sequences."""
        return Calibration(
            self.b,
            self.weights,
            sequences,
            backend=self.backend,
            threads=self.threads,
            folder=self.folder,
            memory=self.memory,
        )

    def effort(
        self,
        *,
        hessians: bool = True,
        drift: bool = False,
        only: Container[str] | None = None,
        visits: Visits | None = None,
    ) -> int:
        """Multiply-adds of a walk: what its progress goes up to."""
        route = Route(self.b, only)
        walk = route.efforts(self.tokens, hessians, drift)
        return sum(walk) + sum(map(visits or _nothing, route.visited()))

    def embedding(self, t: Matrix, ids: np.ndarray) -> np.ndarray:
        """Float rows `ids` of a table, read a block at a time."""
        out = np.empty((len(ids), t.shape[1]), np.float32)
        for start in range(0, t.shape[0], EMBED_ROWS):
            wanted = (ids >= start) & (ids < start + EMBED_ROWS)
            if wanted.any():
                block = self.weights.rows(t, start, min(start + EMBED_ROWS, t.shape[0]))
                out[wanted] = block[ids[wanted] - start]
        return out


def _nothing(t: Matrix) -> int:
    return 0


class _Walk:
    """The program in a temporary file, and the activations of all tokens at the current cut."""

    def __init__(
        self,
        c: Calibration,
        only: Container[str] | None,
        path: Path,
        products: Products,
        activations: Activations,
    ):
        from halfbyte.runtime.model import load

        self.c, self.products, self.activations = c, products, activations
        self.route = Route(c.b, only)
        self.records, self.slots = self.route.records, self.route.slots
        write_program(c.b, path, self.records, self.slots, self.route.caches, max(map(len, c.ids)))
        self.model = load(path, c.backend, c.threads, kv="f32", policy="f32")
        self.kv = self.model.new_kv()
        self.kv.reserve(max(map(len, c.ids)))
        self.spans = list(_spans(c.ids))

    def go(
        self,
        visit: Visit,
        hessians: bool,
        drift: bool,
        sample: int,
        stored: Callable[[Matrix], np.ndarray | None] | None,
        embedding: Callable[[Matrix, np.ndarray], np.ndarray],
        visits: Visits,
        progress: Progress | None,
    ) -> None:
        stages = self.route.stages
        states = range(1 + drift)  # what later layers see, and what they see in the float model
        live: set[int] = set()  # base slots whose values are kept
        seen: dict[int, np.ndarray | None] = {}
        outputs: list[dict[int, Any]] = [{}, {}]  # record -> what computes it, for both states
        at = 0
        steps = self.route.efforts(self.c.tokens, hessians, drift)
        total = sum(steps) + sum(map(visits, self.route.visited()))
        done = 0

        def report(name: str, effort: int) -> None:
            nonlocal done
            done += effort
            if progress:
                progress(name, done, total)

        for stage, step in zip(stages, steps):
            collect = None
            x_slot = self._input(stage.first)
            visited = [
                i
                for i in range(stage.first, stage.last)
                if self.route.visits.get(int(self.records[i]["w"][0])) == i
            ]
            if visited:
                assert x_slot is not None
                width = int(self.slots[x_slot]["width"])
                collect = Collector(self.products, width, self.c.tokens, hessians, sample)
                if drift:
                    for i in visited:
                        collect.follow(i, self.route.matrix(i), self.c.weights)
            self._check_cut(at, stage.first)
            for span in self.spans:
                inputs: list[np.ndarray] = []
                residuals: list[dict[int, np.ndarray]] = []
                for state in states:
                    self._stretch(state, live, outputs[state], span, at, stage)
                    if collect is not None:
                        assert x_slot is not None
                        inputs.append(self._view(x_slot, span).copy())
                        residuals.append(self._residuals(stage, span) if drift else {})
                if collect is not None:
                    collect.add(inputs[0])
                    if drift:
                        collect.add_drift(inputs[0], inputs[1], residuals[0], residuals[1])
                report(self._label(stage), step * (span.stop - span.start) // self.c.tokens)
            for base in live - set(stage.live):
                for state in states:
                    self.activations.drop((state, base))
            live = set(stage.live)
            outputs = [{}, {}]
            statistics = None if collect is None else collect.finish()
            for i in range(stage.first, stage.last):
                t, w = self.route.matrix(i), int(self.records[i]["w"][0])
                if x_slot is None:
                    for output, table in zip(outputs[: len(states)], (embedding, self.c.embedding)):
                        output[i] = table(t, np.concatenate(self.c.ids))
                    continue
                if w not in seen:
                    seen[w] = None
                    if i in visited:
                        assert statistics is not None and collect is not None
                        given = replace(
                            statistics, drift=collect.drifts.pop(i, None), shared=i != visited[-1]
                        )
                        if not given.shared:
                            statistics = None  # the visitor may use up the Hessian
                        seen[w] = visit(t, given)
                        del given
                        report(t.name, visits(t))
                    elif stored is not None and stage is not stages[-1]:
                        seen[w] = stored(t)
                if stage is stages[-1]:
                    continue
                outputs[0][i] = self.c.weights.rows(t) if seen[w] is None else seen[w]
                if drift:
                    outputs[1][i] = outputs[0][i] if seen[w] is None else self.c.weights.rows(t)
                if not self._used_later(w, i):
                    seen[w] = None
            at = stage.last

    # ---- one sequence ---------------------------------------------------------------------------

    def _stretch(
        self,
        state: int,
        live: set[int],
        output: dict[int, Any],
        span: slice,
        at: int,
        stage: Stage,
    ) -> None:
        """Bring a sequence from the cut before record `at` to the cut at `stage`."""
        from halfbyte.runtime.backends.backend import Step

        rows = span.stop - span.start
        none = np.zeros(0, np.int32)
        zeros = np.zeros(rows, np.int32)
        step = Step(zeros, np.arange(rows, dtype=np.int32), zeros, none, [self.kv])
        backend = self.model.backend
        backend.begin(step)
        for base in sorted(live):
            self.activations.load((state, base), span, backend.arena.view(base, rows))
        for i, with_ in output.items():
            y = self._view(int(self.records[i]["out"][0]), span)
            if int(self.records[i]["code"]) == EMBED:
                y[:] = with_[span]
                continue
            x = self._view(int(self.records[i]["in"][0]), span)
            self.products.matmul(x, with_.T, out=y)
            bias = int(self.records[i]["w"][1])
            if bias != program.NONE:
                y += self.c.b.tensors[bias].values  # type: ignore[union-attr]
        if at < stage.first:
            backend.run_range(step, at, stage.first)
        for base in stage.live:
            self.activations.store((state, base), span, backend.arena.view(base, rows))

    def _view(self, slot: int, span: slice) -> np.ndarray:
        return self.model.backend.arena.view(slot, span.stop - span.start)

    def _residuals(self, stage: Stage, span: slice) -> dict[int, np.ndarray]:
        """For every LINEAR of the stage whose output the next op that reads it adds to a residual: that residual.

        It is divided by the factor of the ADD, so that it is in units of the output.
        """
        out = {}
        for i in range(stage.first, stage.last):
            y = int(self.records[i]["out"][0])
            reader = next(
                (
                    r
                    for r in self.records[stage.last :]
                    if any(overlap(self.slots, y, int(s)) for s in used(r["in"]))
                ),
                None,
            )
            if reader is None or int(reader["code"]) != ADD or int(reader["in"][1]) != y:
                continue
            scale = program.bits_f32(int(reader["attr"][0]))
            if scale:
                out[i] = self._view(int(reader["in"][0]), span) / np.float32(scale)
        return out

    # ---- the program ----------------------------------------------------------------------------

    def _input(self, i: int) -> int | None:
        """The input slot of a LINEAR, None for an EMBED."""
        return int(self.records[i]["in"][0]) if int(self.records[i]["code"]) == LINEAR else None

    def _label(self, stage: Stage) -> str:
        return self.route.matrix(stage.first).name

    def _used_later(self, w: int, i: int) -> bool:
        later = self.records[i + 1 :]
        return bool(((later["code"] == LINEAR) & (later["w"][:, 0] == w)).any())

    def _check_cut(self, first: int, last: int) -> None:
        """Keys and values are not kept from one stretch to the next: what ATTEND reads must be put in the same one."""
        put = ops.BY_NAME["kv_put"].code
        filled = {int(r["attr"][0]) for r in self.records[first:last] if int(r["code"]) == put}
        for r in self.records[first:last]:
            if int(r["code"]) == ops.BY_NAME["attend"].code and int(r["attr"][0]) not in filled:
                raise UsageError("a cache is read after the layer that filled it: calibration cannot follow")


def _spans(ids: list[np.ndarray]) -> Iterator[slice]:
    start = 0
    for s in ids:
        yield slice(start, start + len(s))
        start += len(s)


# ---- token sequences ------------------------------------------------------------------------------------------


def sequences(
    tokenizer: Tokenizer, template: str, path: Path | None, context: int, most: int | None = SEQUENCES
) -> list[list[int]]:
    """Token ids to calibrate on: at most `most` (None: all) sequences of at most min(LENGTH, context) tokens.

    path: a UTF-8 text, cut into windows; a `.jsonl`, one JSON a line that is a list of messages, {"messages": [...]}
    (rendered by the model's chat template, each chat a sequence) or {"text": ...}; None is the built-in mix. Where
    there is more than fits, what is taken lies evenly spaced. Raises UsageError for a file that cannot be used.
    """
    from halfbyte.runtime.evaluate import windows

    length = min(LENGTH, context)
    path = path or BUILT_IN
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from None
    if path.suffix == ".jsonl":
        found = [s[:length] for s in _documents(tokenizer, template, path, text)]
        found = [s for s in found if len(s) > 1]
    else:
        found = windows(tokenizer, text, length) if text.strip() else []
    if not found:
        raise UsageError(f"{path} has no text to calibrate on")
    chosen = np.unique(np.linspace(0, len(found) - 1, most or len(found)).astype(int))
    return [found[i] for i in chosen]


def _documents(tokenizer: Tokenizer, template: str, path: Path, text: str) -> Iterator[list[int]]:
    from halfbyte.runtime.chat import render

    special = {
        f"{name}_token": "" if i is None else tokenizer.piece(i)
        for name, i in (("bos", tokenizer.bos_id), ("eos", next(iter(tokenizer.eos_ids), None)))
    }
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            raise UsageError(f"{path}: line {number} is not JSON") from None
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            yield tokenizer.encode(value["text"], special=False)
            continue
        messages = value.get("messages") if isinstance(value, dict) else value
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages) or not messages:
            raise UsageError(f"{path}: line {number} holds neither messages nor a text")
        if not template:
            raise UsageError(f"{path} holds chats, but the model has no chat template; give plain text")
        yield tokenizer.encode(render(template, messages, add_generation_prompt=False, **special))


def tokenizer_of(json_: bytes, meta: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a file that is still to be written, from its JSON and its metadata."""
    from halfbyte.runtime.tokenizer import Tokenizer

    return Tokenizer(
        json_,
        meta.get("tokenizer.bos_id"),
        meta.get("tokenizer.eos_ids", []),
        bool(meta.get("tokenizer.add_bos")),
    )


def own_sequences(path: Path, context: int, count: int, seed: int = 0) -> list[list[int]]:
    """At most `count` windows of what the model of a float file writes itself (`own_text`), read as a text is."""
    from halfbyte.runtime.evaluate import windows
    from halfbyte.runtime.model import load

    length = min(LENGTH, context)
    text = own_text(path, count * length, seed, count)
    return windows(load(path).tokenizer, text, length)[:count]
