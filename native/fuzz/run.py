"""Builds the fuzz targets with Clang and runs each for some time: `make fuzz SECONDS=1800`.

New inputs are kept in build/fuzz/<target>/corpus; the seeds are the golden files and sessions of a small model. Exits
with 1 at the first finding, whose input libFuzzer leaves beside the corpus.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from halfbyte.runtime.model import load

NATIVE = Path(__file__).resolve().parents[1]
GOLDEN = NATIVE.parent / "tests" / "formats"
FOLDER = NATIVE.parent / "build" / "fuzz"
FLAGS = ["-std=gnu11", "-O1", "-g1", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all",
         "-fno-sanitize=pointer-overflow",  # NULL + 0, which C2y defines; what is read is AddressSanitizer's to judge
         "-D_GNU_SOURCE", "-DHB_X86=0", "-DHB_ARM=0", "-DHB_AVXVNNI=0", "-ffp-contract=off"]  # fmt: skip


def build(target: str) -> Path:
    """The library's scalar half and one target as a program."""
    folder = FOLDER / target
    folder.mkdir(parents=True, exist_ok=True)
    sources = [
        *(NATIVE / "src").glob("*.c"),
        *(NATIVE / "kernels").glob("*/*_scalar.c"),
        NATIVE / "fuzz" / f"{target}.c",
    ]
    includes = [f"-I{NATIVE / part}" for part in ("include", ".", "src")]
    program = folder / target
    newest = max(p.stat().st_mtime for p in NATIVE.rglob("*") if p.suffix in (".c", ".h", ".inc"))
    if not program.exists() or program.stat().st_mtime < newest:
        command = ["clang", *FLAGS, *includes, *map(str, sources), "-lm", "-lpthread", "-o", str(program)]
        subprocess.run(command, check=True)
    return program


def seeds(target: str, corpus: Path) -> dict[str, str]:
    """Writes the first inputs; what the environment of the target needs."""
    corpus.mkdir(parents=True, exist_ok=True)
    if target == "fuzz_open":
        for path in (*(GOLDEN / "golden").glob("*.hb"), *(GOLDEN / "golden_errors").glob("*.hb")):
            (corpus / path.name).write_bytes(path.read_bytes())
        return {}
    if target == "fuzz_session":
        sys.path += [str(NATIVE.parent / "tests" / part) for part in ("converter", "runtime")]
        from story import story_folder

        import halfbyte

        model = corpus.parent / "model.hb"
        halfbyte.convert(story_folder(corpus.parent / "story"), model, recipe="q4")
        session = load(model, kv="tq3").session()
        for n in (1, 60, 20):
            session.feed(np.arange(n) % 300)
            session.save(corpus / f"{session.position}")
        return {"HB_FUZZ_MODEL": str(model)}
    return {}


def main(seconds: int, targets: list[str]) -> int:
    """Run targets, by default all; 1 when one finds something."""
    for target in targets or sorted(p.stem for p in (NATIVE / "fuzz").glob("fuzz_*.c")):
        program, corpus = build(target), FOLDER / target / "corpus"
        environment = {**os.environ, **seeds(target, corpus)}
        command = [
            program,
            f"-max_total_time={seconds}",
            "-max_len=65536",
            "-timeout=20",
            "-print_final_stats=1",
            corpus,
        ]
        done = subprocess.run(command, env=environment, cwd=program.parent, stderr=subprocess.PIPE, text=True)
        stats = [line for line in done.stderr.splitlines() if "stat::" in line or "cov:" in line][-4:]
        print(
            target,
            "clean" if done.returncode == 0 else f"FOUND SOMETHING\n{done.stderr[-4000:]}",
            *stats,
            sep="\n  ",
        )
        if done.returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
