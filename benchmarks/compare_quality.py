"""Quality at its size, beside llama.cpp's types: bits, bytes, nll, KL and top-1 against the float model.

    python benchmarks/compare_quality.py DATA [--models reference-7m ...] [--python PEER/bin/python] [--policy f32]
        [--auto-round PEER/bin/python] [--only ROW ...] [--also NAME=CHECKPOINT ...]

DATA is the folder of real models and texts; models, texts and the split between calibration and test are those of
`methods.py`. All files, the peer's included, run here under one policy, so that only the weights differ: llama.cpp
quantises a GGUF of the same weights (`--python` names an interpreter that has llama_cpp and gguf; without it its rows
are left out), and the importer takes its codes over exactly. Its importance matrix holds the mean squares of the
inputs of every matrix but the embedding, as llama-imatrix's does, on the whole calibration text; ours see at most 64
windows of that text (`+ text`), or by default text of the model's own and the built-in mix. `pure` is one type for
every matrix, else the type's mixture. Types whose blocks do not fit a matrix's width are replaced by llama.cpp.
`--auto-round` names an interpreter that has auto-round: it learns 4-bit integers on the windows that `+ text` sees,
with 200 iterations (Hugging Face folders only); its codes are kept, and the embedding, which it leaves alone, is
rounded to q4 by us. `allocated` is `--target-bits` at the bits of the uniform recipe. `--also` adds other checkpoints
of the model. Bits and bytes are of the matrices as stored, padding included.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from methods import MODELS, Bench, Inputs

import halfbyte
from halfbyte.converter.builder import Matrix
from halfbyte.converter.calibrate import SEQUENCES, Calibration
from halfbyte.converter.calibration.statistics import Statistics
from halfbyte.converter.checkpoints.bounded_file import BoundedFile
from halfbyte.converter.checkpoints.gguf_file import GGUFFile
from halfbyte.converter.weights import Weights
from halfbyte.formats.errors import HalfbyteError
from halfbyte.runtime.bench import commit, machine_name
from halfbyte.runtime.evaluate import evaluate

ENGINE = Path(__file__).with_name("engine_llamacpp.py")
LEARNER = Path(__file__).with_name("engine_auto_round.py")
BASE = "Q4_0 imatrix"  # what the last column divides by

# GGUF's names of what our programs hold as one matrix of several.
PARTS = {
    "self_attn.qkv": ("attn_q", "attn_k", "attn_v"),
    "self_attn.o_proj": ("attn_output",),
    "mlp.gate_up": ("ffn_gate", "ffn_up"),
    "mlp.down_proj": ("ffn_down",),
}


@dataclass(frozen=True)
class Peer:
    """One of llama.cpp's types."""

    type: str
    imatrix: bool = True
    pure: bool = False

    @property
    def name(self) -> str:
        """The row's."""
        return self.type + " pure" * self.pure + " imatrix" * self.imatrix


@dataclass(frozen=True)
class Ours:
    """One of our recipes; `like` allocates at the bits of another row instead."""

    recipe: str = ""
    text: bool = False
    method: str = "auto"
    like: str = ""

    @property
    def name(self) -> str:
        """The row's."""
        what = self.recipe or f"allocated, bits of {self.like.removesuffix(' + text')}"
        return what + (f" {self.method}" if self.method != "auto" else "") + " + text" * self.text


@dataclass(frozen=True)
class Learned:
    """AutoRound's 4-bit integers in groups."""

    group: int

    @property
    def name(self) -> str:
        """The row's."""
        return f"auto-round g{self.group} + text"


LEARNED = (Learned(32), Learned(64))
PEERS = (
    Peer("Q4_0"),
    Peer("Q4_0", imatrix=False),
    *(Peer(t) for t in ("Q4_1", "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q3_K_M", "Q5_K_M", "Q6_K")),
    *(Peer(t, pure=True) for t in ("Q4_0", "Q4_K_M", "IQ4_NL", "IQ4_XS", "Q3_K_M")),
)
OURS = (
    Ours("q3", text=True),
    Ours("q4-", method="rtn"),
    Ours("q4-"),
    Ours("q4-", text=True),
    Ours("q4"),
    Ours("q4", text=True),
    Ours("q4", method="rtn"),
    *(Ours("q4", text=True, method=m) for m in ("rtn", "awq", "autoround")),
    Ours("q4+"),
    Ours("q4+", text=True),
    Ours("q5", text=True),
    Ours("q6", text=True),
    Ours("q8", method="rtn"),
    Ours(like="q3 + text", text=True),
    Ours(like="q4-"),
    Ours(like="q4- + text", text=True),
    Ours(like="q4"),
    Ours(like="q4 + text", text=True),
    Ours(like="q5 + text", text=True),
)


class Quality(Bench):
    """The rows of one model."""

    def __init__(self, data: Path, name: str, folder: Path, python: str, learner: str, policy: str):
        super().__init__(Inputs.of(data, name), folder)
        self.python, self.learner, self.policy = python, learner, policy
        self.reference = halfbyte.load(self.reference.file.path, policy="f32", kv="f32")
        self.calibrate = folder / "calibration.txt"
        self.calibrate.write_text(self.calibration_text)
        self.gguf = data / "stories260K/stories260K.gguf"
        self.bits: dict[str, float] = {}
        self.base: float | None = None
        if python and self.source.is_dir():
            self.gguf = folder / "float.gguf"
            self.peer(self.python, ENGINE, "--gguf", str(self.source), str(self.gguf))
        if python:
            np.savez(folder / "imatrix.npz", **self.importance())  # type: ignore[arg-type]

    def peer(self, python: str, *arguments: str | Path) -> None:
        """Run a peer's side."""
        done = subprocess.run([python, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{python}: {done.stderr.strip().splitlines()[-1:]}")

    def importance(self) -> dict[str, np.ndarray]:
        """llama.cpp's importance matrix: float32[cols] by GGUF's name."""
        found: dict[str, np.ndarray] = {}

        def look(t: Matrix, s: Statistics) -> None:
            if t.name.startswith("layers."):
                _, layer, part = t.name.split(".", 2)
                found.update({f"blk.{layer}.{p}.weight": s.square.astype(np.float32) for p in PARTS[part]})

        b = self.builder()
        Calibration(b, Weights(b), self.ids).run(look, hessians=False)
        return found

    def ours(self, row: Ours) -> tuple[Path, float]:
        """A file of ours and its bits per weight."""
        target = {"target_bits": self.bits[row.like]} if row.like else {"recipe": row.recipe}
        path = halfbyte.convert(
            self.source, self.folder / "ours.hb", tokenizer=self.tokenizer, method=row.method,
            calibrate=self.calibrate if row.text else None, **target,  # type: ignore[arg-type]
        )  # fmt: skip
        return path, halfbyte.load(path).facts()["bits_per_weight"]

    def theirs(self, row: Peer) -> tuple[Path, float]:
        """The file imported from llama.cpp's, and its own bits per weight."""
        out = self.folder / "peer.gguf"
        options = ["pure"] * row.pure + [str(self.folder / "imatrix.npz")] * row.imatrix
        self.peer(self.python, ENGINE, "--quantize", self.gguf, out, row.type, "2", *options)
        return self.imported(out), gguf_bits(out)

    def learned(self, row: Learned) -> tuple[Path, float]:
        """AutoRound's codes, and an embedding of ours."""
        length = max(map(len, self.ids))
        ids, out = self.folder / "ids.npy", self.folder / "auto-round"
        np.save(ids, [s for s in self.ids if len(s) == length][:SEQUENCES])
        shutil.rmtree(out, ignore_errors=True)
        self.peer(self.learner, "-I", LEARNER, self.source, out, ids, "--group", str(row.group))
        found = next(out.rglob("config.json")).parent
        path = halfbyte.convert(
            found, self.folder / "peer.hb", recipe="q4", tokenizer=self.source, calibrate=self.calibrate
        )
        return path, halfbyte.load(path).facts()["bits_per_weight"]

    def imported(self, checkpoint: Path) -> Path:
        """A file with the codes of a checkpoint."""
        tokenizer = self.tokenizer or self.source
        return halfbyte.convert(checkpoint, self.folder / "peer.hb", recipe="keep", tokenizer=tokenizer)

    def line(self, name: str, path: Path, bits: float) -> None:
        """Measure and print."""
        model = halfbyte.load(path, policy=self.policy, kv="f32")
        r: dict[str, Any] = evaluate(model, self.text, ctx=self.ctx, against=self.reference)
        self.bits[name] = bits
        weights = self.reference.facts()["matrix_weights"]
        if name == BASE:
            self.base = r["kld_mean"]
        ratio = "" if self.base is None else f"{r['kld_mean'] / self.base:.2f}"
        print(
            f"| {name} | {bits:.3f} | {round(bits * weights / 8):,} | {r['nll_per_token']:.5f} |"
            f" {r['kld_mean']:.6f} | {r['kld_p99']:.5f} | {100 * r['top1_agreement']:.2f} | {ratio} |",
            flush=True,
        )


def gguf_bits(path: Path) -> float:
    """Bits per weight over the matrices of a GGUF."""
    with closing(BoundedFile(path)) as file:
        matrices = [t for t in GGUFFile(file).tensors.values() if len(t.shape) == 2]
        nbytes = sum(t.shape[0] * t.row_bytes for t in matrices)
        return 8 * nbytes / sum(t.shape[0] * t.shape[1] for t in matrices)


def table(args: argparse.Namespace, name: str) -> None:
    """Print the table of one model."""
    with tempfile.TemporaryDirectory() as folder:
        q = Quality(args.data, name, Path(folder), args.python, args.auto_round, args.policy)
        nll = evaluate(q.reference, q.text, ctx=q.ctx)
        print(
            f"\n**{name}**, {nll['tokens']} tokens, float nll {nll['nll_per_token']:.5f}, policy {args.policy}\n"
        )
        print("| weights | bits | bytes | nll | KL mean | KL p99 | top-1 % | KL / Q4_0's |\n|" + "---|" * 8)
        learned = LEARNED if args.auto_round and q.source.is_dir() else ()
        rows: tuple[Peer | Learned | Ours, ...] = (*(PEERS if args.python else ()), *learned, *OURS)
        make: dict[type, Callable] = {Peer: q.theirs, Learned: q.learned, Ours: q.ours}
        for row in (r for r in rows if not args.only or r.name in args.only):
            try:
                q.line(row.name, *make[type(row)](row))
            except (HalfbyteError, RuntimeError, KeyError) as error:
                print(f"| {row.name} | not made: {error} |" + " |" * 6, flush=True)
        for pair in args.also:
            label, _, where = pair.partition("=")
            path = q.imported(Path(where))
            q.line(label, path, halfbyte.load(path).facts()["bits_per_weight"])


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--python", default="", help="the peer's interpreter")
    parser.add_argument("--auto-round", default="", metavar="PYTHON", help="an interpreter with auto-round")
    parser.add_argument("--policy", default="f32")
    parser.add_argument("--only", nargs="+", metavar="ROW")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=CHECKPOINT")
    args = parser.parse_args()
    print(f"python benchmarks/compare_quality.py; {machine_name()}, commit {commit()}")
    if not args.python:
        print("llama.cpp's rows are left out: no --python")
    elif not Path(args.python).exists():
        sys.exit(f"{args.python} does not exist")
    for name in args.models:
        table(args, name)


if __name__ == "__main__":
    main()
