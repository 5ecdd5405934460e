"""What quantisation-aware training gains over the best post-training recipe of the same bits.

    python benchmarks/qat.py CHECKPOINT TEXT [--recipes q4 q3 q2 ternary] [--share 0.7] [--steps N] [--lr X] ...

TEXT is split in two: the first share is calibrated and trained on (beside what the float model writes itself), the rest
is measured on. Stories separated by `<|endoftext|>` are joined by blank lines. "closed" is the share of the gap in nll
between the float model and the post-training recipe with the lowest nll that training closes, and likewise of the KL
divergence, between the recipe with the lowest one and zero. Everything runs as `halfbyte eval` would run it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import halfbyte
from halfbyte.runtime.bench import commit, machine_name
from halfbyte.runtime.evaluate import evaluate

SEPARATOR = "<|endoftext|>"
METHODS = (("rtn", False), ("gptq", False), ("gptq", True), ("awq", True), ("autoround", True))
AFTER = {"ternary": "q2"}  # the post-training recipe beside one that has none


def split(text: str, share: float) -> tuple[str, str]:
    """The first share of the stories, and the others."""
    stories = [s.strip() for s in text.split(SEPARATOR)]
    if len(stories) == 1:
        stories = text.split("\n\n")
    n = round(share * len(stories))
    return "\n\n".join(stories[:n]), "\n\n".join(stories[n:])


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("text", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["q4", "q3", "q2", "ternary"])
    parser.add_argument("--share", type=float, default=0.7)
    names = [title(*m) for m in METHODS]
    parser.add_argument(
        "--methods", nargs="+", default=names, choices=names, help="post-training, default: all"
    )
    parser.add_argument("--keep", type=Path, help="folder for the trained files")
    for name, kind in (
        *(("steps", int), ("batch", int), ("length", int), ("own-text", int), ("every", int), ("seed", int)),
        *(("lr", float), ("ce", float), ("freeze", float), ("lora-rank", int), ("kv", str), ("policy", str)),
    ):
        parser.add_argument(f"--{name}", type=kind)
    args = parser.parse_args()
    other = ("checkpoint", "text", "recipes", "share", "keep", "methods")
    options = {k: v for k, v in vars(args).items() if k not in other and v is not None}
    train, held = split(args.text.read_text(encoding="utf-8"), args.share)
    print(f"{args.checkpoint}, {args.text.name}; {options}; {machine_name()}, commit {commit()}\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kept = args.keep or folder
        kept.mkdir(parents=True, exist_ok=True)
        text = folder / "train.txt"
        text.write_text(train, encoding="utf-8")
        path = halfbyte.convert(args.checkpoint, folder / "float.hb", recipe="f32", proof=False)
        reference = halfbyte.load(path)

        def measure(file: Path) -> dict[str, Any]:
            model = halfbyte.load(file)
            bits = model.facts()["bits_per_weight"]
            return evaluate(model, held, against=reference) | {"bits": bits}

        print(
            "| recipe | method | bits | nll | gap | KL mean | top-1 % | closed: nll | KL | steps | CPU min |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        after: dict[str, list[dict[str, Any]]] = {}
        for recipe in args.recipes:
            base = AFTER.get(recipe, recipe)
            if base not in after:
                after[base] = []
                for method, calibrated in METHODS:
                    if title(method, calibrated) not in args.methods:
                        continue
                    halfbyte.convert(
                        args.checkpoint, folder / "m.hb", recipe=base, method=method, proof=False,
                        calibrate=text if calibrated else None,
                    )  # fmt: skip
                    after[base].append(measure(folder / "m.hb"))
                    row(base, title(method, calibrated), after[base][-1])
            file = kept / f"{recipe}.hb"
            start = time.process_time()
            found = halfbyte.train_qat(
                args.checkpoint, file, recipe=recipe, text=[text], proof=False, progress=report, **options
            )
            minutes = (time.process_time() - start) / 60
            r = measure(file)
            least = min(p["nll_per_token"] for p in after[base]) - r["against_nll_per_token"]
            gap = r["nll_per_token"] - r["against_nll_per_token"]
            kld = min(p["kld_mean"] for p in after[base])
            row(
                recipe, "**trained**", r, f"{100 * (1 - gap / least):.0f} %",
                f"{100 * (1 - r['kld_mean'] / kld):.0f} %", f"{found['step']} of {found['steps']}", f"{minutes:.1f}",
            )  # fmt: skip


def title(method: str, calibrated: bool) -> str:
    """What a post-training method is called in the table."""
    return method + " + text" * calibrated


def report(now: str, done: int, total: int) -> None:
    """Progress, on stderr."""
    if done % 50 == 0:
        print(f"step {done} of {total}  {now}", file=sys.stderr, flush=True)


def row(recipe: str, method: str, r: dict[str, Any], *rest: str) -> None:
    """A line of the table."""
    gap = r["nll_per_token"] - r["against_nll_per_token"]
    cells = [
        *(
            recipe,
            method,
            f"{r['bits']:.3f}",
            f"{r['nll_per_token']:.5f}",
            f"{gap:+.5f}",
            f"{r['kld_mean']:.5f}",
        ),
        *(f"{100 * r['top1_agreement']:.2f}", *rest, *[""] * (4 - len(rest))),
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
