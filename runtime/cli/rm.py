"""Delete a model that was pulled, and what was downloaded for it unless another model came of the same."""

from __future__ import annotations

import argparse
import shutil

from halfbyte.runtime import library
from halfbyte.runtime.cli.terminal import size

HELP = "delete a model that was pulled"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rm`."""
    parser.add_argument("names", nargs="+", metavar="NAME", help="a name of `halfbyte list`")
    parser.add_argument("--keep-download", action="store_true", help="delete the converted model only")


def run(args: argparse.Namespace) -> int:
    """Delete."""
    from halfbyte.runtime import hub

    for name in args.names:  # all before any is deleted
        library.model_path(name)
    for name in dict.fromkeys(args.names):
        came = library.origin(name)
        freed = library.remove(name)
        others = {o.repo for o in map(library.origin, library.names()) if o is not None}
        if came is not None and came.repo not in others and not args.keep_download:
            folder = hub.downloads(came.repo)
            freed += sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
            shutil.rmtree(folder, ignore_errors=True)
        print(f"{name}: deleted, {size(freed)} freed")
    return 0
