"""The examples on other machines: AArch64 under qemu, WebAssembly under wasmtime; sizes, and what is imported."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from crossed import ZIG, cross, wasm
from test_native_arm import QEMU, SYSROOT, arm  # noqa: F401

import halfbyte
from halfbyte.runtime.backends import native
from halfbyte.runtime.model import load

LARGEST = 400_000  # bytes of the module
LARGEST_LIBRARY = 500_000  # of the library for AArch64 with every kernel, stripped
COUNT = 10

pytestmark = pytest.mark.skipif(
    native.library_path() is None, reason="the native library is not built (make native)"
)


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[Path, Any]:
    """Every model type, and a story model where there is one: the prompt and Python's tokens."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for name in tiny.case_names():
        tiny.load_case(name).write_folder(folder / name)
        halfbyte.convert(folder / name, folder / f"{name}.hb", recipe="q4")
    with contextlib.suppress(pytest.skip.Exception):
        story = request.getfixturevalue("shared_data") / "tinystories-656k"
        halfbyte.convert(story, folder / "story.hb", recipe="q4", method="rtn", proof=False)
    for file in sorted(folder.glob("*.hb")):
        model = load(file, backend="native")
        prompt = [(7 * i + 3) % model.vocab_size for i in range(5)]
        session, out = model.session(), list[int]()
        logits = session.feed(prompt)
        while len(out) < COUNT and not (out and out[-1] in model.eos_ids):
            out.append(int(np.argmax(logits)))
            logits = session.feed(out[-1:])
        found[file] = prompt, out
    return found


def test_aarch64_gives_the_tokens_of_python(arm: Path, greedy: dict[Path, Any]) -> None:  # noqa: F811
    for file, (prompt, want) in greedy.items():
        command = [QEMU, "-L", SYSROOT, "-cpu", "max", arm / "generate", file, COUNT, *prompt]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert [int(i) for i in done.stdout.split()] == want, file.stem
    print(f"\n{len(greedy)} models")


def test_the_library_for_aarch64_is_small(arm: Path, tmp_path: Path) -> None:  # noqa: F811
    library = tmp_path / "libhalfbyte.so"
    strip = ["aarch64-linux-gnu-strip", "-o", library, arm / "lib" / "libhalfbyte.so"]
    subprocess.run(strip, check=True)
    print(f"\nAArch64: {library.stat().st_size} bytes")
    assert 100_000 < library.stat().st_size <= LARGEST_LIBRARY


@pytest.mark.parametrize(
    ("target", "name"), [("aarch64-linux-android", "libhalfbyte.so"), ("aarch64-macos", "libhalfbyte.dylib")]
)
def test_the_library_for_phones_is_small_and_links(target: str, name: str) -> None:
    """Android's linker knows only the names that bionic has (native/cmake/bionic.txt)."""
    library = cross(target) / name
    print(f"\n{target}: {library.stat().st_size} bytes")
    assert 100_000 < library.stat().st_size <= LARGEST_LIBRARY


def test_webassembly_gives_the_tokens_of_python(greedy: dict[Path, Any], tmp_path: Path) -> None:
    module = wasm() / "generate.wasm"
    sys.path.append(str(ZIG))
    wasmtime = pytest.importorskip("wasmtime", reason="wasmtime is not in build/zig (make cross)")
    engine = wasmtime.Engine()
    compiled = wasmtime.Module.from_file(engine, str(module))
    for file, (prompt, want) in greedy.items():
        linker, store = wasmtime.Linker(engine), wasmtime.Store(engine)
        linker.define_wasi()
        wasi = wasmtime.WasiConfig()
        wasi.argv = ["generate", f"/models/{file.name}", str(COUNT), *map(str, prompt)]
        wasi.preopen_dir(str(file.parent), "/models")
        wasi.stdout_file = str(tmp_path / "out")
        store.set_wasi(wasi)
        try:
            linker.instantiate(store, compiled).exports(store)["_start"](store)
        except wasmtime.ExitTrap as end:
            assert end.code == 0, file.stem
        del store
        assert [int(i) for i in (tmp_path / "out").read_text().split()] == want, file.stem


def test_a_module_for_browsers_is_small_and_imports_nothing() -> None:
    module = wasm() / "halfbyte.wasm"
    sys.path.append(str(ZIG))
    wasmtime = pytest.importorskip("wasmtime", reason="wasmtime is not in build/zig (make cross)")
    print(f"\nwasm: {module.stat().st_size} bytes")
    assert module.stat().st_size <= LARGEST
    compiled = wasmtime.Module.from_file(wasmtime.Engine(), str(module))
    assert compiled.imports == []
    names = {e.name for e in compiled.exports} - {"memory", "_initialize"}
    assert names and all(n.startswith("web_") for n in names)
