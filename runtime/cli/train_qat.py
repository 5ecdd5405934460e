"""Train a checkpoint with its weights quantised, and write the .hb file: closer than converting below 4 bits."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from halfbyte.runtime.cli.arguments import add_json, number, whole
from halfbyte.runtime.cli.convert import default_out
from halfbyte.runtime.cli.report import of_file
from halfbyte.runtime.cli.terminal import Progress, print_json, print_table, printable, size

HELP = "quantisation-aware training (needs PyTorch)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train-qat`; what is not given is left to the converter."""
    parser.add_argument(
        "source", help="a Hugging Face folder, a .gguf file or a llama2.c .bin, with float weights"
    )
    parser.add_argument("-o", "--out", metavar="FILE", help="default: <name of the source>.hb in this folder")
    parser.add_argument(
        "--recipe",
        default="q4",
        metavar="NAME",
        help="q8, q6, q5, q4, q3, q2 or ternary, with + the head in q6; q4 has it in q5, q4- in q4",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="use this tokenizer instead of the source's own")
    parser.add_argument(
        "--context", type=whole(1, (1 << 31) - 1), metavar="N", help="positions to allow at most"
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text",
        action="append",
        metavar="FILE",
        help="text, or a .jsonl of chats, to train on; may be repeated",
    )
    text.add_argument(
        "--own-text",
        type=whole(0, 1 << 20),
        metavar="N",
        help="sequences that the float model writes itself (default: 1024)",
    )
    text.add_argument(
        "--heldout", metavar="FILE", help="text that decides which step is kept (default: 1 sequence of 16)"
    )
    loop = parser.add_argument_group("training")
    loop.add_argument("--steps", type=whole(1, 1 << 31), metavar="N", help="default: 1500")
    loop.add_argument("--batch", type=whole(1, 1 << 16), metavar="N", help="sequences a step (default: 2)")
    loop.add_argument("--length", type=whole(2, 512), metavar="N", help="tokens of a sequence (default: 512)")
    loop.add_argument(
        "--lr",
        type=number,
        metavar="X",
        help="peak learning rate, as a share of a tensor's rms (default: .001; 3 bits .002, fewer .01)",
    )
    loop.add_argument(
        "--warmup", type=number, metavar="X", help="share of the steps in which it rises (default: 0.05)"
    )
    loop.add_argument(
        "--ce",
        type=number,
        metavar="X",
        help="weight of the text itself beside the float model (default: 0.005)",
    )
    loop.add_argument(
        "--freeze",
        type=number,
        metavar="X",
        help="share of the steps after which scales are fixed (default: 0.8)",
    )
    loop.add_argument(
        "--lora-rank", type=whole(0, 1 << 16), metavar="N", help="train changes of rank N: less memory"
    )
    loop.add_argument(
        "--start", metavar="NAME", help="gptq or rtn: codes to start from (default: gptq above 2 bits)"
    )
    loop.add_argument("--policy", metavar="NAME", help="i8g32: round activations too (default), or f32")
    loop.add_argument("--kv", metavar="MODE", help="round keys and values as this mode does (default: not)")
    loop.add_argument(
        "--every", type=whole(1, 1 << 31), metavar="N", help="steps between measurements (default: 100)"
    )
    loop.add_argument(
        "--patience",
        type=whole(0),
        metavar="N",
        help="measurements without improvement that end it (default: never)",
    )
    loop.add_argument("--seed", type=whole(0, 1 << 31), metavar="N", help="default: 0")
    loop.add_argument("-t", "--threads", type=whole(1, 1024), metavar="N", help="default: 1")
    loop.add_argument("--resume", action="store_true", help="go on with a training that was stopped")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no remarks")
    parser.add_argument("--no-proof", dest="proof", action="store_false", default=None, help="see convert")
    add_json(parser)


OPTIONS = (
    *("recipe", "steps", "batch", "length", "lr", "warmup", "ce", "freeze", "lora_rank", "policy", "kv"),
    *("start", "own_text", "every", "patience", "seed", "threads"),
)


def run(args: argparse.Namespace) -> int:
    """Train, then say what was kept and how close it is."""
    import halfbyte
    from halfbyte.formats.container import File
    from halfbyte.runtime.model import weight_facts

    out = Path(args.out) if args.out is not None else default_out(args.source)
    options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    with Progress("training", quiet=args.quiet) as progress:
        found = halfbyte.train_qat(
            args.source,
            out,
            text=args.text or (),
            heldout=args.heldout,
            tokenizer=args.tokenizer,
            context=args.context,
            proof=args.proof,
            resume=args.resume,
            progress=progress,
            note=progress.note,
            **options,
        )
    file = File(out)
    facts = weight_facts(file)
    sizes = {name: facts[name] for name in ("file_bytes", "bits_per_weight", "digest")}
    if args.json:
        print_json({"file": str(out), "recipe": args.recipe, **sizes, **found})
        return 0
    rows = [(step, f"{nll:.4f}", f"{math.exp(nll):.3f}", f"{kl:.5f}") for step, nll, kl in found["measured"]]
    print_table(rows, ("step", "nll", "ppl", "KL"), "rrrr")
    print(
        f"{printable(out)}: {size(facts['file_bytes'])}, {facts['bits_per_weight']:.2f} bits per weight,"
        f" step {found['step']}"
    )
    if (proof := of_file(file)) is not None:
        print(f"{proof} (see halfbyte report)")
    return 0
