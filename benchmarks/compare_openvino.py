"""halfbyte beside OpenVINO: same shapes, same machine, same minutes.

    python benchmarks/compare_openvino.py [--config DIR ...] [--types int4-g64,int4-g128,int8] [--precision ,f32]
        [--depths 0,2048,8192] [--threads 2] [--rounds 3] [--python PEER/bin/python] [--json OUT]

What is measured is OpenVINO's CPU runtime on the stateful model that GenAI's stateful pipeline runs: infer requests
with the prompt in one piece and then token by token, logits of the last token only, compiled for latency with the
defaults that OpenVINO chooses on this machine (dynamic quantisation of activations in groups of 32, keys and values
in 8 bits, bf16 where the processor has it; the record has what it chose). `--precision f32` adds a column with
that inference precision. It is not GenAI's paged attention pipeline. The model is made by openvino_ir.py.

    python -m venv PEER; PEER/bin/pip install openvino
"""

from __future__ import annotations

import argparse
import sys

import compare
import compare_shapes
from compare import Variant
from compare_shapes import FOLDER, Shape

from halfbyte.formats.errors import UsageError

ENGINE = str(FOLDER / "engine_openvino.py")
DEFAULT = "default"
PRECISIONS = (DEFAULT, "f32", "bf16", "f16")


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    compare.add_arguments(p)
    p.add_argument("--types", type=compare.names, default=["int4-g64", "int8"], help="see openvino_ir.py")
    p.add_argument("--precision", type=compare.names, default=[DEFAULT], help=f"of {', '.join(PRECISIONS)}")
    p.add_argument("--python", default=sys.executable, help="the peer's interpreter")
    return p


def peers(args: argparse.Namespace, shape: Shape) -> list[Variant]:
    """One variant a type and inference precision."""
    if not args.types:
        raise UsageError("--types names none")
    if not args.precision or set(args.precision) - set(PRECISIONS):
        raise UsageError(f"--precision must be of {', '.join(PRECISIONS)}")
    out = []
    for name in args.types:
        path = shape.folder / f"openvino-{name}"
        command = [args.python, ENGINE, "--ir", str(shape.checkpoint)]
        compare_shapes.write_aside(
            path, lambda part, c=command, n=name: compare_shapes.call([*c, str(part), n])
        )
        for precision in args.precision:
            chosen = "" if precision == DEFAULT else precision
            options = {"path": str(path), "threads": args.threads, "precision": chosen}
            title = " ".join(["OpenVINO", name, *([chosen] if chosen else [])])
            out.append(Variant(title, [args.python, ENGINE], options))
    return out


if __name__ == "__main__":
    compare.main(lambda: compare.run(parser().parse_args(), "halfbyte and OpenVINO", peers))
