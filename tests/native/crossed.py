"""What native/cross.py builds, where Zig's compiler is in build/zig (`make cross`)."""

from __future__ import annotations

import fcntl
import importlib.util
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ZIG = ROOT / "build" / "zig"


@cache
def cross(target: str, *options: str, what: tuple[str, ...] = ("halfbyte",)) -> Path:
    """The folder of a target of native/cross.py, made of the sources as they are."""
    if not (ZIG / "ziglang").is_dir():
        pytest.skip("Zig's compiler is not in build/zig (make cross)")
    sys.path.append(str(ZIG))
    spec = importlib.util.spec_from_file_location("cross", ROOT / "native" / "cross.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder: Path = module.FOLDER / target
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of pytest-xdist share the folder
        module.build(target, folder, *options, what=what)
    return folder


def wasm() -> Path:
    """The folder of generate.wasm and halfbyte.wasm."""
    return cross("wasm32-wasi", "-DHALFBYTE_STATIC=ON", what=("generate", "web"))
