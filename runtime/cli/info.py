"""Show what a .hb file holds. Opening it checks everything but the bytes of the weights."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from halfbyte.runtime.cli.arguments import add_file, add_json
from halfbyte.runtime.cli.terminal import print_json, print_table, printable, size

if TYPE_CHECKING:
    from halfbyte.formats.container import File

HELP = "show what a .hb file holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `info`."""
    add_file(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the facts."""
    from halfbyte.formats.container import File

    found = facts(File(args.file))
    if args.json:
        print_json(found)
    else:
        _print(found)
    return 0


def facts(file: File) -> dict[str, Any]:
    """Everything `info --json` prints; sizes in bytes."""
    from halfbyte.runtime.cli.report import of_file
    from halfbyte.runtime.model import weight_facts

    values = sum(int(c["kv_heads"]) * (int(c["k_dim"]) + int(c["v_dim"])) for c in file.caches)
    return {
        "path": str(file.path),
        "format_version": ".".join(map(str, file.version)),
        **weight_facts(file),
        "metadata": dict(file.metadata),
        "sections": [{"kind": k, "offset": o, "bytes": n} for k, (o, n, _) in file.sections.items()],
        "tensors": len(file.tensors),
        "program_records": len(file.program),
        "kv_values_per_token": values,
        "kv_modes": kv_facts(file),
        "tokenizer": "TOKN" in file.sections,
        "chat_template": "TMPL" in file.sections,
        "proof": of_file(file),
    }


def kv_facts(file: File) -> list[dict[str, Any]]:
    """Every kv mode: bits a value as stored, bytes a token, the measured KL or None, whether `auto` picks it."""
    from halfbyte.formats import kv_gate, kv_modes

    known, automatic, out = kv_gate.measured(file), kv_gate.automatic(file), []
    values = sum(int(c["kv_heads"]) * (int(c["k_dim"]) + int(c["v_dim"])) for c in file.caches)
    for name in dict.fromkeys((*kv_modes.MODES, *known, automatic)):
        page = kv_gate.nbytes(file, name, 2 * kv_modes.PAGE) - kv_gate.nbytes(file, name, kv_modes.PAGE)
        token = page / kv_modes.PAGE
        bits = 8 * token / values if values else 0.0
        facts = {"mode": name, "bits_per_value": bits, "bytes_per_token": token, "kld": known.get(name)}
        out.append({**facts, "auto": name == automatic})
    return out


def _mode(facts: dict[str, Any]) -> str:
    kld = "" if facts["kld"] is None else f", KL {facts['kld']:.5f}"
    return f"{facts['bits_per_value']:.3f} bits, {size(facts['bytes_per_token'])} a token{kld}" + (
        ", auto" if facts["auto"] else ""
    )


def _print(found: dict[str, Any]) -> None:
    yes = {True: "yes", False: "no"}
    rows = [
        ("file", found["path"]),
        ("format", f"halfbyte {found['format_version']}"),
        ("size", f"{size(found['file_bytes'])} ({found['file_bytes']} bytes)"),
        ("digest", found["digest"]),
        ("bits per weight", f"{found['bits_per_weight']:.3f} over {found['matrix_weights']} matrix weights"),
        ("read per token", size(found["weight_bytes_per_token"])),
        ("keys and values", f"{found['kv_values_per_token']} numbers a token"),
        *((f"  {m['mode']}", _mode(m)) for m in found["kv_modes"] if found["kv_values_per_token"]),
        ("program", f"{found['program_records']} records, {found['tensors']} tensors"),
        ("tokenizer", yes[found["tokenizer"]]),
        ("chat template", yes[found["chat_template"]]),
        ("proof", found["proof"] or "none"),
        *((key, _short(value)) for key, value in found["metadata"].items()),
    ]
    width = max(len(printable(key)) for key, _ in rows)
    for key, value in rows:
        print(f"{printable(key):<{width}}  {printable(value)}")
    print()
    print_table(
        [
            (name, e["tensors"], e["weights"], e["bytes"], f"{e['bits_per_weight']:.3f}")
            for name, e in found["encodings"].items()
        ],
        ("encoding", "tensors", "weights", "bytes", "bits/weight"),
        " rrrr",
    )
    print()
    print_table(
        [(s["kind"], s["offset"], s["bytes"]) for s in found["sections"]],
        ("section", "offset", "bytes"),
        " rr",
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
