"""What a decoded token costs outside the kernels of the native backend.

    python benchmarks/overhead.py FILE... [--depth 16] [--threads 1] [--rounds 9] [--json]

CPU time of the calling thread, best of several rounds, in microseconds a token:

    feed       Session.feed of one token, all of Python included
    kernels    hb_run of the whole program, less its own checks and what handing out its records costs
    overhead   feed - kernels

Handing out a record is timed on a program of as many ADDs of one column, so a kernel's call counts as overhead.
With more than one thread the calling thread's waiting at the end of a shared op counts as kernels.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from halfbyte.formats import program
from halfbyte.runtime.backends import native
from halfbyte.runtime.model import load

CALLS = 200


def best(call: Callable[[], object], rounds: int) -> float:
    """Microseconds of CPU time of one call."""
    least = float("inf")
    for _ in range(rounds):
        start = time.thread_time_ns()
        for _ in range(CALLS):
            call()
        least = min(least, (time.thread_time_ns() - start) / CALLS / 1e3)
    return least


def handing_out(records: int, pool: Any, rounds: int) -> float:
    """Microseconds of a program of `records` ADDs of one column."""
    ffi, lib = native.load_library()
    code = np.array([program.record("add", out=[0], ins=[0, 0], scale=0.0)] * records, program.OP_DTYPE)
    slots = np.zeros(1, program.SLOT_DTYPE)
    slots["width"] = 1
    error, value, zero = ffi.new("char[256]"), ffi.new("float[1]"), ffi.new("int32_t[1]")
    handle = lib.hb_bind(
        ffi.cast("hb_op *", code.ctypes.data), records, ffi.cast("hb_slot *", slots.ctypes.data), 1,
        ffi.NULL, 0, ffi.new("hb_weight[1]"), 0, lib.HB_POLICY_F32, native.ISA_BEST, pool, error, 256,
    )  # fmt: skip
    assert handle != ffi.NULL, ffi.string(error)
    handle = ffi.gc(handle, lib.hb_free)
    bases = ffi.new("float *[1]", [value])
    step = ffi.new("hb_step *", {"rows": 1, "slot_base": bases})
    step.ids = step.positions = step.sessions = step.pick_rows = zero
    return best(lambda: lib.hb_run(handle, step, 0, records), rounds)


def measure(path: str, depth: int, threads: int, rounds: int) -> dict[str, Any]:
    """One file."""
    model = load(path, "native", threads)
    backend: Any = model.backend
    lib, records = backend._lib, len(model.file.program)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, depth + 1).tolist()
    session = model.session()
    session.feed(ids[:depth])

    def feed() -> None:
        session.feed(ids[depth:])
        session.ids.pop()  # the same position again, without what rewinding costs

    feed_us = best(feed, rounds)
    run_us = best(lambda: lib.hb_run(backend._program, backend._step, 0, records), rounds)
    kernels_us = run_us - handing_out(records, backend._pool, rounds)
    return {
        "file": path,
        "records": records,
        "threads": threads,
        "feed_us": round(feed_us, 2),
        "kernels_us": round(kernels_us, 2),
        "overhead_us": round(feed_us - kernels_us, 2),
        "tokens_per_s": round(1e6 / feed_us, 1),
    }


def main() -> None:
    """Print one line, or one JSON object, a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--depth", type=int, default=16, help="tokens before the one that is timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for path in args.files:
        row = measure(path, args.depth, args.threads, args.rounds)
        if args.json:
            print(json.dumps(row))
        else:
            print(
                f"{path}: {row['records']} records, {row['threads']} threads: feed {row['feed_us']} us "
                f"({row['tokens_per_s']:.0f} tokens/s), kernels {row['kernels_us']} us, "
                f"overhead {row['overhead_us']} us"
            )


if __name__ == "__main__":
    main()
