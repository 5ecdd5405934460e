"""How fast this machine reads memory and multiplies: measured in about a second, remembered per machine.

Read bandwidth: every thread sums its own part of an array far larger than the caches. Int8 and float peaks:
independent accumulators in registers, nothing but dot products (or fused multiply-adds). Needs no compiler:
the loops are Numba's, with LLVM's own names for the dot instructions.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.formats.errors import UsageError

from .probe import probe

if TYPE_CHECKING:
    from llvmlite import ir

VERSION = 2  # of the method: results of another one are measured again
_WINDOW_S, _WINDOWS = 0.04, 5  # the best of some short windows: others use the machine too
_MIN_BYTES, _MAX_BYTES = 32 << 20, 1 << 30
_ACCUMULATORS = 12  # hides the latency of the dot product, leaves registers for its operands
_UNROLL = 4

# Instruction of the int8 peak: (LLVM features it needs, int8 multiply-adds of one). Best first.
_DOTS: dict[str, tuple[tuple[str, ...], int]] = {
    "avx512vnni": (("avx512f", "avx512bw", "avx512vnni"), 64),
    "avxvnni": (("avx2", "avxvnni"), 32),
    "avx2": (("avx2",), 32),
    "i8mm": (("i8mm", "neon"), 32),
    "dotprod": (("dotprod", "neon"), 16),
    "plain": ((), 16),
}


@dataclass(frozen=True)
class Speed:
    """What was measured: GB/s (10^9 bytes) read, and 10^9 multiply-adds/s, by one and by all threads.

    instruction: what the int8 peak counts; 'plain' is LLVM's code for int8 -> int32 without a dot instruction.
    processor_share: of the time of all threads, how much they ran; well below 1, others used the machine.
    """

    threads: int
    read_gb_per_s_1: float
    read_gb_per_s: float
    instruction: str
    int8_gmac_per_s_1: float
    int8_gmac_per_s: float
    f32_gmac_per_s_1: float
    f32_gmac_per_s: float
    working_set: int
    processor_share: float = 1.0

    @property
    def busy(self) -> bool:
        """Whether other programs took so much that the numbers are too low."""
        return self.processor_share < 0.9


def measure(threads: int | None = None) -> Speed:
    """Measure now. Raises UsageError where Numba is missing."""
    facts = probe()
    threads = threads or int(facts["cpus"])
    kernels = _kernels()
    data = np.ones(working_set(facts) // 8, np.int64)
    share = len(data) // threads
    piece = max(1, min(share, 1 << 17))  # 1 MiB between two looks at the clock

    def reader(thread: int) -> Callable[[], float]:
        mine, at = data[thread * share : (thread + 1) * share], [0]

        def read() -> float:
            start = at[0] if at[0] + piece <= share else 0
            at[0] = start + piece
            kernels["read"](mine[start : start + piece])
            return float(piece * 8)

        return read

    def worker(name: str, macs: int) -> Callable[[int], Callable[[], float]]:
        rounds = 20_000

        def work() -> float:
            kernels[name](rounds)
            return float(rounds * _UNROLL * _ACCUMULATORS * macs)

        return lambda _thread: work

    instruction = kernels["instruction"]
    dots = worker("int8", _DOTS[instruction][1])
    fmas = worker("f32", kernels["f32_lanes"])
    ones = [_rate(task, 1) for task in (reader, dots, fmas)]
    ran, start = time.process_time(), time.perf_counter()
    alls = [_rate(task, threads) for task in (reader, dots, fmas)]
    share_of_time = (time.process_time() - ran) / ((time.perf_counter() - start) * threads)
    (read_1, int8_1, f32_1), (read, int8, f32) = ([round(r / 1e9, 3) for r in rs] for rs in (ones, alls))
    got = round(min(1.0, max(0.01, share_of_time)), 3)
    return Speed(threads, read_1, read, instruction, int8_1, int8, f32_1, f32, data.nbytes, got)


def working_set(facts: dict[str, Any]) -> int:
    """Bytes to read: eight times the last level of cache, at most a quarter of the memory that is free."""
    wanted = min(_MAX_BYTES, max(8 * (facts["last_level_cache"] or 0), 4 * _MIN_BYTES))
    return (
        max(_MIN_BYTES, min(wanted, facts["memory_available"] // 4)) if facts["memory_available"] else wanted
    )


def _rate(task: Callable[[int], Callable[[], float]], threads: int) -> float:
    """Work per second of all threads together, best of the windows.

    Each thread counts what it did in the window, so a slow core or a busy neighbour costs its own share only.
    """
    works = [task(i) for i in range(threads)]
    for work in works:
        work()
    return max(_window(works) for _ in range(_WINDOWS))


def _window(works: list[Callable[[], float]]) -> float:
    """Work per second of all in one window. All clocks start together: a thread that gets no processor counts."""
    rates, begin = [0.0] * len(works), [0.0]

    def start() -> None:
        begin[0] = time.perf_counter()

    barrier = threading.Barrier(len(works), start)

    def run(i: int) -> None:
        done, now = 0.0, 0.0
        barrier.wait()
        while now < _WINDOW_S:
            done += works[i]()
            now = time.perf_counter() - begin[0]
        rates[i] = done / now

    others = [threading.Thread(target=run, args=(i,)) for i in range(1, len(works))]
    for t in others:
        t.start()
    run(0)
    for t in others:
        t.join()
    return math.fsum(rates)


# ---- the loops ----------------------------------------------------------------------------------


@functools.cache
def _kernels() -> dict[str, Any]:
    """Compiled loops: 'read'(int64[n]), 'int8'(rounds), 'f32'(rounds); 'instruction' and 'f32_lanes' of them."""
    try:
        import numba
        from llvmlite import binding
        from numba.core import types
        from numba.extending import intrinsic
    except ImportError as error:
        raise UsageError(
            f"measuring needs numba ({error}); install it, or name a profile with --machine"
        ) from None
    try:
        features = dict(binding.get_host_cpu_features())
    except RuntimeError:  # not known on this platform
        features = {}
    instruction = choose(features)
    lanes = 16 if features.get("avx512f") else 8 if features.get("avx2") else 4

    @intrinsic
    def int8_loop(typing: Any, rounds: Any) -> Any:
        def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            return _emit(builder, args[0], *_int8_step(instruction))

        return types.int64(types.int64), code

    @intrinsic
    def f32_loop(typing: Any, rounds: Any) -> Any:
        def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            return _emit(builder, args[0], *_f32_step(lanes))

        return types.int64(types.int64), code

    def read(a: Any) -> Any:
        total = 0
        for i in range(a.shape[0]):
            total += a[i]
        return total

    jit = numba.njit(nogil=True)
    return {
        "read": jit(read),
        "int8": jit(lambda rounds: int8_loop(rounds)),  # type: ignore[call-arg]
        "f32": jit(lambda rounds: f32_loop(rounds)),  # type: ignore[call-arg]
        "instruction": instruction,
        "f32_lanes": lanes,
    }


def choose(features: dict[str, bool]) -> str:
    """The best instruction of `_DOTS` that a CPU with these LLVM features has."""
    return next(name for name, (needs, _) in _DOTS.items() if all(features.get(f) for f in needs))


_Step = Callable[["ir.IRBuilder", "ir.Value", "ir.Value"], "ir.Value"]


def _emit(
    b: ir.IRBuilder, rounds: ir.Value, kind: ir.Type, operand: ir.Type, step: _Step, shared: bool = True
) -> ir.Value:
    """A loop that applies `step` to each of the accumulators _UNROLL times a round; the sum of what they hold.

    Before every use an empty assembler statement may have changed the operand on the stack, so that nothing
    can be computed before the loop. shared: all accumulators of a round use one operand, which a step whose
    product does not depend on its accumulator must not allow.
    """
    from llvmlite import ir

    i64 = ir.IntType(64)
    stack = b.alloca(operand)
    b.store(ir.Constant(operand, None), stack)
    entry, loop, after = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
    b.branch(loop)
    b.position_at_end(loop)
    count = b.phi(i64)
    accumulators = [b.phi(kind) for _ in range(_ACCUMULATORS)]
    values: list[ir.Value] = list(accumulators)
    touch = ir.FunctionType(ir.VoidType(), [stack.type])
    for _ in range(_UNROLL):
        for i, value in enumerate(values):
            if i == 0 or not shared:
                b.asm(touch, "", "r,~{memory}", [stack], side_effect=True)
                x = b.load(stack)
            values[i] = step(b, value, x)
    more = b.add(count, ir.Constant(i64, 1))
    count.add_incoming(ir.Constant(i64, 0), entry)
    count.add_incoming(more, loop)
    for phi, value in zip(accumulators, values):
        phi.add_incoming(ir.Constant(kind, None), entry)
        phi.add_incoming(value, loop)
    b.cbranch(b.icmp_signed("<", more, rounds), loop, after)
    b.position_at_end(after)
    total = ir.Constant(i64, 0)
    for value in values:
        word = b.bitcast(b.extract_element(value, ir.Constant(ir.IntType(32), 0)), ir.IntType(32))
        total = b.add(total, b.zext(word, i64))
    return total


def _call(b: ir.IRBuilder, name: str, returns: ir.Type, *args: ir.Value) -> ir.Value:
    from llvmlite import ir

    f = b.module.globals.get(name)
    if f is None:
        f = ir.Function(b.module, ir.FunctionType(returns, [a.type for a in args]), name)
    return b.call(f, args)


def _f32_step(lanes: int) -> tuple[ir.Type, ir.Type, _Step]:
    """(accumulator, operand, acc = fma(x, x, acc)) on vectors of `lanes` floats."""
    from llvmlite import ir

    kind = ir.VectorType(ir.FloatType(), lanes)
    return kind, kind, lambda b, acc, x: _call(b, f"llvm.fma.v{lanes}f32", kind, x, x, acc)


def _int8_step(instruction: str) -> tuple[ir.Type, ir.Type, _Step, bool]:
    """(accumulator, operand, acc += dot(x, x), shared) for an instruction of `_DOTS`."""
    from llvmlite import ir

    i8, i16, i32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
    words = {"avx512vnni": 16, "avxvnni": 8, "avx2": 8, "plain": 16}.get(instruction, 4)
    kind = ir.VectorType(i32, words)
    octets = ir.VectorType(i8, 16 if instruction == "plain" else 4 * words)
    names = {
        "avx512vnni": ("llvm.x86.avx512.vpdpbusd.512", kind),
        "avxvnni": ("llvm.x86.avx512.vpdpbusd.256", kind),
        "dotprod": ("llvm.aarch64.neon.sdot.v4i32.v16i8", octets),
        "i8mm": ("llvm.aarch64.neon.smmla.v4i32.v16i8", octets),
    }

    def one(b: ir.IRBuilder, acc: ir.Value, x: ir.Value) -> ir.Value:
        return _call(b, names[instruction][0], kind, acc, x, x)

    def avx2(b: ir.IRBuilder, acc: ir.Value, x: ir.Value) -> ir.Value:
        pairs = _call(b, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(i16, 16), x, x)
        ones = ir.Constant(ir.VectorType(i16, 16), [1] * 16)
        return b.add(acc, _call(b, "llvm.x86.avx2.pmadd.wd", kind, pairs, ones))

    def plain(b: ir.IRBuilder, acc: ir.Value, x: ir.Value) -> ir.Value:
        wide = b.sext(x, kind)
        return b.add(acc, b.mul(wide, wide))

    if instruction in names:
        return kind, names[instruction][1], one, True
    return kind, octets, avx2 if instruction == "avx2" else plain, False


# ---- what was measured before ---------------------------------------------------------------------


def cache_folder() -> Path | None:
    """This user's cache folder for halfbyte, or None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "halfbyte"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "halfbyte"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "halfbyte"
    return home / ".cache" / "halfbyte"


def _key(facts: dict[str, Any]) -> str:
    return f"{facts['cpu']}, {facts['cpus']} cpus, version {VERSION}"


def cached(facts: dict[str, Any] | None = None) -> Speed | None:
    """What was measured on this machine before, or None. A damaged cache is no cache."""
    folder = cache_folder()
    if folder is None:
        return None
    return _entry(_stored(folder / "bandwidth.json").get(_key(facts or probe())))


def _stored(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _entry(found: object) -> Speed | None:
    names = {f.name: f.type for f in fields(Speed)}
    if not isinstance(found, dict) or found.keys() != names.keys():
        return None
    for name, kind in names.items():
        value = found[name]
        if kind == "str":
            if not isinstance(value, str):
                return None
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            return None
    return Speed(**found)


def speed(fresh: bool = False) -> Speed:
    """The cached measurement of this machine, or a new one, which is then cached."""
    facts = probe()
    found = None if fresh else cached(facts)
    if found is None:
        found = measure()
        with contextlib.suppress(OSError):  # a read-only home costs a second the next time, no more
            _store(_key(facts), found)
    return found


def _store(key: str, found: Speed) -> None:
    folder = cache_folder()
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bandwidth.json"
    text = json.dumps({**_stored(path), key: asdict(found)}, indent=1)
    handle, name = tempfile.mkstemp(dir=folder, prefix="bandwidth-")
    try:
        with os.fdopen(handle, "w") as f:
            f.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
