"""Speed of every linear kernel of the native library, beside what the memory can give.

    python benchmarks/kernels.py [--rows 8192] [--cols 2048] [--tokens 256] [--threads 1,2] [--isa NAME] [--json]

For each row of the kernel table that this machine supports: decode (one token, GB/s of stored weights, cycling
through enough matrices that none stays in a cache) and prefill (`tokens` tokens, GMAC/s). Times are the best
of several runs; on a shared machine read them as lower bounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from typing import Any

import numpy as np

from halfbyte.formats import encodings, program, tiles
from halfbyte.runtime.backends import native

# One encoding (group, scale type) to stand for each family of the table.
FAMILIES = {
    "bits8": [("q8", 32, "f16"), ("i8", 0, "f32"), ("i8", 16, "f16"), ("a8", 32, "f16"), ("z8", 128, "f16")],
    "bits6": [("q6", 32, ""), ("i6", 16, "k256")],
    "bits5": [("q5", 32, ""), ("a5", 32, "k256")],
    "bits4": [("q4", 32, ""), ("i4", 32, "f16"), ("a4", 32, "k256"), ("z4", 128, "f16"), ("n4", 32, "k256")],
    "bits3": [("q3", 32, ""), ("i3", 16, "k256")],
    "bits2": [("q2", 32, ""), ("i2", 64, "f16"), ("a2", 16, "k256")],
    "float": [("f32", 0, ""), ("f16", 0, ""), ("bf16", 0, "")],
    "dequantised": [("q4", 32, ""), ("f8e4m3", 0, "f32")],
}
CACHE_BYTES = 256 << 20  # more than any cache here


def read_bandwidth(seconds: float = 0.4) -> float:
    """GB/s at which one NumPy thread sums a large array: a floor for the memory's."""
    a = np.ones(CACHE_BYTES // 8, np.int64)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        t = time.perf_counter()
        a.sum()
        best = max(best, a.nbytes / (time.perf_counter() - t) / 1e9)
    return best


class Bench:
    """`copies` LINEAR records over as many matrices of the same shape."""

    def __init__(
        self,
        encoding: str,
        group: int,
        scale_type: str,
        args: argparse.Namespace,
        isa: int,
        threads: int,
        policy: int,
    ):
        self.ffi, self.lib = ffi, lib = native.load_library()
        rows, cols = args.rows, args.cols
        self.nbytes = tiles.nbytes(encoding, rows, cols, group, scale_type)
        self.copies = max(1, -(-CACHE_BYTES // self.nbytes))
        stride = tiles.align(self.nbytes)
        raw = np.zeros(stride * self.copies + 64, np.uint8)
        start = -raw.ctypes.data % 64
        self.data = raw[start : start + stride * self.copies]
        e = encodings.BY_NAME[encoding]
        for p in tiles.planes(encoding, rows, cols, group, scale_type):  # random codes, scales of one
            for c in range(self.copies):
                part = self.data[c * stride + p.offset :][: p.nbytes]
                if p.name in ("codes", "high", "zeros"):
                    part[:] = np.resize(
                        np.random.default_rng(c).integers(0, 256, 1 << 16, np.uint8), p.nbytes
                    )
                elif p.dtype.itemsize > 1:
                    name = e.name if e.is_float else "f16" if scale_type == encodings.K256 else scale_type
                    part.view(p.dtype)[:] = encodings.float_to_bits(np.ones(1, np.float32), name)
                else:
                    part[:] = 200
        weights = ffi.new("hb_weight[]", self.copies)
        base = ffi.cast("uint8_t *", self.data.ctypes.data)
        for i, w in enumerate(weights):
            w.data, w.nbytes, w.encoding, w.tile = base + i * stride, self.nbytes, e.code, tiles.P16
            w.rows, w.cols, w.group = rows, cols, group
            w.scale_type = encodings.SCALE_TYPES[scale_type]
        self.records = np.array(
            [program.record("linear", out=[1], ins=[0], weights=[i]) for i in range(self.copies)],
            program.OP_DTYPE,
        )
        self.slots = np.zeros(2, program.SLOT_DTYPE)
        self.slots["width"], self.slots["base"] = (cols, rows), (0, 1)
        self.pool = ffi.gc(lib.hb_pool_create(threads), lib.hb_pool_free)
        error = ffi.new("char[256]")
        handle = lib.hb_bind(
            ffi.cast("hb_op *", self.records.ctypes.data), self.copies,
            ffi.cast("hb_slot *", self.slots.ctypes.data), 2,
            ffi.NULL, 0, weights, self.copies, policy, isa, self.pool, error, 256,
        )  # fmt: skip
        assert handle != ffi.NULL, ffi.string(error)
        self.handle = ffi.gc(handle, lib.hb_free)

    def seconds(self, tokens: int, records: int, repeats: int) -> float:
        """Best time of one record over `tokens` rows."""
        ffi = self.ffi
        x = np.random.default_rng(0).standard_normal((tokens, int(self.slots[0]["width"]))).astype(np.float32)
        y = np.zeros((tokens, int(self.slots[1]["width"])), np.float32)
        zeros = np.zeros(tokens, np.int32)
        step, base = ffi.new("hb_step *"), ffi.new("float *[]", 2)
        base[0], base[1] = (ffi.cast("float *", a.ctypes.data) for a in (x, y))
        step.rows, step.slot_base = tokens, base
        step.ids = step.positions = step.sessions = step.pick_rows = ffi.cast("int32_t *", zeros.ctypes.data)
        records = min(records, self.copies)
        best = np.inf
        for _ in range(repeats):
            t = time.perf_counter()
            assert self.lib.hb_run(self.handle, step, 0, records) == 0
            best = min(best, (time.perf_counter() - t) / records)
        return float(best)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One dict a kernel and thread count."""
    ffi, lib = native.load_library()
    names = {ffi.string(lib.hb_isa_name(i)).decode(): i for i in range(lib.HB_ISA_COUNT)}
    out = []
    for k in native.kernels():
        if k["op"] != "linear" or not k["supported"] or (args.isa and k["isa"] != args.isa):
            continue
        if args.family and k["family"] not in args.family.split(","):
            continue
        for encoding, group, scale_type in FAMILIES[k["family"]]:
            for threads in (int(t) for t in args.threads.split(",")):
                policy = 0 if k["family"] == "dequantised" else 1
                b = Bench(encoding, group, scale_type, args, names[k["isa"]], threads, policy)
                slow = k["isa"] == "scalar" or k["family"] == "dequantised"
                decode = b.seconds(1, 2 if slow else b.copies, 2 if slow else args.repeats)
                tokens = 16 if slow else args.tokens
                prefill = b.seconds(tokens, 1, 1 if slow else args.repeats)
                row = {
                    "kernel": k["name"], "encoding": encoding, "group": group, "scale": scale_type, "threads": threads,
                    "decode_us": round(decode * 1e6, 1), "decode_gb_per_s": round(b.nbytes / decode / 1e9, 2),
                    "prefill_gmac_per_s": round(tokens * args.rows * args.cols / prefill / 1e9, 1),
                }  # fmt: skip
                out.append(row)
                if not args.json:
                    print(
                        f"{row['kernel']:34} {encoding:5} g{group:<4} {scale_type:5} {threads} threads "
                        f"{row['decode_gb_per_s']:7.2f} GB/s {row['prefill_gmac_per_s']:8.1f} GMAC/s",
                        flush=True,
                    )
    return out


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--cols", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--isa", default="")
    parser.add_argument("--family", default="")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    bandwidth = read_bandwidth()
    if not args.json:
        print(
            f"one thread reads {bandwidth:.1f} GB/s; matrix {args.rows} x {args.cols}, prefill {args.tokens} tokens"
        )
    rows = measure(args)
    if args.json:
        print(
            json.dumps(
                {
                    "machine": platform.processor() or platform.machine(),
                    "read_gb_per_s": bandwidth,
                    "rows": rows,
                }
            )
        )


if __name__ == "__main__":
    main()
