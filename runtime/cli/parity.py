"""Hold one backend against another on a file: op by op, and in free running over a text.

Exit status 1 when a bound is exceeded. The bound of the two policies is part of the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.cli.arguments import add_file, whole
from halfbyte.runtime.cli.output import write_text
from halfbyte.runtime.cli.terminal import Progress, print_json, print_table, printable

HELP = "compare two backends or policies on a file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `parity`."""
    add_file(parser)
    parser.add_argument("--a", default="native", metavar="NAME", help="the backend to compare with (native)")
    parser.add_argument("--b", default="cuda", metavar="NAME", help="the backend that is compared (cuda)")
    parser.add_argument(
        "--policy", default="i8g32", metavar="NAME", help="of both: f32, i8g32, bf16 or f8 (i8g32)"
    )
    parser.add_argument("--policy-a", metavar="NAME", help="of a alone")
    parser.add_argument("--policy-b", metavar="NAME", help="of b alone")
    parser.add_argument("--kv", default="f16", metavar="MODE", help="stored keys and values of both (f16)")
    parser.add_argument("--text", metavar="FILE", help="what both read (default: random tokens)")
    parser.add_argument(
        "--tokens", type=whole(2, 1 << 20), default=256, metavar="N", help="of it, at most (256)"
    )
    parser.add_argument(
        "-n", "--steps", type=whole(1, 1 << 20), default=64, metavar="N", help="decoded tokens (64)"
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of random tokens (0)")
    parser.add_argument("--threads", type=whole(1, 1024), metavar="N", help="default: all processors")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON to a file, or to stdout"
    )
    parser.add_argument("--plot", metavar="FILE", help="write the errors as an SVG picture")


def run(args: argparse.Namespace) -> int:
    """Compare and print."""
    from halfbyte.runtime.backends import backend_class
    from halfbyte.runtime.cli.eval import read_text
    from halfbyte.runtime.parity import BOUNDS, compare

    sides = (args.a, args.policy_a or args.policy), (args.b, args.policy_b or args.policy)
    known = sorted({p for pair in BOUNDS for p in pair})
    for backend, policy in sides:
        if policy not in known:
            raise UsageError(f"unknown arithmetic policy {policy!r}; there are {', '.join(known)}")
        backend_class(backend)
    text = None if args.text is None else read_text(args.text)
    with Progress("comparing") as progress:
        found = compare(
            args.file, *sides, kv=args.kv, text=text, tokens=args.tokens, steps=args.steps, seed=args.seed,
            threads=args.threads, progress=lambda part: progress(part, 0, 1),
        )  # fmt: skip
    if args.plot:
        from halfbyte.runtime.report.parity import picture

        write_text(Path(args.plot), picture(found), args.file)
    if args.json == "-":
        print_json(found)
        return 0 if found["ok"] else 1
    if args.json:
        import json

        write_text(Path(args.json), json.dumps(found, indent=1) + "\n", args.file)
    names = [f"{backend} {policy}" for backend, policy in sides]
    print(
        f"{printable(args.file)}: {names[1]} against {names[0]}, {found['tokens']} tokens, kv {found['kv']}"
    )
    print_table(
        [(o["op"], o["encoding"], o["records"], f"{o['worst']:.2g}", o["where"]) for o in found["lockstep"]],
        ("op", "encoding", "records", "worst", "at"),
        "  rrr",
    )
    print_table(
        [(w["record"], w["op"], w["tensor"], f"{w['error']:.2g}") for w in found["worst"]],
        ("worst record", "op", "tensor", "error"),
        "r  r",
    )
    print_table(
        [
            (name, f"{c['value']:.3g}", f"{c['bound']:.3g}", "ok" if c["ok"] else "EXCEEDED")
            for name, c in found["checks"].items()
        ],
        ("check", "value", "bound", "outcome"),
        " rr ",
    )
    where = found["first_divergence"]
    agreed = (
        f"all {found['greedy_tokens']}" if where is None else f"the first {where} of {found['greedy_tokens']}"
    )
    print(f"greedy decoding: {agreed} tokens agree; top-1 {100 * found['top1_agreement']:.1f} %")
    print(f"bound: {found['bound']['why']}")
    return 0 if found["ok"] else 1
