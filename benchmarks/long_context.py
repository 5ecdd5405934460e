"""How far back each cache mode still finds what it needs: copies and needles in a model made for it (`induction`).

    python benchmarks/long_context.py [--length 32768] [--modes f16,k8v8,...] [--threads N] [--json]

Copy: different ids in random order, then the same again; nll in nats per token of the second time, by where in it,
and the share of greedy hits. Needles: at the end of a long text of different ids, one id from some depth is asked
for; the answer is what followed it there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import induction
import numpy as np

import halfbyte
from halfbyte.runtime.evaluate import log_softmax
from halfbyte.runtime.model import Model
from halfbyte.runtime.session import Session

MODES = "f32,f16,k8v8,k8v4,k4v4,tq4,tq3.5,tq3,tq3-qjl,tq2.5,tq2,tq3,0=k8v8"
PARTS, NEEDLES, CHUNK = 4, 64, 256


@dataclass(frozen=True)
class Found:
    """nll: of each quarter of the second time; copied, needles: shares of greedy hits."""

    mode: str
    length: int
    nll: list[float]
    copied: float
    needles: float


def measure(model: Model, mode: str, length: int, seed: int = 0) -> Found:
    """Copies and needles of `length` tokens with a cache of `mode`."""
    rng = np.random.default_rng(seed)
    half = length // 2
    ids = rng.permutation(model.vocab_size)[:half].tolist()
    session = model.session(mode)
    session.feed(ids)
    asked = rng.choice(np.arange(1, half - 1), min(NEEDLES, half - 2), replace=False)
    hits = 0
    for at in asked:
        branch = session.fork()
        hits += int(np.argmax(branch.feed([ids[at]]))) == ids[at + 1]
    losses, right = _losses(session, ids)
    quarters = [float(np.mean(q)) for q in np.array_split(losses, PARTS)]
    return Found(mode, length, quarters, right / (half - 1), hits / len(asked))


def _losses(session: Session, ids: list[int]) -> tuple[np.ndarray, int]:
    """Feed the ids; nll of each after the first, and how many were the likeliest."""
    losses, right = [], 0
    for start in range(0, len(ids), CHUNK):
        logits = session.feed_all(ids[start : start + CHUNK])
        after = np.array(ids[start + 1 : start + 1 + len(logits)])
        given = log_softmax(logits[: len(after)])
        losses.append(-given[np.arange(len(after)), after])
        right += int((given.argmax(1) == after).sum())
    return np.concatenate(losses), right


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--modes", default=MODES)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    modes: list[str] = []
    for word in args.modes.split(","):  # "tq3,0=k8v8" is one mode
        if "=" in word and modes:
            modes[-1] += "," + word
        else:
            modes.append(word)
    with tempfile.TemporaryDirectory() as folder:
        path = induction.make(Path(folder, "induction.hb"), "f16", max(1024, args.length // 2), args.length)
        model = halfbyte.load(str(path), threads=args.threads)
        if not args.json:
            print("| mode | nll by quarter | copied | needles |\n|---|---|---|---|")
        for mode in modes:
            found = measure(model, mode, args.length)
            nll = " ".join(f"{x:.4f}" for x in found.nll)
            line = f"| {mode} | {nll} | {found.copied:.2%} | {found.needles:.2%} |"
            print(json.dumps(asdict(found)) if args.json else line, flush=True)


if __name__ == "__main__":
    main()
