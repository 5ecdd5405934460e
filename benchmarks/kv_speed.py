"""Decode and prefill of a model by kv mode, modes interleaved so that a drifting machine is fair to all.

    python benchmarks/kv_speed.py MODEL.hb [--depth 8192] [--modes "f16 k8v8 k8v4 tq4 tq3"] [--rounds 16] [--tokens 3]
        [--prompt 0] [--threads 2] [--json]

Caches are filled with random codes instead of by hours of prefill: speed does not depend on them. The bound is
what a mode could be at most relative to the first one if only bytes mattered: the weights' and those of the caches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

import halfbyte
from halfbyte.devices.fit import of_file
from halfbyte.runtime.kv_page import FloatPage
from halfbyte.runtime.session import Session


def fill(session: Session, depth: int, more: int, rng: np.random.Generator) -> None:
    """Make `session` look as if `depth` tokens had been fed, with room for `more`."""
    session.kv.reserve(depth + more)
    codes = rng.integers(0, 256, 1 << 20, np.uint8)
    floats = rng.standard_normal(1 << 20).astype(np.float16)
    for pages in session.kv.pages:
        for page in pages:
            if isinstance(page, FloatPage):
                page.keys[:] = np.resize(floats, page.keys.shape)
                page.values[:] = np.resize(floats, page.values.shape)
                continue
            page.bytes[:] = np.resize(codes[rng.integers(1 << 19) :], page.bytes.shape)
            page.parts[1][:] = page.parts[3][:] = 180  # scales
    session.ids = rng.integers(0, session.model.vocab_size, depth).tolist()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--depth", type=int, default=8192)
    parser.add_argument(
        "--modes", default="f16 k8v8 k8v4 tq4 tq3", help="names between spaces; the first is the base"
    )
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=3, help="decoded in a round")
    parser.add_argument("--prompt", type=int, default=0, help="tokens of a prefill in every round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    model = halfbyte.load(args.model, threads=args.threads)
    names = args.modes.split()
    sessions = {}
    for name in names:
        sessions[name] = model.session(name)
        fill(sessions[name], args.depth, max(args.prompt, args.tokens), rng)
    ids = rng.integers(0, model.vocab_size, max(args.prompt, 1)).tolist()
    decode: dict[str, list[float]] = {name: [] for name in names}
    prefill: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, session in sessions.items():
            for _ in range(args.tokens):
                start = time.perf_counter()
                session.feed(ids[:1])
                decode[name].append(1e3 * (time.perf_counter() - start))
            session.rewind(args.tokens)
            if args.prompt:
                start = time.perf_counter()
                session.feed(ids)
                prefill[name].append(1e3 * (time.perf_counter() - start))
                session.rewind(args.prompt)
    load = of_file(model.file)
    read = {name: load.read + load.kv_read(args.depth, name) for name in names}
    rows = []
    for name in names:
        row: dict[str, object] = {"kv": name, "bound": read[names[0]] / read[name]}
        for what, times in (("decode", decode), ("prefill", prefill)):
            for how in (statistics.median, min):
                if times[name]:
                    row[f"{what}_{how.__name__}_ms"] = how(times[name])
                    row[f"{what}_{how.__name__}_ratio"] = how(times[names[0]]) / how(times[name])
        row["read_gb_per_s"] = read[name] / statistics.median(decode[name]) / 1e6
        rows.append(row)
    if args.json:
        print(json.dumps({"model": args.model, "depth": args.depth, "threads": args.threads, "rows": rows}))
        return
    keys = list(rows[0])
    print(" ".join(f"{k:>20}" for k in keys))
    for row in rows:
        print(" ".join(f"{v:>20}" if isinstance(v, str) else f"{v:20.3f}" for v in row.values()))


if __name__ == "__main__":
    main()
