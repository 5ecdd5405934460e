"""The JIT backend: kernels compiled by Numba for this CPU, for machines without the compiled library.

`bind` turns each record into one or two *tasks*, rows of an int64 table that hold a kernel's address
and its arguments; a step fills in what changed and one compiled call runs the list. Weights are read
where the file is mapped.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from halfbyte.formats import encodings, kv_modes, tiles
from halfbyte.formats.container import Tensor
from halfbyte.formats.errors import UsageError
from halfbyte.formats.kv_modes import PAGE
from halfbyte.formats.ops import BY_CODE
from halfbyte.formats.program import PICKS, bits_f32
from halfbyte.runtime.backends.backend import Backend, Step, operands
from halfbyte.runtime.backends.reference import QUANT_GROUP

_LOCK = threading.Lock()  # the thread pool serves one step at a time
_announced: list[bool] = []
_PARALLEL_WORK = 1 << 15  # elements or multiply-adds below which waking threads costs more
_SHARES, _MOST_AT_ONCE = 8, 32  # shares of a task that each thread takes in turn; indices in one at most
# Plane of a matrix -> the words of its address and of the bytes of a panel, '' where another plane's serve.
_PLANE_WORDS = {
    "values": ("codes", "codes_panel"),
    "codes": ("codes", "codes_panel"),
    "high": ("high", "high_panel"),
    "scales": ("scales", "scales_panel"),
    "super": ("supers", "supers_panel"),
    "mins": ("mins", ""),
    "supermin": ("supermins", ""),
    "zeros": ("zeros", ""),
    "row": ("row", ""),
}
_PANELS_PER_TASK = 4  # of a prompt: the panels that share a tile of tokens while it is in the cache


def _f64(value: float) -> int:
    """A float as the int64 word that a kernel reads."""
    return int(np.float64(value).view(np.int64))


def _address(a: np.ndarray) -> int:
    return a.__array_interface__["data"][0]


@contextlib.contextmanager
def _announcing() -> Iterator[None]:
    """Say, on a terminal and once, that kernels are being compiled, if they are (and not just loaded)."""
    if _announced or not sys.stderr.isatty():
        yield
        return
    from numba.core import event

    class Announcer(event.Listener):
        def on_start(self, event: Any) -> None:
            if not _announced:
                _announced.append(True)
                print("compiling kernels (first run only)...", file=sys.stderr, flush=True)

        def on_end(self, event: Any) -> None:
            pass

    with event.install_listener("numba:run_pass", Announcer()):
        yield


@functools.cache
def _compiled(factory: str, *choice: Any) -> Any:
    """A kernel by the name of its factory, shared by every backend of this process."""
    from halfbyte.runtime.backends import jit_kernels, jit_kv, jit_pool, jit_rows

    return next(
        getattr(m, factory) for m in (jit_kernels, jit_kv, jit_rows, jit_pool) if hasattr(m, factory)
    )(*choice)


class Jit(Backend):
    """Runs a program with Numba kernels. The first bind on a machine compiles; later ones load."""

    name = "jit"

    def bind(self) -> None:
        """Compile or load the kernels that the program needs and lay out its tasks."""
        from halfbyte.runtime.backends import jit_isa, jit_kernels, jit_pool, jit_tiles

        self.threads: int = max(1, min(self.threads, jit_pool.MAX_THREADS))
        self._pool = jit_pool.pool
        self.isa = jit_isa.choose_isa()
        self._halves = "half" if jit_isa.converts_halves(self.isa) else "soft"
        self._key = jit_kernels.digest()
        self._w = jit_tiles
        self._rows: list[list[int]] = []  # the table, until it is an array
        self._slots: list[tuple[int, int, int, int]] = []  # (task, address word, stride word, slot)
        self._counts: list[Callable[[int], int]] = []  # indices of a task, given its rows
        self._work: list[int] = []  # multiply-adds or elements of one row
        self._picked: list[bool] = []
        self._ids: list[tuple[int, int]] = []  # (task, 0 for ids or 1 for picks)
        self._ropes: list[tuple[int, int, float]] = []  # (task, inv_freq tensor, mscale)
        self._cached: list[tuple[int, int, str]] = []  # (task, cache, 'make_kv_put' or 'make_attend')
        self._quantized: list[int] = []  # tasks that use the scratch of int8 activations
        self._table_rows = 1 << 31  # ids must lie below this
        self._first_task = [0]
        with _LOCK, _announcing():
            for record in self.file.program:
                self._bind_record(record)
                self._first_task.append(len(self._rows))
            self._run, self._serve = (_compiled(name, self._key) for name in ("make_run", "make_serve"))
        self._table = np.array(self._rows, np.int64)
        self._is_picked = np.array(self._picked)
        self._row_work = np.array(self._work, np.int64)
        self._cached_tasks = (
            np.array([task for task, _, _ in self._cached], np.int64),
            np.array([cache for _, cache, _ in self._cached], np.int64),
            np.array([task for task, _, name in self._cached if name == "make_attend"], np.int64),
        )
        w = self._w
        self._cache_words = [w.KERNEL, w.FIRST_PAGE, w.OTHER_PAGES, w.QUERY_STEPS, w.STAGES]
        self._kernels: dict[str, np.ndarray] = {}  # those words of those tasks, by stored type
        self._bound_arena: Any = None
        self._scratch: dict[str, np.ndarray] = {}

    # ---- binding --------------------------------------------------------------------------------

    def _task(self, kernel: Any, out: int | None, ins: list[int], work: int, /, **words: int) -> int:
        """Append a task; `words` by the lower-case names of jit_tiles."""
        w, row = self._w, [0] * self._w.WORDS
        index = len(self._rows)
        if kernel is not None:
            row[w.KERNEL] = kernel.address
        for name, value in words.items():
            row[getattr(w, name.upper())] = value
        places = [(w.X, w.X_STRIDE), (w.X2, w.X2_STRIDE)]
        for i, (address, stride) in zip(ins, places):
            self._slots.append((index, address, stride, i))
        if out is not None:
            self._slots.append((index, w.Y, w.Y_STRIDE, out))
        self._rows.append(row)
        self._counts.append(lambda rows: rows)
        self._work.append(work)
        rows_of = ins[0] if out is None else out
        self._picked.append(int(self.file.slots[rows_of]["rows"]) == PICKS)
        return index

    def _width(self, slot: int) -> int:
        return int(self.file.slots[slot]["width"])

    def _vector(self, tensor: int | None) -> int:
        return 0 if tensor is None else _address(self.file.raw(self.file.tensors[tensor]))

    def _bind_record(self, record: np.void) -> None:
        op = BY_CODE[int(record["code"])]
        attrs: dict[str, Any] = {
            a.name: bits_f32(bits) if a.kind == "f32" else bits
            for a, bits in zip(op.attrs, (int(v) for v in record["attr"]))
        }
        ins = [i for i in operands(record, "in") if i is not None]
        ws = operands(record, "w")
        out = operands(record, "out")[0] if op.outputs else None
        width = self._width(ins[0] if out is None else out)
        if op.name in ("embed", "linear"):
            assert ws[0] is not None and out is not None
            getattr(self, f"_bind_{op.name}")(out, ins, self.file.tensors[ws[0]], ws[1])
        elif op.name in ("kv_put", "attend"):
            self._bind_cached(op.name, out, ins, width, attrs)
        elif op.name in ("unary", "glu"):
            kernel = _compiled(f"make_{op.name}", self._key, attrs["function"])
            self._task(kernel, out, ins, 4 * width, width=width, scale=_f64(attrs.get("p", 0.0)))
        elif op.name in ("rmsnorm", "layernorm"):
            kernel = _compiled(f"make_{op.name}", self._key)
            words = {"weight": self._vector(ws[0]), "shift": self._vector(ws[1])}
            self._task(
                kernel, out, ins, width, width=width, dim=attrs["dim"], eps=_f64(attrs["eps"]), **words
            )
        elif op.name == "rope":
            assert ws[0] is not None
            n = self.file.tensors[ws[0]].shape[0]
            kernel = _compiled("make_rope", self._key)
            task = self._task(kernel, out, ins, width, width=width, dim=attrs["head_dim"], half=n)
            self._ropes.append((task, ws[0], attrs["mscale"]))
        elif op.name in ("gather", "hadamard"):
            kernel = _compiled(f"make_{op.name}", self._key)
            words = {"weight": self._vector(ws[0])} if ws[0] is not None else {"dim": attrs["dim"]}
            self._task(kernel, out, ins, width, width=width, **words)
        else:
            kernel = _compiled(f"make_{op.name}", self._key)
            task = self._task(kernel, out, ins, width, width=width, scale=_f64(attrs.get("scale", 0.0)))
            if op.name == "pick":
                self._ids.append((task, 1))

    def _matrix(self, tensor: Tensor) -> tuple[Any, dict[str, int]]:
        """Spec and words of a p16 matrix; PER_GROUP is left to the op."""
        e, (rows, cols) = encodings.BY_NAME[tensor.encoding], tensor.shape
        group = tensor.group or cols
        whole = -(-cols // QUANT_GROUP) * QUANT_GROUP
        block = QUANT_GROUP if tensor.group == encodings.WHOLE_ROW else min(QUANT_GROUP, group)
        single = e.is_integer and group == block
        spec = self._w.MatrixSpec(
            self.isa, self._halves, self.policy, e.name, tensor.scale_type, block, single, self._key
        )
        words = {"width": cols, "groups": encodings.group_count(cols, 0 if e.is_float else tensor.group)}
        words |= {"out": rows, "blocks": -(-cols // block), "block": block, "xq_row": whole}
        words["xd_row"] = whole // QUANT_GROUP * 4
        base = _address(self.file.raw(tensor))
        for plane in tensor.planes:
            word, panel_word = _PLANE_WORDS[plane.name]
            words[word] = base + plane.offset
            if panel_word:
                words[panel_word] = plane.panel_bytes
        return spec, words

    @staticmethod
    def _dequantised(spec: Any) -> Any:
        """The spec of a kernel without integer dots, freed of what such a kernel does not depend on."""
        block = spec.block if spec.scale_type == encodings.K256 else 0
        return spec._replace(policy="f32", block=block, single=False)

    def _bind_embed(self, out: int, ins: list[int], table: Tensor, bias: int | None) -> None:
        spec, words = self._matrix(table)
        kernel = _compiled("make_embed", self._dequantised(spec))
        words["per_group"] = table.group or table.shape[1]
        self._ids.append((self._task(kernel, out, ins, table.shape[1], **words), 0))
        self._table_rows = min(self._table_rows, table.shape[0])

    def _bind_linear(self, out: int, ins: list[int], matrix: Tensor, bias: int | None) -> None:
        spec, words = self._matrix(matrix)
        rows, cols = matrix.shape
        group = matrix.group or cols
        quantized = self.policy == "i8g32" and encodings.BY_NAME[matrix.encoding].is_integer
        if quantized:
            kernel = _compiled("make_quantize", self.isa, self._key)
            self._quantized.append(self._task(kernel, None, ins, cols, **words))
            words["per_group"] = -(-group // spec.block)
        else:
            spec = self._dequantised(spec)
            words["per_group"] = -(-group // 4)
        task = self._task(_compiled("make_linear", spec), out, ins, rows * cols, **words)
        self._rows[task][self._w.BIAS] = self._vector(bias)
        if quantized:
            self._quantized.append(task)
        panels = -(-rows // tiles.PANEL)
        self._counts[task] = lambda T: -(-panels // self._span(T))

    @staticmethod
    def _span(rows: int) -> int:
        return 1 if rows < 4 else _PANELS_PER_TASK

    def _bind_cached(
        self, name: str, out: int | None, ins: list[int], width: int, attrs: dict[str, Any]
    ) -> None:
        c = self.file.caches[attrs["cache"]]
        heads, k_dim, v_dim = int(c["kv_heads"]), int(c["k_dim"]), int(c["v_dim"])
        words = {"width": width, "kv_heads": heads, "k_dim": k_dim, "v_dim": v_dim}
        if name == "attend":
            words |= {"half": self._width(ins[0]) // k_dim // heads, "window": int(c["window"])}
            words |= {"scale": _f64(attrs["scale"]), "cap": _f64(attrs["softcap"])}
        task = self._task(None, out, ins, width, **words)  # its kernel depends on the cache's type
        self._cached.append((task, attrs["cache"], f"make_{name}"))
        self._counts[task] = (lambda T: T * heads) if name == "attend" else lambda T: heads

    # ---- stepping -------------------------------------------------------------------------------

    def run_range(self, step: Step, first: int, last: int) -> None:
        """Execute records first <= i < last. Several Python threads may call; they take turns."""
        if first >= last:
            return
        with _LOCK:
            self._prepare(step)
            first_task, last_task = self._first_task[first], self._first_task[last]
            self._pool().run(
                self._run, self._serve, _address(self._table), first_task, last_task, self.threads
            )

    def _grown(self, name: str, count: int, dtype: type) -> int:
        """Address of a scratch array of at least `count` items."""
        a = self._scratch.get(name)
        if a is None or len(a) < count:
            a = self._scratch[name] = np.empty(count, dtype)
        return _address(a)

    def _prepare(self, step: Step) -> None:
        """Write into the table what depends on the step."""
        w, table = self._w, self._table
        T, r = step.rows, len(step.picks)
        self._step = [
            np.ascontiguousarray(a, np.int32) for a in (step.ids, step.picks, step.positions, step.sessions)
        ]
        ids, picks, positions, sessions = self._step
        self._check(step)
        if self._bound_arena is not self.arena:
            self._bound_arena = self.arena
            for task, address, stride, slot in self._slots:
                view = self.arena.view(slot, 1)
                table[task, address], table[task, stride] = _address(view), view.strides[0] // 4
        rows = np.where(self._is_picked, r, T)
        table[:, w.ROWS] = rows
        table[:, w.SPAN] = np.where(rows < 4, 1, _PANELS_PER_TASK)
        counts = np.array([count(n) for count, n in zip(self._counts, rows.tolist())])
        table[:, w.COUNT] = counts
        chunk = np.clip(counts // (self.threads * _SHARES), 1, _MOST_AT_ONCE)
        table[:, w.CHUNK] = np.where(rows * self._row_work >= _PARALLEL_WORK, chunk, 0)
        for task, which in self._ids:
            table[task, w.IDS] = _address((ids, picks)[which])
        self._prepare_quantized(max(T, r))
        self._prepare_ropes(positions)
        if self._cached:
            self._prepare_caches(step, positions, sessions)

    def _check(self, step: Step) -> None:
        """What compiled code would otherwise follow out of bounds."""
        ids, picks, positions, sessions = self._step
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._table_rows:
            raise UsageError(f"token ids must lie between 0 and {self._table_rows - 1}")
        if len(picks) and not 0 <= picks.min() <= picks.max() < len(ids):
            raise UsageError("picked rows must lie within the step")
        if not self._cached or not len(ids):
            return
        if not 0 <= sessions.min() <= sessions.max() < len(step.kvs):
            raise UsageError("a row names a session that the step does not have")
        if positions.min() < 0:
            raise UsageError("a row's position was not reserved in its session")
        for i, kv in enumerate(step.kvs):
            pages = np.unique(positions[sessions == i] // PAGE)
            if len(pages) and (pages[-1] >= kv.table.shape[1] or not kv.table[:, pages].all()):
                raise UsageError("a row's position was not reserved in its session")

    def _prepare_quantized(self, rows: int) -> None:
        if not self._quantized:
            return
        w, tasks = self._w, self._table[self._quantized]
        self._table[self._quantized, w.XQ] = self._grown("xq", rows * int(tasks[:, w.XQ_ROW].max()), np.int8)
        self._table[self._quantized, w.XD] = self._grown(
            "xd", rows * int(tasks[:, w.XD_ROW].max()), np.float32
        )
        self._table[self._quantized, w.XSUM] = self._grown(
            "xsum", rows * int(tasks[:, w.BLOCKS].max()), np.float32
        )

    def _prepare_ropes(self, positions: np.ndarray) -> None:
        """Cosines and sines of the step, in NumPy as the reference does."""
        w = self._w
        self._angles: list[np.ndarray] = []
        known: dict[tuple[int, float], tuple[int, int]] = {}
        for task, tensor, mscale in self._ropes:
            key = (tensor, mscale)
            if key not in known:
                freq = self.file.dequantize(self.file.tensors[tensor]).astype(np.float64)
                angle = positions.astype(np.float64)[:, None] * freq
                cos, sin = ((f(angle) * mscale).astype(np.float32) for f in (np.cos, np.sin))
                self._angles += cos, sin
                known[key] = _address(cos), _address(sin)
            self._table[task, w.COS], self._table[task, w.SIN] = known[key]

    def _prepare_caches(self, step: Step, positions: np.ndarray, sessions: np.ndarray) -> None:
        """Addresses of every session's keys and values, and the kernels for their type."""
        w, table = self._w, self._table
        kinds = {kv.mode for kv in step.kvs}
        if len(kinds) != 1:
            raise UsageError("the sessions of one step must have one kv mode")
        kind = kinds.pop()
        if kind not in self._kernels:
            self._kernels[kind] = self._cache_kernels(kind)
        tasks, caches, attends = self._cached_tasks
        count = np.arange(len(self.file.caches), dtype=np.int64)[:, None]
        self._kv = np.ascontiguousarray(  # [caches, sessions]: where the addresses of the pages are
            np.array([_address(kv.table) for kv in step.kvs], np.int64)
            + count * np.array([kv.table.strides[0] for kv in step.kvs], np.int64)
        )
        longest = int(positions.max()) + 1 if len(positions) else 0
        row = tiles.align(longest, PAGE) + PAGE
        shares, k_dim, v_dim = (int(table[tasks, i].max()) for i in (w.HALF, w.K_DIM, w.V_DIM))
        keys = k_dim * max(m.k.stages for m in step.kvs[0].modes)
        size = tiles.align(shares * (row + k_dim + keys) + (PAGE + 1) * (keys + v_dim) + 80, 16)
        table[tasks[:, None], self._cache_words] = self._kernels[kind]
        table[tasks, w.KV] = _address(self._kv) + caches * self._kv.strides[0]
        table[tasks, w.POSITIONS], table[tasks, w.SESSIONS] = _address(positions), _address(sessions)
        table[tasks, w.SCRATCH] = self._grown("attend", size * self.threads, np.float32)
        table[tasks, w.SCRATCH_ROW], table[tasks, w.SCRATCH_SIZE] = row, size
        reads = int(positions.astype(np.int64).sum()) + len(positions)
        table[attends, w.CHUNK] = reads * self._row_work[attends] >= _PARALLEL_WORK

    def _cache_kernels(self, kind: str) -> np.ndarray:
        """For the tasks that use caches, in this mode: the words of `_cache_words`."""
        spec = f"{self.isa}|{self._halves}|{self._key}"
        modes = kv_modes.by_cache(kind, len(self.file.caches))
        shares, words = self._table[:, self._w.HALF].tolist(), []
        with _announcing():
            for task, cache, name in self._cached:
                mode, pages = modes[cache], [0, 0]
                attends, floats = name == "make_attend", "f32" if mode.packed else mode.k.name
                if mode.packed:
                    of_page = "make_unpack" if attends else "make_pack"
                    for i, (k, v) in enumerate((("8", "8"), (mode.k.name, mode.v.name))):
                        pages[i] = _compiled(of_page, self._key, k, v).address
                if attends:
                    heads = next(n for n in (4, 2, 1) if shares[task] % n == 0)
                    kernel = _compiled(name, spec, floats, heads, mode.packed)
                elif mode.packed:
                    kernel = _compiled("make_packed_put", self._key)
                else:
                    kernel = _compiled(name, spec, floats)
                words.append((kernel.address, *pages, _f64(mode.k.query_steps), mode.k.stages))
        return np.array(words)

    def describe(self) -> dict[str, object]:
        """Adds the ISA of the kernels."""
        return {**super().describe(), "isa": self.isa, "half": self._halves}
