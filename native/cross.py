"""Builds the C library for other systems with the compiler of the ziglang package: `make cross`.

Every target is compiled and linked, into build/cross/<target>. Android is linked against stubs of its C library
(native/cmake/bionic.txt), since neither its headers nor its libraries are here: that proves the names, not a run.
For WebAssembly the example `generate` is linked with the library, as a module for any WASI engine, and the module of
the page in native/examples/web.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NATIVE = Path(__file__).resolve().parent
FOLDER = NATIVE.parent / "build" / "cross"
# As Zig calls them, with the oldest version of the C library that will do.
TARGETS = (
    "x86_64-linux-musl",
    "aarch64-linux-musl",
    "aarch64-linux-gnu.2.17",
    "aarch64-linux-android",
    "aarch64-macos",
    "x86_64-macos",
    "x86_64-windows-gnu",
    "wasm32-wasi",
)
LIBRARIES = ("libhalfbyte.so", "libhalfbyte.dylib", "halfbyte.dll", "generate.wasm", "halfbyte.wasm")


def build(target: str, folder: Path, *options: str, what: tuple[str, ...] = ("halfbyte",)) -> Path:
    """Configure and build CMake targets for a system; the folder. Raises RuntimeError with the output."""
    import ziglang

    tools = Path(sys.executable).parent
    zig = Path(ziglang.__file__).parent / "zig"
    configure = [
        tools / "cmake", "-S", NATIVE, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}",
        "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_TOOLCHAIN_FILE={NATIVE / 'cmake' / 'zig.cmake'}",
        f"-DHALFBYTE_ZIG={zig}", f"-DHALFBYTE_TARGET={target}", *options,
    ]  # fmt: skip
    for command in (configure, [tools / "cmake", "--build", folder, "--target", *what]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout)
    return folder


def main(targets: list[str]) -> int:
    """Build the named targets, or all; 1 when one fails."""
    failed = 0
    for target in targets or TARGETS:
        try:
            wasm = target.startswith("wasm")
            options = ["-DHALFBYTE_STATIC=ON"] if wasm else []
            folder = build(
                target, FOLDER / target, *options, what=("generate", "web") if wasm else ("halfbyte",)
            )
        except RuntimeError as error:
            print(f"{target}: failed\n{error}")
            failed += 1
        else:
            for library in sorted(p for p in folder.iterdir() if p.name in LIBRARIES):
                print(f"{target}: {library}, {library.stat().st_size} bytes", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
