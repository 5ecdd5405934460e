"""See it work without downloading anything: verify the built-in story model, tell a story."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import time
from pathlib import Path

from halfbyte.formats.errors import HalfbyteError
from halfbyte.runtime.cli.arguments import add_backend
from halfbyte.runtime.cli.run import stream
from halfbyte.runtime.cli.terminal import Progress, printable, size

HELP = "tell a story with a small built-in model"
FILE = "demo.hb"  # four bits, trained: see the README beside it
RECIPE, METHOD = "q4", "rtn"  # of --model: rounding to nearest takes a second, gptq some ten
PROMPT, TOKENS, TEMPERATURE, SEED = "Once upon a time", 200, 0.6, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `demo`."""
    parser.add_argument("--model", metavar="DIR", help="convert this checkpoint and run that instead")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="where the model goes (default: it stays where it is; --model: a cache folder)",
    )
    add_backend(parser)


def run(args: argparse.Namespace) -> int:
    """Verify, or first convert, then generate, and say what to try next."""
    from halfbyte.runtime.generate import generate
    from halfbyte.runtime.model import load

    out = None if args.out is None else Path(args.out)
    if args.model is not None:
        out, done = convert(Path(args.model), out)
    elif not (shipped := built_in_model() / FILE).is_file():
        raise HalfbyteError(f"the demo model is not at {shipped}; install halfbyte again")
    else:
        out, done = shipped if out is None else copy(shipped, out), ""
    model = load(out, args.backend, args.threads, verify=True)
    facts = model.facts()
    print(
        f"{printable(facts.get('general.parameters', '?'))} weights in {size(facts['file_bytes'])}"
        f" ({facts['bits_per_weight']:.2f} bits each){done}; every byte verified.\n"
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


def convert(source: Path, out: Path | None) -> tuple[Path, str]:
    """Convert a checkpoint to `out` or the cache folder: the file, and how long it took."""
    import halfbyte

    if not source.is_dir():
        raise HalfbyteError(f"there is no checkpoint at {source}")
    if out is None:
        out = default_out()
        out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with Progress("converting") as progress:
        halfbyte.convert(source, out, recipe=RECIPE, method=METHOD, progress=progress)
    return out, f", converted in {time.perf_counter() - start:.1f} s"


def copy(source: Path, out: Path) -> Path:
    """`out`, a copy of the file. Raises HalfbyteError."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        shutil.copyfile(source, aside)
        aside.replace(out)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise HalfbyteError(f"{out}: cannot write: {error.strerror or error}") from None
    return out


def built_in_model() -> Path:
    """The folder of the model that comes with the package: a checkpoint in floats, and the file FILE."""
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
