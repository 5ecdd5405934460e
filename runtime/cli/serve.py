"""Serve a model over HTTP, in OpenAI's dialect, with a chat page at /."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.cli.arguments import add_backend, add_draft, add_file, add_kv, add_policy, number, whole
from halfbyte.runtime.cli.terminal import printable

HELP = "serve a model over HTTP to any OpenAI client"
KEY = "HALFBYTE_API_KEY"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `serve`."""
    add_file(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument(
        "--port", type=whole(0, 65535), default=8080, help="default: 8080; 0 takes a free one"
    )
    parser.add_argument(
        "--name", metavar="NAME", help="what clients see as the model (default: the file's name)"
    )
    parser.add_argument("--api-key", metavar="KEY", help=f"clients must know it (default: ${KEY}, else none)")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name this machine is reached by"
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="a site whose pages may call; '*' is any",
    )
    parser.add_argument(
        "--slots", type=whole(1, 144), default=32, metavar="N", help="answers at once (default: 32)"
    )
    parser.add_argument(
        "--queue",
        type=whole(0, 100_000),
        default=128,
        metavar="N",
        help="requests that may wait (default: 128)",
    )
    parser.add_argument(
        "--kv-memory",
        type=size_of,
        metavar="SIZE",
        help="bytes of keys and values, such as 2G, with those of --draft (default: a quarter of what is free)",
    )
    parser.add_argument(
        "--prefix-share",
        type=number,
        default=0.5,
        metavar="X",
        help="part of it for remembered prompts (default: 0.5)",
    )
    parser.add_argument(
        "--lookup",
        type=whole(0, 64),
        default=8,
        metavar="N",
        help="guess up to N tokens a step from the text so far; 0 is off (default: 8)",
    )
    add_draft(parser)
    parser.add_argument(
        "--pooling",
        choices=("mean", "last"),
        default="mean",
        help="of embeddings, over positions (default: mean)",
    )
    parser.add_argument("--max-tokens", type=whole(1), metavar="N", help="tokens of an answer at most")
    parser.add_argument(
        "--max-body",
        type=size_of,
        default=4 << 20,
        metavar="SIZE",
        help="bytes of a request (default: 4 MiB)",
    )
    parser.add_argument(
        "--timeout",
        type=number,
        default=600.0,
        metavar="S",
        help="seconds of a request; 0 is no limit (default: 600)",
    )
    parser.add_argument(
        "--grace",
        type=number,
        default=5.0,
        metavar="S",
        help="seconds that answers have after a signal (default: 5)",
    )
    parser.add_argument("--verify", action="store_true", help="check every byte of the file first")
    add_backend(parser)
    add_kv(parser)
    add_policy(parser, "i8g32")


def size_of(text: str) -> int:
    """Bytes of '500M' or '2G'."""
    found = re.fullmatch(r"([0-9]{1,15})([kKmMgG]?)[bB]?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be bytes such as 500M or 2G, not {text!r}")
    return int(found[1]) * _UNITS[found[2].lower()]


def run(args: argparse.Namespace) -> int:
    """Load, listen, answer until a signal."""
    for name in ("timeout", "grace"):
        value = getattr(args, name)
        if not 0 <= value <= 10**7:
            raise UsageError(f"--{name} must be seconds, not {value}")
    key = args.api_key if args.api_key is not None else os.environ.get(KEY) or None
    if key is not None and not (key and key.isascii() and key.isprintable() and key.strip() == key):
        raise UsageError("the API key must be printable ASCII without spaces around it")
    try:
        from halfbyte.runtime.server import app, listen
    except ImportError as error:
        raise UsageError(f"the server needs {error.name}: pip install 'halfbyte[server]'") from None
    from halfbyte.runtime.model import load
    from halfbyte.runtime.server.engine import Engine
    from halfbyte.runtime.server.reply import Service

    model = load(args.file, args.backend, args.threads, args.kv, args.policy, args.verify)
    _ = model.tokenizer  # a model without one cannot be spoken to
    draft = None if args.draft is None else load(args.draft, args.backend, args.threads, args.kv, args.policy)
    listening = listen.bind(args.host, args.port)
    engine = Engine(
        model,
        slots=args.slots,
        queue=args.queue,
        memory=args.kv_memory,
        prefix_share=args.prefix_share,
        timeout=args.timeout or None,
        draft=draft,
    )
    try:
        name = args.name or Path(args.file).stem
        service = Service(model, name, args.max_tokens, args.lookup, min(16, args.slots))
        hosts = [*args.allow_host, args.host]
        application = app.create(
            engine,
            service,
            key=key,
            max_body=args.max_body,
            hosts=hosts,
            origins=args.allow_origin,
            pooling=args.pooling,
        )
        if key is None and not listen.is_loopback(args.host):
            print("warning: others can reach this address and there is no --api-key", file=sys.stderr)
        _say(listening, name)
        listen.server(application, engine, args.grace).run(sockets=[listening])
    finally:
        engine.close()
        listening.close()
    return 0


def _say(listening: Any, name: str) -> None:
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"{printable(name)} at http://{host}:{port} (Ctrl-C ends it)", file=sys.stderr, flush=True)
