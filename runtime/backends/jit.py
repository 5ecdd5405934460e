"""The JIT backend: kernels compiled by Numba for this CPU, for machines without the compiled library.

`bind` turns each record into one or two *tasks*, rows of an int64 table that hold a kernel's address
and its arguments; a step fills in what changed and one compiled call runs the list. Weights are read
where the file is mapped.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from halfbyte.formats import encodings, tiles
from halfbyte.formats.container import Tensor
from halfbyte.formats.errors import UsageError
from halfbyte.formats.ops import BY_CODE
from halfbyte.formats.program import PICKS, bits_f32
from halfbyte.runtime.backends.backend import Backend, Step, operands
from halfbyte.runtime.backends.reference import QUANT_GROUP

_LOCK = threading.Lock()  # Numba's thread pool serves one caller at a time
_announced: list[bool] = []
_PARALLEL_WORK = 1 << 15  # elements or multiply-adds below which waking threads costs more
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
    from halfbyte.runtime.backends import jit_kernels, jit_rows

    make = getattr(jit_kernels, factory, None) or getattr(jit_rows, factory)
    return make(*choice)


class Jit(Backend):
    """Runs a program with Numba kernels. The first bind on a machine compiles; later ones load."""

    name = "jit"

    def bind(self) -> None:
        """Compile or load the kernels that the program needs and lay out its tasks."""
        # libgomp, Numba's usual pool, spins for milliseconds between tasks unless told otherwise; on
        # busy cores that costs more than the work. Read when the library is loaded.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        import numba

        from halfbyte.runtime.backends import jit_isa, jit_kernels, jit_tiles

        limit: int = getattr(numba.config, "NUMBA_NUM_THREADS")  # noqa: B009 (set at run time)
        self.threads: int = min(self.threads, limit)
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
            self._run = _compiled("make_driver", self._key, self.threads > 1)
        self._table = np.array(self._rows, np.int64)
        self._is_picked = np.array(self._picked)
        self._row_work = np.array(self._work, np.int64)
        self._bound_arena: Any = None
        self._scratch: dict[str, np.ndarray] = {}
        self._counter = np.zeros(16, np.int64)  # a cache line of its own

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
        single = not e.is_float and group == block
        spec = self._w.MatrixSpec(
            self.isa, self._halves, self.policy, e.name, tensor.scale_type, block, single, self._key
        )
        names = {"values": "codes"}
        words = {"width": cols, "groups": encodings.group_count(cols, 0 if e.is_float else tensor.group)}
        words |= {"out": rows, "blocks": -(-cols // block), "block": block, "xq_row": whole}
        words["xd_row"] = whole // QUANT_GROUP * 4
        base = _address(self.file.raw(tensor))
        for plane in tensor.planes:
            name = names.get(plane.name, plane.name)
            words[name] = base + plane.offset
            if name in ("codes", "scales"):
                words[f"{name}_panel"] = plane.panel_bytes
        return spec, words

    def _bind_embed(self, out: int, ins: list[int], table: Tensor, bias: int | None) -> None:
        spec, words = self._matrix(table)
        kernel = _compiled("make_embed", spec._replace(policy="f32", block=0, single=False))
        words["per_group"] = table.group or table.shape[1]
        self._ids.append((self._task(kernel, out, ins, table.shape[1], **words), 0))
        self._table_rows = min(self._table_rows, table.shape[0])

    def _bind_linear(self, out: int, ins: list[int], matrix: Tensor, bias: int | None) -> None:
        spec, words = self._matrix(matrix)
        rows, cols = matrix.shape
        group = matrix.group or cols
        is_float = encodings.BY_NAME[matrix.encoding].is_float
        quantized = self.policy == "i8g32" and not is_float
        if quantized:
            kernel = _compiled("make_quantize", self.isa, self._key)
            self._quantized.append(self._task(kernel, None, ins, cols, **words))
            words["per_group"] = -(-group // spec.block)
        else:
            spec = spec._replace(policy="f32", block=0, single=False)
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
        if name == "attend":
            self._counts[task] = lambda T: T * heads

    # ---- stepping -------------------------------------------------------------------------------

    def run_range(self, step: Step, first: int, last: int) -> None:
        """Execute records first <= i < last. Several Python threads may call; they take turns."""
        import numba

        if first >= last:
            return
        with _LOCK:
            self._prepare(step)
            first_task, last_task = self._first_task[first], self._first_task[last]
            if self.threads > 1:
                before = numba.get_num_threads()
                numba.set_num_threads(self.threads)
            self._run(_address(self._table), first_task, last_task, self.threads, _address(self._counter))
            if self.threads > 1:
                numba.set_num_threads(before)

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
        table[:, w.COUNT] = [count(n) for count, n in zip(self._counts, rows.tolist())]
        table[:, w.PARALLEL] = (rows * self._row_work >= _PARALLEL_WORK) & (self.threads > 1)
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
        capacity = np.array([kv.capacity for kv in step.kvs])
        if positions.min() < 0 or (positions >= capacity[sessions]).any():
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
        self._angles: dict[tuple[int, float], tuple[np.ndarray, np.ndarray]] = {}
        for task, tensor, mscale in self._ropes:
            key = (tensor, mscale)
            if key not in self._angles:
                freq = self.file.dequantize(self.file.tensors[tensor]).astype(np.float64)
                angle = positions.astype(np.float64)[:, None] * freq
                cos, sin = ((f(angle) * mscale).astype(np.float32) for f in (np.cos, np.sin))
                self._angles[key] = cos, sin
            cos, sin = self._angles[key]
            self._table[task, w.COS], self._table[task, w.SIN] = _address(cos), _address(sin)

    def _prepare_caches(self, step: Step, positions: np.ndarray, sessions: np.ndarray) -> None:
        """Addresses of every session's keys and values, and the kernels for their type."""
        w, table = self._w, self._table
        kinds = {kv.mode for kv in step.kvs}
        if len(kinds) != 1:
            raise UsageError("the sessions of one step must have one kv mode")
        kind = kinds.pop()
        n = len(step.kvs)
        self._kv = np.empty((len(self.file.caches), n, 3), np.int64)
        for j, kv in enumerate(step.kvs):
            for c in range(len(self.file.caches)):
                self._kv[c, j] = _address(kv.k[c]), _address(kv.v[c]), kv.k[c].shape[1]
        longest = int(positions.max()) + 1 if len(positions) else 0
        row = tiles.align(longest, 16) + 16
        shares = int(table[[task for task, _, _ in self._cached], w.HALF].max())
        scratch = self._grown("attend", row * shares * self.threads, np.float32)
        spec = f"{self.isa}|{self._halves}|{self._key}"
        base = _address(self._kv)
        reads = int(positions.astype(np.int64).sum()) + len(positions)
        with _announcing():
            for task, _, name in self._cached:
                share = (int(table[task, w.HALF]),) if name == "make_attend" else ()
                table[task, w.KERNEL] = _compiled(name, spec, kind, *share).address
        for task, cache, _ in self._cached:
            table[task, w.KV] = base + cache * n * 24
        tasks = [task for task, _, _ in self._cached]
        table[tasks, w.POSITIONS], table[tasks, w.SESSIONS] = _address(positions), _address(sessions)
        table[tasks, w.SCRATCH], table[tasks, w.SCRATCH_ROW] = scratch, row
        attends = [task for task, _, name in self._cached if name == "make_attend"]
        table[attends, w.PARALLEL] = (reads * self._row_work[attends] >= _PARALLEL_WORK) & (self.threads > 1)

    def describe(self) -> dict[str, object]:
        """Adds the ISA of the kernels and Numba's threading layer limit."""
        return {**super().describe(), "isa": self.isa, "half": self._halves}
