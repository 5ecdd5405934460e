"""Records that run together give the bits of records run apart, and no thread can hold up a step."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_native_backend import IDS, feed, model  # noqa: F401

from halfbyte.formats import program
from halfbyte.runtime.backends.backend import Step
from halfbyte.runtime.backends.native import Native
from halfbyte.runtime.kv import KV

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("policy", ["f32", "i8g32"])
@pytest.mark.parametrize("rows", [1, 2, 13, 70])
def test_records_together_and_apart(model, policy, rows):  # noqa: F811
    rng = np.random.default_rng(rows)
    count, results = len(model.program), []
    cuts = [[], range(1, count), *(np.sort(rng.choice(np.arange(1, count), 9, False)) for _ in range(4))]
    for cut in cuts:
        backend, kv = Native(model, policy, threads=2), KV(model.caches, "f16")
        kv.reserve(rows)
        positions = np.arange(rows, dtype=np.int32)
        step = Step(IDS[:rows], positions, np.zeros(rows, np.int32), np.array([rows - 1, 0], np.int32), [kv])
        backend.begin(step)
        edges = [0, *(int(i) for i in cut), count]
        for first, last in itertools.pairwise(edges):
            backend.run_range(step, first, last)
        results.append(b"".join(backend.slot(i, step).tobytes() for i in range(len(model.slots))))
    assert results.count(results[0]) == len(results)


def test_matrices_of_one_input_share_its_quantising(rig):
    """The second keeps the strips of the first; the third reads what the second wrote; the fourth has other blocks."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    ms = [rig.random_matrix(rng, "q4", 64, 64), rig.random_matrix(rng, "q8", 64, 64)]
    ms += [rig.random_matrix(rng, "i8", 64, 64, 8), rig.random_matrix(rng, "q4", 64, 64)]
    wires = [(0, 1, 0), (0, 0, 1), (0, 2, 3), (0, 3, 2), (3, 0, 3)]  # in, out, matrix
    records = [program.record("linear", out=[o], ins=[i], weights=[w]) for i, o, w in wires]
    slots = [x]
    slots += [np.zeros_like(x)] * 3
    for i, o, w in wires:
        slots[o] = rig.linear(ms[w], slots[i])
    for threads in (1, 3):
        for out, want in enumerate(slots):
            got = rig.Bound(records, [64] * 4, ms, threads=threads).run({0: x}, out, 5)
            assert np.array_equal(got, want), (threads, out)


@pytest.mark.parametrize("flags", [[], ["-fsanitize=thread"]])
def test_a_thread_that_is_held_up_holds_up_nothing(tmp_path, flags):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("no C compiler")
    native = ROOT / "native"
    sources = [native / "tests" / "pool.c", *(native / "src" / f"{n}.c" for n in ("pool", "cpu", "memory"))]
    macros = ["-D_GNU_SOURCE", "-DHB_X86=0", "-DHB_ARM=0", "-DHB_AVXVNNI=0"]
    folders = [f"-I{native / part}" for part in ("include", "src", ".")]
    out = tmp_path / "pool"
    command = [
        compiler,
        "-O1",
        "-g",
        "-pthread",
        *flags,
        *macros,
        *folders,
        *map(str, sources),
        "-o",
        str(out),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    if flags and "cannot find" in built.stderr:
        pytest.skip("this compiler has no thread sanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(out)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_bits_with_a_starved_thread(model):  # noqa: F811
    whole = feed(Native(model, threads=1), IDS, [70])
    before = set(os.listdir("/proc/self/task"))
    backend = Native(model, threads=4)
    mine = sorted(set(os.listdir("/proc/self/task")) - before)
    assert len(mine) == 3
    cpu = min(os.sched_getaffinity(0))
    for thread in mine:  # all workers on one processor, beside something that never rests
        os.setpriority(os.PRIO_PROCESS, int(thread), 19)
        os.sched_setaffinity(int(thread), {cpu})
    busy = subprocess.Popen(
        [sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nwhile 1: pass"]
    )
    try:
        for sizes in ([70], [1] * 70, [33, 37]):
            assert np.array_equal(feed(backend, IDS, sizes), whole)
    finally:
        busy.kill()
        busy.wait()
