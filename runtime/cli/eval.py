"""Measure a file's quality on a text: perplexity and, against a second file, KL divergence."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from halfbyte.formats.errors import HalfbyteError, UsageError
from halfbyte.runtime.cli.arguments import add_backend, add_file, add_json, add_kv, whole
from halfbyte.runtime.cli.terminal import Progress, print_json, size

HELP = "measure quality on a text"
DEFAULT_CTX = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `eval`."""
    add_file(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="a UTF-8 text file")
    parser.add_argument(
        "--ctx",
        type=whole(2),
        metavar="N",
        help=f"tokens a window (default: {DEFAULT_CTX}, or the model's context if that is shorter)",
    )
    parser.add_argument("--against", metavar="REF", help="a .hb file to compare the predictions with")
    add_kv(parser)
    add_backend(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    from halfbyte.runtime.evaluate import evaluate
    from halfbyte.runtime.model import load, weight_facts

    text = read_text(args.text)
    model = load(args.file, args.backend, args.threads, args.kv)
    against = None if args.against is None else load(args.against, args.backend, args.threads, args.kv)
    longest = min(m.context_length for m in (model, against) if m is not None)
    ctx = min(DEFAULT_CTX, longest) if args.ctx is None else args.ctx
    with Progress("evaluating") as progress:
        found = evaluate(
            model, text, ctx=ctx, against=against, progress=lambda done, total: progress("", done, total)
        )
    if not abs(found["nll_per_token"]) < float("inf"):
        raise HalfbyteError(f"{args.file}: the model's output is not finite; run halfbyte check on the file")
    facts = weight_facts(model.file)
    result: dict[str, Any] = {"kld_mean": None, "kld_p99": None, "kld_max": None, "top1_agreement": None}
    result = {**found, **{k: found.get(k) for k in result}}
    result |= {k: facts[k] for k in ("bits_per_weight", "file_bytes")}
    result |= {"ctx": ctx, "kv": model.kv_mode, **model.backend.describe()}
    if args.json:
        print_json(result)
        return 0
    print(
        f"{result['tokens']} tokens, {result['nll_per_token']:.4f} nats per token,"
        f" perplexity {result['ppl']:.4g}"
    )
    if against is not None:
        print(
            f"against {args.against}: KL divergence mean {result['kld_mean']:.5f},"
            f" 99 % below {result['kld_p99']:.5f}, same first choice {result['top1_agreement']:.2%}"
        )
    print(f"{result['bits_per_weight']:.3f} bits per weight, {size(result['file_bytes'])}")
    return 0


def read_text(path: str) -> str:
    """A UTF-8 file. Raises UsageError where it is missing or something else."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from None
