"""Download a model from the Hugging Face hub and convert it, to be used by its name from then on."""

from __future__ import annotations

import argparse
import shutil

from halfbyte.formats.errors import UsageError
from halfbyte.runtime import library
from halfbyte.runtime.cli.arguments import whole
from halfbyte.runtime.cli.terminal import Progress, printable, size

HELP = "download a model and convert it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pull`."""
    parser.add_argument(
        "repo",
        metavar="NAME|OWNER/REPO[:REVISION]",
        help="a known name such as qwen3-0.6b, or a repository; a revision is a branch, a tag or a commit",
    )
    parser.add_argument("--name", help="what to call it here (default: the repository's name in lower case)")
    parser.add_argument("--recipe", metavar="NAME", help="as of `convert` (default: q4, or keep)")
    parser.add_argument("--method", default="auto", metavar="NAME", help="as of `convert`")
    parser.add_argument("--context", type=whole(1, (1 << 31) - 1), metavar="N", help="as of `convert`")
    parser.add_argument(
        "--file", dest="gguf", metavar="NAME", help="one .gguf of the repository, instead of safetensors"
    )
    parser.add_argument("--force", action="store_true", help="convert again even if nothing changed")
    parser.add_argument("--discard", action="store_true", help="delete the download after the conversion")


def run(args: argparse.Namespace) -> int:
    """Fetch, convert, remember."""
    import halfbyte
    from halfbyte.runtime import hub

    name, repo, revision = library.repository(args.repo)
    if args.recipe and args.name is None:
        name += "-" + args.recipe.replace("+", "plus")
    name = args.name if args.name is not None else name
    out = library.model_path(name)
    before = library.origin(name) if out.is_file() else None
    if before is not None and before.repo != repo:
        raise UsageError(f"the name {name} is taken by {before.repo}; choose another with --name")
    with Progress("downloading") as progress:
        found = hub.fetch(repo, revision, args.gguf, progress)
    pulled = library.Pulled(repo, found.commit, args.recipe, args.method, args.gguf)
    if before == pulled and not args.force:
        print(f"{name} is up to date: {printable(out)}")
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with Progress("converting") as progress:
        halfbyte.convert(
            found.path, out, recipe=args.recipe, method=args.method, context=args.context, progress=progress
        )
    library.record(name, pulled)
    if args.discard:
        shutil.rmtree(hub.downloads(repo), ignore_errors=True)
    print(f"{name}: {size(out.stat().st_size)}, {printable(out)}")
    return 0
