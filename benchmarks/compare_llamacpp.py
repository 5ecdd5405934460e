"""halfbyte beside llama.cpp: same shapes, same machine, same minutes.

    python benchmarks/compare_llamacpp.py [--config DIR ...] [--types Q4_K_M,Q4_0,Q8_0] [--depths 0,2048,8192]
        [--threads 2] [--rounds 3] [--cache f16,q8_0] [--flash auto,off] [--python PEER/bin/python] [--json OUT]

The peer is llama-cpp-python built from source, driven below its Python model class: llama_decode on batches,
n_ubatch 512, weights mapped, repacked at load (its default), flash attention `auto` (which is on) or as asked.
`--python` names an interpreter that has llama_cpp and gguf, so that this project's environment needs neither:

    python -m venv PEER; PEER/bin/pip install --no-binary llama-cpp-python llama-cpp-python gguf

and for a forced AVX2 comparison (with `--isa avx2` here) the same under
CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON".
`--prepare` makes the models and the filled caches beforehand; that takes minutes and no quiet machine.
"""

from __future__ import annotations

import argparse
import sys

import compare
import compare_shapes
from compare import Variant
from compare_shapes import FOLDER, Shape

from halfbyte.formats.errors import UsageError

ENGINE = str(FOLDER / "engine_llamacpp.py")
CACHES, FLASH = ("f16", "bf16", "f32", "q8_0", "q4_0", "q5_0", "q5_1", "q4_1"), ("auto", "on", "off")


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    compare.add_arguments(p)
    p.add_argument(
        "--types", type=compare.names, default=["Q4_K_M", "Q4_0", "Q8_0"], help="of llama-quantize"
    )
    p.add_argument("--cache", type=compare.names, default=["f16"], help="types of keys and values")
    p.add_argument("--flash", type=compare.names, default=["auto"], help="flash attention: auto, on, off")
    p.add_argument("--python", default=sys.executable, help="the peer's interpreter")
    return p


def gguf(args: argparse.Namespace, shape: Shape, name: str) -> str:
    """The peer's file of one type, from the checkpoint's bf16 weights."""
    source, out = shape.folder / "bf16.gguf", shape.folder / f"{name}.gguf"
    if not out.exists():
        compare_shapes.write_aside(
            source,
            lambda part: compare_shapes.call(
                [args.python, ENGINE, "--gguf", str(shape.checkpoint), str(part)]
            ),
        )
    command = [args.python, ENGINE, "--quantize", str(source)]
    compare_shapes.write_aside(
        out, lambda part: compare_shapes.call([*command, str(part), name, str(args.threads)])
    )
    return str(out)


def peers(args: argparse.Namespace, shape: Shape) -> list[Variant]:
    """One variant a type, cache and flash attention; and, for cold start, the first type mapped without repacking."""
    for what, given, known in (("--cache", args.cache, CACHES), ("--flash", args.flash, FLASH)):
        if not given or set(given) - set(known):
            raise UsageError(f"{what} must be of {', '.join(known)}")
    if not args.types:
        raise UsageError("--types names none")
    out = []
    for name in args.types:
        path = gguf(args, shape, name)
        for cache in args.cache:
            for flash in args.flash:
                if flash == "off" and cache.startswith("q"):
                    continue  # llama.cpp needs flash attention for quantised values
                title = " ".join(
                    ["llama.cpp", name, *([f"kv {cache}"] if cache != "f16" else [])]
                    + ([f"flash {flash}"] if flash != "auto" else [])
                )
                options = {
                    "path": path, "threads": args.threads, "cache": cache, "flash": flash,
                    "states": str(shape.folder / "llamacpp-states"),
                }  # fmt: skip
                out.append(Variant(title, [args.python, ENGINE], options))
    if not out:
        raise UsageError("a quantised --cache needs flash attention: add auto or on to --flash")
    first = out[0]
    out.append(
        Variant(f"{first.name} mapped", first.command, {**first.options, "repack": False}, cold_only=True)
    )
    return out


if __name__ == "__main__":
    compare.main(lambda: compare.run(parser().parse_args(), "halfbyte and llama.cpp", peers))
