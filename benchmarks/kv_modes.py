"""What packed keys and values change: K and V alone and together, with and without the rotation, with QJL.

    python benchmarks/kv_modes.py MODEL.hb --text FILE [--tokens 1024] [--sides 8,4,t4,t3,t2] [--json]

Every cache here is emulated on the reference backend: vectors are quantised and turned back by the functions that
define the modes (`runtime.kv_page`), so any combination can be tried, and queries are not rounded; the first page stays
at 8 bits, as in every packed mode. KL and nll are in nats per token, KL against a cache of f32. Keys q4, q3 and q2 are
those of TurboQuant's inner-product variant: one bit less for the levels, and the signs of what they leave (QJL).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

import halfbyte
from halfbyte.formats.kv_modes import BY_SIDE, PAGE
from halfbyte.runtime.evaluate import cut, log_softmax, windows
from halfbyte.runtime.kv import KV
from halfbyte.runtime.kv_page import decode, dequantize, encode, quantize
from halfbyte.runtime.model import Model

Change = Callable[[np.ndarray], np.ndarray]
WITH_SIGNS = {"t4": "q4", "t3": "q3", "t2": "q2"}  # of as many bits


def quantised(side: str, rotated: bool = True) -> Change:
    """float32[heads, n, d] -> the same as a side of this name gives it back."""
    s = BY_SIDE[side]

    def change(x: np.ndarray) -> np.ndarray:
        if not rotated:
            return dequantize(*quantize(x.astype(np.float32), s), s)
        return decode(encode(x, s), s).reshape(*x.shape[:-1], s.stages, x.shape[-1]).sum(axis=-2)

    return change


class Emulated(KV):
    """A cache of f32 whose keys and values are changed as they are put."""

    def __init__(self, caches: np.ndarray, k: Change | None, v: Change | None):
        super().__init__(caches, "f32")
        self.change = k, v

    def put(self, cache: int, start: int, k: np.ndarray, v: np.ndarray) -> None:
        """One position at a time, as the reference does."""
        eight = quantised("8")
        parts = [
            x if change is None else (eight if start < PAGE else change)(x)
            for x, change in zip((k, v), self.change)
        ]
        super().put(cache, start, *parts)


def logits(model: Model, part: list[int], k: Change | None, v: Change | None) -> np.ndarray:
    """float32[n - 1, vocab]"""
    session = model.session("f32")
    session.kv = Emulated(model.file.caches, k, v)
    return session.feed_all(part[:-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--sides", default="8,4,t4,t3,t2")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = halfbyte.load(args.model, backend="reference")
    ctx = min(512, model.context_length)
    parts = cut(windows(model.tokenizer, Path(args.text).read_text(encoding="utf-8"), ctx), args.tokens)
    law = [log_softmax(logits(model, p, None, None)) for p in parts]
    targets = [np.asarray(p[1:]) for p in parts]
    count = sum(map(len, targets))
    nll = -sum(float(a[np.arange(len(t)), t].sum()) for a, t in zip(law, targets)) / count
    rows: list[dict[str, object]] = [{"keys": "f32", "values": "f32", "kld": 0.0, "nll": nll}]

    def measure(keys: str, values: str, k: Change | None, v: Change | None) -> None:
        kld = total = 0.0
        for part, theirs, t in zip(parts, law, targets):
            ours = log_softmax(logits(model, part, k, v))
            kld += float((np.exp(theirs) * (theirs - ours)).sum())
            total -= float(ours[np.arange(len(t)), t].sum())
        rows.append({"keys": keys, "values": values, "kld": kld / count, "nll": total / count})
        if not args.json:
            print(f"{keys:16} {values:16} {kld / count:10.5f} {total / count:9.4f}", flush=True)

    if not args.json:
        print(f"{count} tokens in windows of {ctx}\n{'keys':16} {'values':16} {'KL':>10} {'nll':>9}")
        print(f"{'f32':16} {'f32':16} {0:10.5f} {nll:9.4f}")
    for side in args.sides.split(","):
        for rotated, name in ((True, side), (False, f"{side} unrotated")):
            change = quantised(side, rotated)
            measure(name, "f32", change, None)
            measure("f32", name, None, change)
            measure(name, name, change, change)
        if side in WITH_SIGNS:
            keys = quantised(WITH_SIGNS[side])
            measure(WITH_SIGNS[side], "f32", keys, None)
            measure(WITH_SIGNS[side], side, keys, quantised(side))
    if args.json:
        print(json.dumps({"model": args.model, "tokens": count, "ctx": ctx, "rows": rows}))


if __name__ == "__main__":
    main()
