"""The demo model in four bits, trained: the file that `halfbyte demo` runs.

    python benchmarks/demo_model.py --data DIR [--out FILE] [--measure]

Trains on the real stories of DIR/text/tinystories.txt but for the last tenth (`stories.real_stories`), and on what the
float model writes itself. Then that tenth, and text of the float model that nothing was trained on, measure the file
beside the best post-training one. A training that was stopped goes on when run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from halfbyte.converter.demo.stories import real_stories

FOLDER = Path(__file__).resolve().parents[1] / "runtime" / "demo_model"
OWN_TEXT, UNSEEN, LENGTH = 192, 64, 512  # sequences trained on, sequences measured on, and their tokens
UNSEEN_SEED = 999  # the training's own text has other seeds


def train(source: Path, out: Path, stories: list[str], steps: int, seed: int) -> dict[str, Any]:
    """Write the trained file; what `halfbyte.train_qat` returns."""
    import halfbyte

    text = out.with_name(
        f".{out.name}.jsonl"
    )  # at one place, so that a training that was stopped finds it unchanged
    lines = "".join(json.dumps({"text": s}) + "\n" for s in stories)
    if not text.exists() or text.read_text(encoding="utf-8") != lines:
        text.write_text(lines, encoding="utf-8")
    found = halfbyte.train_qat(
        source, out, recipe="q4-", text=[text], own_text=OWN_TEXT, steps=steps, batch=4, length=LENGTH, seed=seed,
        every=50, resume=out.with_name(f".{out.name}.qat").exists(),
        progress=lambda now, done, total: print(f"step {done} of {total}  {now}", flush=True),
    )  # fmt: skip
    text.unlink()
    return found


def measure(source: Path, trained: Path, stories: list[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """(file, text, what `evaluate.measure` finds) of the trained file and of q4- without training, against floats."""
    import halfbyte
    from halfbyte.converter.calibrate import own_sequences
    from halfbyte.runtime.evaluate import measure

    with tempfile.TemporaryDirectory() as folder:
        paths = {"trained": trained}
        for recipe, method in (("f32", None), ("q4-", "gptq"), ("q4-", "rtn")):
            name = method or recipe
            paths[name] = Path(folder) / f"{name}.hb"
            options = {} if method is None else {"method": method}
            halfbyte.convert(source, paths[name], recipe=recipe, proof=False, **options)
        reference = halfbyte.load(paths["f32"])
        read = reference.tokenizer.encode
        texts = {
            "real stories, held out": [read(s, special=False)[:LENGTH] for s in stories],
            "its own text": own_sequences(paths["f32"], LENGTH, UNSEEN, UNSEEN_SEED),
        }
        return [
            (name, text, measure(halfbyte.load(paths[name]), parts, against=reference))
            for name in ("rtn", "gptq", "trained")
            for text, parts in texts.items()
        ]


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="has text/tinystories.txt")
    parser.add_argument("--source", type=Path, default=FOLDER, help="the float model's folder")
    parser.add_argument("--out", type=Path, default=FOLDER / "demo.hb")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true", help="only measure what --out holds")
    args = parser.parse_args()
    stories, unseen = real_stories(args.data)
    if not args.measure:
        found = train(args.source, args.out, stories, args.steps, args.seed)
        print(f"{found['tokens']} tokens, step {found['step']} of {found['steps']} kept")
    print("| file | text | tokens | nll | float nll | KL mean | top-1 % |\n|---|---|---|---|---|---|---|")
    for name, text, r in measure(args.source, args.out, unseen):
        print(
            f"| {name} | {text} | {r['tokens']} | {r['nll_per_token']:.4f} | {r['against_nll_per_token']:.4f}"
            f" | {r['kld_mean']:.5f} | {100 * r['top1_agreement']:.2f} |"
        )


if __name__ == "__main__":
    main()
