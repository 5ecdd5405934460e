"""Quality of every recipe and method on a model and a text: bits, nll, KL and top-1 against its own f32 file.

    python benchmarks/quality.py CHECKPOINT TEXT [--ctx 512] [--bytes 300000] [--tokenizer FILE] [--calibrate FILE]

q4 comes by each method: rounded to nearest, the default (gptq on text of the model's own and the built-in mix) and,
with --calibrate, both on that text. Texts that a model was trained or calibrated on say nothing: give held-out ones.
Stories separated by `<|endoftext|>` are joined by blank lines.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import halfbyte
from halfbyte.runtime.bench import commit, machine_name
from halfbyte.runtime.evaluate import evaluate

# recipe, method, whether it takes the calibration text
ROWS = (
    ("f32", "rtn", False),
    ("f16", "rtn", False),
    ("q8", "rtn", False),
    ("q4", "rtn", False),
    ("q4", "rtn", True),
    ("q4", "gptq", False),
    ("q4", "gptq", True),
)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("text", type=Path)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--bytes", type=int, default=300_000)
    parser.add_argument("--tokenizer")
    parser.add_argument("--calibrate", type=Path)
    args = parser.parse_args()
    text = args.text.read_bytes()[: args.bytes].decode("utf-8", "ignore").replace("<|endoftext|>", "\n\n")
    print(f"{args.checkpoint}, {args.text.name}, ctx {args.ctx}; {machine_name()}, commit {commit()}\n")
    print("| recipe | policy | bits | tokens | nll | against f32 | KL mean | KL p99 | top-1 % |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        reference, base = None, 0.0
        for recipe, method, calibrated in ROWS:
            if calibrated and args.calibrate is None:
                continue
            label = f"{recipe} {method}" + (" + text" if calibrated else "") if recipe == "q4" else recipe
            path = halfbyte.convert(
                args.checkpoint, Path(folder) / f"{label}.hb", recipe=recipe, tokenizer=args.tokenizer,
                method=method, calibrate=args.calibrate if calibrated else None,
            )  # fmt: skip
            for policy in (
                ("f32",) if recipe == "f32" else ("f32", "i8g32") if recipe[0] == "q" else ("i8g32",)
            ):
                model = halfbyte.load(path, policy=policy)
                reference = reference or model
                r = evaluate(model, text, ctx=args.ctx, against=reference)
                base = base or r["nll_per_token"]
                print(
                    f"| {label} | {policy} | {model.facts()['bits_per_weight']:.3f} | {r['tokens']}"
                    f" | {r['nll_per_token']:.5f} | {100 * (r['nll_per_token'] / base - 1):+.3f} %"
                    f" | {r['kld_mean']:.6f} | {r['kld_p99']:.5f} | {100 * r['top1_agreement']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
