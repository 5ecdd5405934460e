"""Say what a machine will do with a file: memory, the largest context, expected tokens/s and what bounds them.

The machine is this one (measured in about a second, then remembered) or a profile of another. Without a FILE, a
model of --parameters at --bits is planned.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.cli.arguments import add_file, add_json, add_kv, number, whole
from halfbyte.runtime.cli.terminal import print_json, print_table, printable, size

HELP = "say what a machine will do with a .hb file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fit`."""
    add_file(parser, nargs="?")
    parser.add_argument(
        "--parameters", type=number, metavar="N", help="instead of a file: weights, such as 8e9"
    )
    parser.add_argument("--bits", type=number, metavar="B", help="bits a weight of --parameters")
    parser.add_argument(
        "--kv-values", type=whole(1), metavar="N", help="keys and values a token of --parameters (estimated)"
    )
    parser.add_argument(
        "--context", type=whole(1), metavar="N", help="tokens (default: 4096, or the model's if less)"
    )
    add_kv(parser)
    parser.add_argument(
        "--machine", metavar="PROFILE", help="a profile's name or .toml file (default: this machine)"
    )
    parser.add_argument("--fresh", action="store_true", help="measure this machine again")
    parser.add_argument("--list", action="store_true", help="list the profiles")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Compute and print."""
    from halfbyte.devices.fit import fit

    if args.list:
        _list(args.json)
        return 0
    load = _load(args)
    found = fit(load, _machine(args), args.context, args.kv)
    if args.json:
        print_json(found)
    else:
        _print(found)
    return 0


def _load(args: argparse.Namespace) -> Any:
    from halfbyte.devices.fit import of_file, of_size
    from halfbyte.formats.container import File

    planned = (args.parameters, args.bits, args.kv_values)
    if args.file is not None:
        if planned != (None, None, None):
            raise UsageError("give a file, or --parameters and --bits, not both")
        return of_file(File(args.file))
    if args.parameters is None or args.bits is None:
        raise UsageError("give a .hb file, or --parameters and --bits")
    return of_size(*planned)


def _machine(args: argparse.Namespace) -> Any:
    from halfbyte.devices.bandwidth import cached
    from halfbyte.devices.machine import load_profile, this_machine

    if args.machine is not None:
        if args.fresh:
            raise UsageError("--fresh measures this machine: leave --machine out")
        return load_profile(args.machine)
    if sys.stderr.isatty() and (args.fresh or cached() is None):  # a moving bar would disturb the measurement
        print("measuring this machine: a few seconds, once", file=sys.stderr, flush=True)
    return this_machine(args.fresh)


def _list(as_json: bool) -> None:
    from halfbyte.devices.machine import load_profile, profile_names

    machines = {name: load_profile(name) for name in profile_names()}
    if as_json:
        print_json({"profiles": {name: vars(m) for name, m in machines.items()}})
        return
    rows = [
        (name, size(m.memory), f"{m.bandwidth / 1e9:.1f} GB/s", f"{m.int8_peak / 1e9:.0f} GMAC/s", m.cpu)
        for name, m in machines.items()
    ]
    print_table(rows, ("profile", "for a model", "reads", "int8 peak", "processor"), " rrr")


def _print(found: dict[str, Any]) -> None:
    machine, memory = found["machine"], found["memory"]
    how = machine["source"] if machine["measured"] else "by profile"
    parts = ", ".join(f"{k} {size(memory[k])}" for k in ("weights", "kv", "activations", "overhead"))
    verdict = "fits" if found["fits"] else "does NOT fit"
    prefill = found["prefill_tokens_per_s"]
    rows = [
        ("model", found["load"]),
        ("machine", f"{machine['name']}: {machine['cpu']}"),
        (
            "speed",
            f"reads {machine['read_gb_per_s']:.1f} GB/s, int8 {machine['int8_gmac_per_s']:.0f} GMAC/s ({how})",
        ),
        ("context", f"{found['context']} tokens, kv {found['kv']}"),
        ("memory", f"{size(memory['needed'])} of {size(memory['available'])}: {verdict}"),
        ("", parts),
        ("largest", f"{found['largest_context']} tokens of context"),
    ]
    for d in found["decode"]:
        rate = "-" if d["tokens_per_s"] is None else f"about {d['tokens_per_s']:.3g} tokens/s"
        rows.append(
            ("decode", f"{rate} at depth {d['depth']}: {size(d['read_bytes'])} a token; bound: {d['bound']}")
        )
    rows.append(("prefill", "-" if prefill is None else f"about {prefill:.3g} tokens/s; bound: arithmetic"))
    for key, value in rows:
        print(f"{key:<8}  {printable(value)}")
