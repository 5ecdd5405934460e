"""Measure what each kv mode costs on this model, store it in the file, and show what `--kv auto` picks."""

from __future__ import annotations

import argparse
import functools
import hashlib
from pathlib import Path
from typing import Any

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.cli.arguments import add_backend, add_json, whole
from halfbyte.runtime.cli.terminal import Progress, print_json, print_table, size

HELP = "measure the kv modes on a text, for --kv auto"
SHORT, LONG, TOKENS = 512, 4096, 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kv`."""
    parser.add_argument("file", help="a .hb file with a tokenizer")
    parser.add_argument("--text", required=True, metavar="FILE", help="a UTF-8 text file")
    parser.add_argument(
        "--modes", default="", metavar="LIST", help="names between spaces (default: all but f32)"
    )
    parser.add_argument(
        "--ctx", type=whole(2), metavar="N", help=f"the long context (default: {LONG}, or the model's)"
    )
    parser.add_argument(
        "--tokens", type=whole(2), default=TOKENS, metavar="N", help=f"of the text (default: {TOKENS})"
    )
    parser.add_argument("--no-store", action="store_true", help="only show; leave the file as it is")
    add_backend(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, store, print."""
    from halfbyte.formats import annotation, kv_gate, kv_modes
    from halfbyte.runtime.cli.eval import read_text
    from halfbyte.runtime.evaluate import cut, kv_divergence, windows
    from halfbyte.runtime.model import load

    text = read_text(args.text)
    model = load(args.file, args.backend, args.threads, "f32")
    names = args.modes.split() or [name for name in kv_modes.MODES if name != "f32"]
    for name in names:
        kv_modes.by_cache(name, len(model.file.caches))
    longest = min(args.ctx or LONG, model.context_length)
    if args.ctx and args.ctx > model.context_length:
        raise UsageError(f"--ctx {args.ctx}: the model's context is {model.context_length}")
    contexts = sorted({min(SHORT, longest), longest})
    parts = [cut(windows(model.tokenizer, text, ctx), args.tokens) for ctx in contexts]
    kld: dict[str, list[float]] = {n: [] for n in names}
    nll: dict[str, list[float]] = {n: [] for n in names}
    for ctx, some in zip(contexts, parts):
        count = sum(len(p) - 1 for p in some)
        with Progress(f"measuring at {ctx} tokens") as progress:
            values = kv_divergence(model, some, names, functools.partial(_show, progress, count))
        for n in names:
            kld[n].append(values[n][0])
            nll[n].append(values[n][1])
    found = kv_gate.annotate(
        Path(args.text).name, hashlib.sha256(text.encode()).hexdigest(), count, contexts, kld
    )
    if not args.no_store:
        annotation.rewrite_section(args.file, "KVMD", annotation.encode(found))
    sizes = {name: kv_gate.nbytes(model.file, name, longest) for name in ("f32", *names)}
    passing = [n for n in names if max(kld[n]) <= kv_gate.THRESHOLD] or ["f16"]
    choice = min(passing, key=lambda n: sizes.get(n, 0))
    if args.json:
        rows = [{"mode": n, "bytes": sizes[n], "kld": kld[n], "nll": nll[n]} for n in names]
        print_json(
            {
                "file": str(args.file),
                "ctx": contexts,
                "modes": rows,
                "auto": choice,
                "stored": not args.no_store,
            }
        )
        return 0
    rows_: list[tuple[Any, ...]] = [
        (
            n,
            f"{8 * sizes[n] / (sizes['f32'] / 4):.2f}",
            size(sizes[n]),
            *(f"{v:.5f}" for v in kld[n]),
            *(f"{v:.4f}" for v in nll[n]),
            "auto" if n == choice else "" if max(kld[n]) <= kv_gate.THRESHOLD else "fails",
        )
        for n in names
    ]
    heads = [f"KL at {c}" for c in contexts] + [f"nll at {c}" for c in contexts]
    print_table(rows_, ("mode", "bits", f"of {longest}", *heads, ""), " rr" + "r" * len(heads) + " ")
    print(
        f"{count} tokens; limit {kv_gate.THRESHOLD:g} nats per token" + ("" if args.no_store else "; stored")
    )
    return 0


def _show(progress: Progress, total: int, done: int) -> None:
    progress("", done, total)
