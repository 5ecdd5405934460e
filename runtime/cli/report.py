"""Show the proof in a file: how close it is to the float model, matrix by matrix and in its answers."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.formats.errors import FormatError
from halfbyte.runtime.cli.arguments import add_json
from halfbyte.runtime.cli.output import write_text
from halfbyte.runtime.cli.terminal import print_json, print_table, printable, size

if TYPE_CHECKING:
    from halfbyte.formats.container import File
    from halfbyte.formats.proof import Closeness, Proof

HELP = "show how close a .hb file is to its float model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `report`."""
    parser.add_argument("file", help="a .hb file")
    parser.add_argument("--html", metavar="OUT", help="write one self-contained page with plots instead")
    parser.add_argument("--matrices", action="store_true", help="a row for every matrix rather than layer")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print, or write the page."""
    from halfbyte.runtime.report import open_proof

    file, proof = open_proof(args.file)
    if args.html is not None:
        write_page(file, proof, Path(args.html), args.json)
    if args.json:
        print_json(facts(file, proof))
    elif args.html is None:
        _print(file, proof, args.matrices)
    return 0


def facts(file: File, proof: Proof) -> dict[str, Any]:
    """Everything `report --json` prints: the section PROF, and the file it is in."""
    return {
        "file": str(file.path),
        "file_bytes": len(file.bytes),
        "digest": file.digest.hex(),
        **asdict(proof),
    }


def of_file(file: File) -> str | None:
    """One line about the proof of a file, None where it has none; a damaged one does not make the file unreadable."""
    from halfbyte.formats.proof import read

    try:
        proof = read(file)
    except FormatError as error:
        return str(error).removeprefix(f"{file.path}: ")
    if proof is None:
        return None
    c = proof.closeness
    if c is None:
        return f"error {proof.error:.3g} of the weights; answers not measured: {proof.why_not or 'no reason given'}"
    return (
        f"KL divergence {c.kld_mean:.3g} from the float model, same first choice {c.top1_agreement:.1%},"
        f" on {c.tokens} tokens"
    )


def write_page(file: File, proof: Proof, out: Path, quiet: bool) -> None:
    """Write the page. Raises UsageError where that fails."""
    from halfbyte.runtime.report.page import page

    write_text(out, page(file, proof), file.path)
    if not quiet:
        print(f"{printable(out)}: {size(out.stat().st_size)}")


def _print(file: File, proof: Proof, matrices: bool) -> None:
    from halfbyte.runtime import report

    c = proof.closeness
    listed = [
        ("file", f"{file.path}, {size(len(file.bytes))}, {proof.bits:.3f} bits per weight"),
        ("made by", f"{proof.tool}, format {proof.format}"),
        ("source", f"{proof.source.get('format', '')} {proof.source.get('digest', '')}"),
        *((f"  {f.get('name')}", f"SHA-256 {f.get('sha256')}") for f in report.sources(proof)),
        *report.options(proof),
    ]
    if c is not None:
        listed += _measured(c)
    else:
        listed.append(("not measured", proof.why_not))
    width = max(len(printable(key)) for key, _ in listed)
    for key, value in listed:
        print(f"{printable(key):<{width}}  {printable(value)}".rstrip())
    if c is not None:
        print()
        _print_closeness(c)
    found = report.rows(file, proof)
    if not found:
        return
    print()
    if matrices:
        print_table(
            [(r.name, r.encoding, f"{r.bits:.3f}", f"{r.error:.4g}") for r in found],
            ("matrix", "encoding", "bits", "error"),
            "  rr",
        )
    else:
        print_table(
            [
                (
                    g.label,
                    _encodings(g),
                    f"{g.bits:.3f}",
                    f"{g.error:.4g}",
                    g.worst.kind if len(g.rows) > 1 else "",
                )
                for g in report.groups(found)
            ],
            ("layer", "encodings", "bits", "error", "largest in"),
            "  rr",
        )
    print(f"\nerror: |w - w_hat|^2 / |w|^2, of all matrices together {proof.error:.4g}")


def _measured(c: Closeness) -> list[tuple[str, str]]:
    digest = f", SHA-256 {c.sha256}" if c.sha256 else ""
    return [
        ("text", f"{c.text}{digest}"),
        ("", f"{c.tokens} tokens in windows of {c.ctx}"),
        ("arithmetic", f"{c.policy}; keys and values {c.kv}, of the float model {c.float_kv}"),
    ]


def _print_closeness(c: Closeness) -> None:
    print_table(
        [
            ("perplexity", f"{c.ppl:.5g}", f"{c.float_ppl:.5g}"),
            ("nats a token", f"{c.nll:.5g}", f"{c.float_nll:.5g}"),
        ],
        ("", "this file", "float model"),
        " rr",
    )
    print(
        f"\nKL divergence  mean {c.kld_mean:.5g}, 99 % below {c.kld_p99:.5g}, largest {c.kld_max:.5g} nats a token"
        f"\nfirst choice   the same for {c.top1_agreement:.2%} of the tokens"
    )


def _encodings(group: Any) -> str:
    return " ".join(dict.fromkeys(r.encoding for r in group.rows))
