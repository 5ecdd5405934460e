"""List a file's program, one record a line: index, layer, op, what it writes, reads and multiplies by."""

from __future__ import annotations

import argparse
from typing import Any

from halfbyte.runtime.cli.arguments import add_file, add_json
from halfbyte.runtime.cli.terminal import print_json, print_table

HELP = "list the program of a .hb file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `explain`."""
    add_file(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the listing."""
    from halfbyte.formats.container import File

    rows = File(args.file).explain()
    if args.json:
        print_json({"records": rows})
    else:
        print_table(
            [_cells(row) for row in rows], ("addr", "layer", "op", "out", "in", "weights", "attrs"), "rr"
        )
    return 0


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    attrs = (f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in row["attrs"].items())
    return (
        row["index"],
        "-" if row["layer"] is None else row["layer"],
        row["op"],
        " ".join(row["out"]),
        " ".join(row["in"]),
        " ".join(row["weights"]),
        " ".join(attrs),
    )
