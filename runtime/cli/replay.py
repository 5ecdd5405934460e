"""Answer every line of a log again and compare: tokens, and the state that they came from, bit for bit.

Exit status 1 when a line differs or was changed.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from halfbyte.runtime.cli.arguments import add_json
from halfbyte.runtime.cli.terminal import Progress, print_json, printable

if TYPE_CHECKING:
    from halfbyte.runtime.model import Model

HELP = "answer the lines of an answer log again, and compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `replay`."""
    parser.add_argument("log", help="a file that `run --log` or an app wrote")
    parser.add_argument("--model", metavar="FILE", help="the model (default: where the log says that it was)")
    parser.add_argument("--backend", metavar="NAME", help="default: that of each line")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all processors")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Replay and print."""
    from dataclasses import asdict

    from halfbyte.formats.errors import UsageError
    from halfbyte.runtime.library import find
    from halfbyte.runtime.model import load
    from halfbyte.runtime.replay import replay

    models: dict[tuple[Any, ...], Model] = {}

    def model_of(record: dict[str, Any]) -> Model:
        path = args.model or record.get("file", "")
        if not path:
            raise UsageError("the log does not say where the model is: give --model FILE")
        key = (path, args.backend or record["backend"], record["kv"], record["policy"])
        if key not in models:
            models[key] = load(find(path), key[1], args.threads, key[2], key[3], verify=not models)
        return models[key]

    with Progress("replaying") as progress:
        outcomes, chain = replay(args.log, model_of, lambda done, total: progress("", done, total))
    differ = [o for o in outcomes if not o.same]
    if args.json:
        lines = [asdict(o) for o in outcomes]
        print_json({"log": str(args.log), "ok": not differ, "lines": lines, "chain": chain})
        return 1 if differ else 0
    for o in outcomes:
        if o.why:
            print(f"line {o.line}: {o.why}")
    tokens = sum(o.tokens for o in outcomes if o.same)
    same = len(outcomes) - len(differ)
    print(f"{printable(args.log)}: {same} of {len(outcomes)} answers are the same ({tokens} tokens)")
    print(f"last chain {chain}")
    return 1 if differ else 0
