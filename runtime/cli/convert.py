"""Convert a trained checkpoint to one .hb file."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.cli.arguments import add_json, number, whole
from halfbyte.runtime.cli.report import of_file
from halfbyte.runtime.cli.terminal import Progress, print_json, print_table, printable, size

HELP = "convert a checkpoint to a .hb file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `convert`."""
    parser.add_argument("source", help="a Hugging Face folder, a .gguf file or a llama2.c .bin")
    parser.add_argument("-o", "--out", metavar="FILE", help="default: <name of the source>.hb in this folder")
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="q2 to q6, q8, f16, bf16, f32; q4 has the head in q5, q4+ in q6, q4- in q4; keep for codes that arrive"
        " quantised (default: q4 or keep)",
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
        help="rtn (seconds; no text needed), awq, autoround or gptq (closest to the float model); default: gptq if the"
        " model has a tokenizer",
    )
    parser.add_argument(
        "--smooth", action="store_true", help="even out large activations first (SmoothQuant)"
    )
    parser.add_argument(
        "--rotate", action="store_true", help="spread large activations by Hadamard rotations first"
    )
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="memory to stay below: 800M, 1.5G; the result is the same (with rtn and gptq)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no remarks")
    goal = parser.add_argument_group("which encoding each matrix gets, instead of a recipe")
    goal.add_argument(
        "--plan", metavar="FILE", help="as this file says: a plan that was saved, and perhaps edited"
    )
    goal.add_argument(
        "--target-bits", type=number, metavar="B", help="closest to the float model at B bits per weight"
    )
    goal.add_argument(
        "--max-bytes", metavar="SIZE", help="closest in a file of at most SIZE: 800M, 1.2G, bytes"
    )
    goal.add_argument(
        "--max-kld",
        type=number,
        metavar="X",
        help="smallest with a mean KL from the float model of at most X nats",
    )
    goal.add_argument(
        "--heldout",
        metavar="FILE",
        help="text that --max-kld measures on (default: part of the calibration text), and the proof",
    )
    proof = parser.add_argument_group("the proof in the file, see `halfbyte report`")
    proof.add_argument(
        "--proof",
        action=argparse.BooleanOptionalAction,
        help="measure how close the file is to the float model, for which that is written aside (default: for models of"
        " up to 50M weights, or with --heldout; of larger ones only the errors of matrices); --no-proof: write none",
    )
    proof.add_argument("--save-heldout", metavar="FILE", help="write the text that was measured on")
    parser.add_argument(
        "--save-plan", metavar="FILE", help="write the plan that was used, to edit and give back"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, then open the result once more to report what is in it."""
    import halfbyte
    from halfbyte.formats.container import File
    from halfbyte.runtime.model import weight_facts

    start = time.perf_counter()
    out = Path(args.out) if args.out is not None else default_out(args.source)
    plans: list[Any] = []
    with Progress("converting", quiet=args.quiet, lines=True) as progress:
        halfbyte.convert(
            args.source,
            out,
            recipe=args.recipe,
            tokenizer=args.tokenizer,
            context=args.context,
            calibrate=args.calibrate,
            method=args.method,
            smooth=args.smooth,
            rotate=args.rotate,
            plan=args.plan,
            save_plan=args.save_plan,
            target_bits=args.target_bits,
            max_bytes=args.max_bytes,
            max_kld=args.max_kld,
            heldout=args.heldout,
            proof=args.proof,
            save_heldout=args.save_heldout,
            max_memory=args.max_memory,
            on_plan=plans.append,
            progress=progress,
            note=progress.note,
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
                "plan": {row[0]: row[2] for row in plans[0].rows()},
            }
        )
    else:
        if file.metadata.get("general.recipe") == "plan":
            print_plan(plans[0])
        print(
            f"{printable(out)}: {size(facts['file_bytes'])}, {facts['bits_per_weight']:.2f} bits per weight,"
            f" {seconds:.1f} s"
        )
        if (proof := of_file(file)) is not None:
            print(f"{proof} (see halfbyte report)")
    if "TOKN" not in file.sections:
        print("no tokenizer was found: the model takes token ids only (see --tokenizer)", file=sys.stderr)
    return 0


def print_plan(plan: Any) -> None:
    """The table of a plan: columns of plain text in a pipe, drawn on a terminal."""
    header, right = plan.HEADER, " r rrrr"
    rows = [row if any(row[4:]) else row[:4] for row in plan.rows()]
    header = header[: max(map(len, rows))]
    rows = [(*row, *[""] * (len(header) - len(row))) for row in rows]
    if not sys.stdout.isatty():
        print_table(rows, header, right)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    drawn = Table()
    for name, side in zip(header, right):
        drawn.add_column(name, justify="right" if side == "r" else "left")
    for row in rows:
        drawn.add_row(*map(escape, map(printable, row)))
    Console().print(drawn)


def default_out(source: str) -> Path:
    """<name of the source>.hb in the current folder."""
    path = Path(source).resolve()
    name = path.name if path.is_dir() else path.stem
    if not name:
        raise UsageError(f"{source} has no name to call the file by; give -o FILE")
    return Path(f"{name}.hb")
