"""See it work without downloading anything: convert the built-in story model, verify it, tell a story."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from pathlib import Path

from halfbyte.formats.errors import HalfbyteError
from halfbyte.runtime.cli.arguments import add_backend
from halfbyte.runtime.cli.run import stream
from halfbyte.runtime.cli.terminal import Progress, printable, size

HELP = "convert a small built-in model and tell a story"
RECIPE, METHOD = "q4", "rtn"  # rounding to nearest takes a second, gptq some ten
PROMPT, TOKENS, TEMPERATURE, SEED = "Once upon a time", 200, 0.6, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `demo`."""
    parser.add_argument("--out", metavar="FILE", help="where the model goes (default: a cache folder)")
    parser.add_argument("--model", metavar="DIR", help=argparse.SUPPRESS)
    add_backend(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, verify, generate, and say what to try next."""
    import halfbyte
    from halfbyte.runtime.generate import generate
    from halfbyte.runtime.model import load

    source = built_in_model() if args.model is None else Path(args.model)
    if not source.is_dir() or (args.model is None and not (source / "config.json").is_file()):
        raise HalfbyteError(f"the demo model is not at {source}; install halfbyte again")
    out = default_out() if args.out is None else Path(args.out)
    if args.out is None:
        out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with Progress("converting") as progress:
        halfbyte.convert(source, out, recipe=RECIPE, method=METHOD, progress=progress)
    seconds = time.perf_counter() - start
    model = load(out, args.backend, args.threads, verify=True)
    facts = model.facts()
    print(
        f"Converted {printable(facts.get('general.parameters', '?'))} weights to {size(facts['file_bytes'])}"
        f" ({facts['bits_per_weight']:.2f} bits each) in {seconds:.1f} s; every byte verified.\n"
    )
    print(PROMPT, end="", flush=True)
    ids = model.tokenizer.encode(PROMPT, special=False)
    stream(generate(model, ids, max_tokens=TOKENS, temperature=TEMPERATURE, seed=SEED))
    path = shlex.quote(str(out))
    prompt = min(256, model.context_length // 2)
    print(
        "\nTry next:\n"
        f'  halfbyte run {path} -p "One day, a little girl" --raw --temp 0.6 --seed 7\n'
        f"  halfbyte check {path}\n"
        f"  halfbyte bench {path} -p {prompt} -n {min(64, prompt)}"
    )
    return 0


def built_in_model() -> Path:
    """The folder of the model that comes with the package."""
    import halfbyte.runtime

    return Path(next(iter(halfbyte.runtime.__path__))) / "demo_model"


def default_out() -> Path:
    """demo.hb in this user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "halfbyte" / "demo.hb"
    try:
        return Path.home() / ".cache" / "halfbyte" / "demo.hb"
    except RuntimeError:
        raise HalfbyteError("this user has no home folder; give --out FILE") from None
