"""Check a file and this machine: every byte against its digest, then a backend against the reference.

The backend runs op by op beside the reference on the same inputs. Exit status 1 when any op is off by
more than rounding explains.
"""

from __future__ import annotations

import argparse

from halfbyte.runtime.cli.arguments import add_backend, add_file, add_json, add_policy
from halfbyte.runtime.cli.terminal import Progress, print_json, print_table, printable, size

HELP = "verify a .hb file and compare a backend with the reference"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `check`."""
    add_file(parser)
    add_backend(parser)
    add_policy(parser, "all")
    parser.add_argument(
        "--kv", default="f32", metavar="MODE", help="of the caches that are compared (default: f32)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Digests first: comparing damaged weights would say nothing."""
    from halfbyte.formats.container import File
    from halfbyte.runtime.backends import backend_class
    from halfbyte.runtime.lockstep import lockstep

    kind = backend_class(args.backend)
    backend = kind.name
    file = File(args.file)
    total, done = sum(t.nbytes for t in file.tensors), 0
    with Progress("verifying") as progress:

        def verified(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress("", done, total)

        file.verify(verified)
    outcomes = []
    for policy in kind.policies if args.policy is None else (args.policy,):
        with Progress(f"{backend} under {policy}") as progress:
            found = lockstep(file, backend, policy, threads=args.threads, progress=progress, kv=args.kv)
        outcomes += [{"policy": policy, **outcome.as_dict()} for outcome in found]
    ok = all(outcome["ok"] for outcome in outcomes)
    if args.json:
        print_json({"file": str(args.file), "backend": backend, "ok": ok, "outcomes": outcomes})
        return 0 if ok else 1
    print(f"{printable(args.file)}: all digests match ({size(len(file.bytes))})")
    print_table(
        [
            (
                o["policy"],
                o["op"],
                o["encoding"],
                o["records"],
                f"{o['worst']:.2g}",
                f"{o['tolerance']:.2g}",
                o["where"],
                "ok" if o["ok"] else "WRONG",
            )
            for o in outcomes
        ],
        ("policy", "op", "encoding", "records", "worst", "allowed", "at", "outcome"),
        "   rrrr",
    )
    wrong = sum(not o["ok"] for o in outcomes)
    print(f"{backend}: {'every op agrees with the reference' if ok else f'{wrong} outcomes are wrong'}")
    return 0 if ok else 1
