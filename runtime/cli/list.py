"""The models that were pulled, and with --known the names that can be."""

from __future__ import annotations

import argparse
from typing import Any

from halfbyte.runtime import library
from halfbyte.runtime.cli.arguments import add_json
from halfbyte.runtime.cli.terminal import print_json, print_table, size

HELP = "list the models that were pulled"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `list`."""
    parser.add_argument("--known", action="store_true", help="list the names that `pull` knows instead")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """A table, or JSON."""
    if args.known:
        if args.json:
            print_json(library.REPOSITORIES)
        else:
            print_table(list(library.REPOSITORIES.items()), ("name", "repository"))
        return 0
    rows: list[dict[str, Any]] = []
    for name in library.names():
        path, came = library.model_path(name), library.origin(name)
        rows.append(
            {
                "name": name,
                "file": str(path),
                "file_bytes": path.stat().st_size,
                "repository": came and came.repo,
                "commit": came and came.commit,
                "recipe": came and came.recipe,
            }
        )
    if args.json:
        print_json({"models": rows})
    elif rows:
        table = [
            (r["name"], size(r["file_bytes"]), r["recipe"] or "", r["repository"], (r["commit"] or "")[:8])
            for r in rows
        ]
        print_table(table, ("name", "size", "recipe", "repository", "commit"), " r")
    else:
        print(f"no models in {library.home() / 'models'}: halfbyte pull qwen3-0.6b fetches one")
    return 0
