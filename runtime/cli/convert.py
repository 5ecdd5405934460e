"""Convert a trained checkpoint to one .hb file."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.cli.arguments import add_json, whole
from halfbyte.runtime.cli.terminal import Progress, print_json, printable, size

HELP = "convert a checkpoint to a .hb file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `convert`."""
    parser.add_argument("source", help="a Hugging Face folder, a .gguf file or a llama2.c .bin")
    parser.add_argument("-o", "--out", metavar="FILE", help="default: <name of the source>.hb in this folder")
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="q4, q8, f16, bf16, f32 or keep (default: q4, or keep for codes that arrive quantised)",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="use this tokenizer instead of the source's own")
    parser.add_argument(
        "--context", type=whole(1, (1 << 31) - 1), metavar="N", help="positions to allow at most"
    )
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="text, or a .jsonl of chats, like what the model will see (default: text that a small model writes"
        " itself, and a built-in mix)",
    )
    parser.add_argument(
        "--method",
        default="auto",
        metavar="NAME",
        help="rtn (seconds; no text needed) or gptq (closest to the float model); default: gptq if the model has a"
        " tokenizer",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, then open the result once more to report what is in it."""
    import halfbyte
    from halfbyte.formats.container import File
    from halfbyte.runtime.model import weight_facts

    start = time.perf_counter()
    out = Path(args.out) if args.out is not None else default_out(args.source)
    with Progress("converting") as progress:
        halfbyte.convert(
            args.source,
            out,
            recipe=args.recipe,
            tokenizer=args.tokenizer,
            context=args.context,
            calibrate=args.calibrate,
            method=args.method,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    file = File(out)
    facts = weight_facts(file)
    if args.json:
        print_json(
            {
                "file": str(out),
                "recipe": file.metadata.get("general.recipe"),
                "method": file.metadata.get("quantization.method"),
                "file_bytes": facts["file_bytes"],
                "bits_per_weight": facts["bits_per_weight"],
                "seconds": seconds,
                "tokenizer": "TOKN" in file.sections,
                "digest": facts["digest"],
            }
        )
    else:
        print(
            f"{printable(out)}: {size(facts['file_bytes'])}, {facts['bits_per_weight']:.2f} bits per weight,"
            f" {seconds:.1f} s"
        )
    if "TOKN" not in file.sections:
        print("no tokenizer was found: the model takes token ids only (see --tokenizer)", file=sys.stderr)
    return 0


def default_out(source: str) -> Path:
    """<name of the source>.hb in the current folder."""
    path = Path(source).resolve()
    name = path.name if path.is_dir() else path.stem
    if not name:
        raise UsageError(f"{source} has no name to call the file by; give -o FILE")
    return Path(f"{name}.hb")
