"""Measure speed on this machine: prefill, decode, load time and memory. Medians of three."""

from __future__ import annotations

import argparse

from halfbyte.runtime.cli.arguments import add_backend, add_file, add_json, add_kv, whole
from halfbyte.runtime.cli.terminal import print_json, printable, size

HELP = "measure speed on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`."""
    add_file(parser)
    parser.add_argument(
        "-p", "--prompt", type=whole(0), default=512, metavar="N", help="tokens of prefill (default: 512)"
    )
    parser.add_argument(
        "-n", "--tokens", type=whole(1), default=64, metavar="N", help="tokens of decode (default: 64)"
    )
    parser.add_argument(
        "-d", "--depth", type=whole(0), default=0, metavar="N", help="tokens before both (default: 0)"
    )
    add_backend(parser, "-t")
    add_kv(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    from halfbyte.runtime.bench import bench

    found = bench(
        args.file,
        prompt=args.prompt,
        tokens=args.tokens,
        depth=args.depth,
        threads=args.threads,
        kv=args.kv,
        backend=args.backend,
    )
    if args.json:
        print_json(found)
        return 0
    after = f" after {args.depth}" if args.depth else ""
    if found["prefill_tokens_per_s"] is not None:
        print(f"prefill  {found['prefill_tokens_per_s']:9.1f} tokens/s  ({args.prompt} tokens{after})")
    print(f"decode   {found['decode_tokens_per_s']:9.1f} tokens/s  ({args.tokens} tokens{after})")
    print(
        f"reads    {found['read_gb_per_s']:9.2f} GB/s      ({size(found['weight_bytes_per_token'])} of weights"
        " a token)"
    )
    print(f"load     {found['load_ms']:9.1f} ms")
    print(f"memory   {found['peak_rss_mb']:9.1f} MiB at most")
    print(
        f"backend {found['backend']}, {found['threads']} threads, kv {found['kv']};"
        f" {printable(found['machine'])}; {found['commit']}"
    )
    return 0
