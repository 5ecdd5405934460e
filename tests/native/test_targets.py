"""The library on other systems: AArch64 under qemu, musl, Windows under wine, WebAssembly under wasmtime.

Programs in C are run there; sizes, and what is imported and exported, are looked at here.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from client import COUNT, chatty_file, check_client, continued
from crossed import ZIG, cross, wasm
from targets import AARCH64, HOST, TARGETS, WINDOWS, Target
from test_native_arm import vectors  # noqa: F401

import halfbyte
from halfbyte.runtime.backends import native
from halfbyte.runtime.conversation import prompt_ids
from halfbyte.runtime.generate import generate
from halfbyte.runtime.model import load

LARGEST = 400_000  # bytes of the module
LARGEST_LIBRARY = 500_000  # of the library for AArch64 with every kernel, stripped

pytestmark = pytest.mark.skipif(
    native.library_path() is None, reason="the native library is not built (make native)"
)


@pytest.fixture(params=(HOST, *TARGETS), ids=lambda t: t.name)
def target(request: pytest.FixtureRequest) -> Target:
    """Each system in turn, with the library built for it; skipped, saying so, where its tools are missing."""
    request.param.built()
    return request.param


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
        found[file] = prompt, continued(model, model.session(), prompt)
    return found


def test_the_tokens_of_python(target: Target, greedy: dict[Path, Any]) -> None:
    for file, (prompt, want) in greedy.items():
        assert [int(i) for i in target.run("generate", file, COUNT, *prompt).split()] == want, file.stem
    print(f"\n{target.name}: {len(greedy)} models")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatty_file(tmp_path_factory.mktemp("story"))


def test_an_app_without_python(target: Target, story: Path, tmp_path: Path) -> None:
    check_client(target, story, tmp_path)


def test_chat(target: Target, story: Path, tmp_path: Path) -> None:
    model = load(story, backend="native")
    shutil.copy(story, tmp_path / "chat.hb")  # arguments are not UTF-8 everywhere
    questions, said, want = ["Once upon a time", "", "One, two \u00e9!"], list[dict[str, str]](), ""
    for question in questions:
        said.append({"role": "user", "content": question})
        answer = "".join(generate(model, prompt_ids(model, said), max_tokens=12, temperature=0))
        said.append({"role": "assistant", "content": answer})
        want += answer + "\n"
    text = "\n".join(questions).encode()
    assert target.run("chat", tmp_path / "chat.hb", "-n", 12, "-t", 2, text=text).decode() == want


def test_kernels_on_windows_give_the_bits_of_this_machine(vectors: Path, rig: Any) -> None:  # noqa: F811
    WINDOWS.built()
    lines = [line.split() for line in WINDOWS.run("parity", vectors).decode().splitlines()]
    assert {line[0] for line in lines} == {"scalar", "avx2"} & set(rig.usable())
    assert all(line[-1] == "ok" and int(line[2]) > 0 for line in lines)


def test_the_library_for_aarch64_is_small(tmp_path: Path) -> None:
    library = tmp_path / "libhalfbyte.so"
    strip = ["aarch64-linux-gnu-strip", "-o", library, AARCH64.built() / AARCH64.library]
    subprocess.run(strip, check=True)
    print(f"\nAArch64: {library.stat().st_size} bytes")
    assert 100_000 < library.stat().st_size <= LARGEST_LIBRARY


@pytest.mark.parametrize(
    ("system", "name"), [("aarch64-linux-android", "libhalfbyte.so"), ("aarch64-macos", "libhalfbyte.dylib")]
)
def test_the_library_for_phones_is_small_and_links(system: str, name: str) -> None:
    """Android's linker knows only the names that bionic has (native/cmake/bionic.txt)."""
    library = cross(system) / name
    print(f"\n{system}: {library.stat().st_size} bytes")
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
