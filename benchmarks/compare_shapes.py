"""The models that the comparisons run: one random checkpoint a shape, and halfbyte's files made from it.

Everything lies under `WORK/SHAPE/` and is made once: files are written aside and renamed, so one that exists is
complete. Peers make their own files from the same checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.formats.errors import HalfbyteError, UsageError

FOLDER = Path(__file__).resolve().parent
MODEL_TYPES = ("llama", "qwen2", "qwen3")  # what random_checkpoint.py writes


@dataclass(frozen=True)
class Shape:
    """A config and the folder of its files."""

    name: str
    config: dict[str, Any]
    folder: Path

    @property
    def checkpoint(self) -> Path:
        """The folder of bf16 weights."""
        return self.folder / "checkpoint"


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """(name, config) of a folder with a config.json, or of such a file. Raises UsageError."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {path}: {error}") from None
    if not isinstance(config, dict) or config.get("model_type") not in MODEL_TYPES:
        raise UsageError(f"--config {path}: not the config of a {', '.join(MODEL_TYPES)} model")
    return (path.resolve().name if path.is_dir() else file.stem), config


def shape(path: Path, work: Path, seed: int) -> Shape:
    """The shape of a config, its checkpoint written if need be. Raises UsageError, HalfbyteError."""
    name, config = read_config(path)
    found = Shape(name, config, work.expanduser().resolve() / (f"{name}-{seed}" if seed else name))
    try:
        found.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--work {work}: {error.strerror}") from None

    def write(part: Path) -> None:
        source = found.folder / "config.json"
        source.write_text(json.dumps(config))
        call(
            [
                sys.executable,
                str(FOLDER / "random_checkpoint.py"),
                str(source),
                str(part),
                "--seed",
                str(seed),
            ]
        )

    write_aside(found.checkpoint, write)
    return found


def hb(found: Shape, recipe: str) -> Path:
    """The `.hb` file of a recipe, made by the converter as it is now; those of older sources are removed."""
    root = FOLDER.parent
    sources = sorted(p for room in ("formats", "converter") for p in (root / room).rglob("*.py"))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:8]
    out = found.folder / f"{recipe}.{digest}.hb"
    if not out.exists():
        for old in found.folder.glob(f"{recipe}.*.hb"):
            old.unlink()
    code = "import sys, halfbyte; halfbyte.convert(sys.argv[1], sys.argv[2], recipe=sys.argv[3])"
    write_aside(
        out, lambda part: call([sys.executable, "-c", code, str(found.checkpoint), str(part), recipe])
    )
    return out


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """`replace`, unless `path` is there already."""
    if not path.exists():
        replace(path, write)


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file or folder beside `path`, then rename it. Raises HalfbyteError when it cannot."""
    part = path.with_name(f".{os.getpid()}.{path.name}")
    print(f"  making {path}", file=sys.stderr, flush=True)
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        raise HalfbyteError(f"{path}: cannot write: {error.strerror}") from None
    finally:
        if part.is_file():
            part.unlink()


def call(command: list[str]) -> None:
    """Run a program that makes a file. Raises HalfbyteError with its last line when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout or "no message").strip().splitlines()
        raise HalfbyteError(f"the models cannot be made: {lines[-1]}")
