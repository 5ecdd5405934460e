"""What native/cross.py builds for WebAssembly, where Zig's compiler is in build/zig (`make cross`)."""

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
def wasm() -> Path:
    """The folder of generate.wasm and halfbyte.wasm, made of the sources as they are."""
    if not (ZIG / "ziglang").is_dir():
        pytest.skip("Zig's compiler is not in build/zig (make cross)")
    sys.path.append(str(ZIG))
    spec = importlib.util.spec_from_file_location("cross", ROOT / "native" / "cross.py")
    assert spec and spec.loader
    cross = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cross)
    folder: Path = cross.FOLDER / "wasm32-wasi"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of pytest-xdist share the folder
        cross.build("wasm32-wasi", folder, "-DHALFBYTE_STATIC=ON", what=("generate", "web"))
    return folder
