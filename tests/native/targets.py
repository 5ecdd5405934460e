"""Other systems that the C library is built for and run on here: one row each."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
TOOLCHAINS = ROOT / "native" / "cmake"
SYSROOT = "/usr/aarch64-linux-gnu"
QEMU = "qemu-aarch64"
WINE = shutil.which("wine64") or "/usr/lib/wine/wine64"


@dataclass(frozen=True)
class Target:
    """How to build for a system and to run what was built."""

    name: str
    needs: dict[str, str]  # program: the Debian package that has it
    folder: Path
    options: tuple[str, ...] | None  # of CMake; None: `make native` builds it
    library: str
    suffix: str = ""  # of programs
    runner: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    settings: tuple[Path, str] | None = None  # a file to have before anything runs, and what is in it

    def built(self) -> Path:
        """The folder of the library and its programs, made of the sources as they are; else the test is skipped."""
        for program, package in self.needs.items():
            if not shutil.which(program):
                pytest.skip(f"{program} is not installed (Debian: {package})")
        if self.settings:
            self.settings[0].parent.mkdir(parents=True, exist_ok=True)
            self.settings[0].write_text(self.settings[1])
        if self.options is None:
            if not (self.folder / "client").is_file():
                pytest.skip("the C library and its programs are not built (make native)")
            return self.folder
        return build(self.folder, *self.options)

    def run(self, program: str, *arguments: object, text: bytes = b"") -> bytes:
        """What a built program prints, given a text; it must succeed."""
        command = [*self.runner, str(self.folder / (program + self.suffix)), *map(str, arguments)]
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, input=text, capture_output=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        return done.stdout.replace(b"\r\n", b"\n")


HOST = Target("host", {}, BUILD / "native", None, "libhalfbyte.so")
AARCH64 = Target(
    "aarch64",
    {"aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu", QEMU: "qemu-user"},
    BUILD / "native-arm",
    (f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAINS / 'aarch64-linux-gnu.cmake'}",),
    "lib/libhalfbyte.so",
    runner=(QEMU, "-L", SYSROOT, "-cpu", "max"),
)
# One folder deeper than a library for this machine, which Python finds as build/*/libhalfbyte.so.
MUSL = Target(
    "musl",
    {"musl-gcc": "musl-tools"},
    BUILD / "targets" / "musl",
    ("-DCMAKE_C_COMPILER=musl-gcc", "-DHALFBYTE_ISA=scalar"),
    "libhalfbyte.so",
)
PREFIX = BUILD / "targets" / "wine"
WINDOWS = Target(
    "windows",
    {"x86_64-w64-mingw32-gcc": "gcc-mingw-w64-x86-64-win32", WINE: "wine64"},
    BUILD / "targets" / "windows",
    (f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAINS / 'x86_64-windows.cmake'}", "-DHALFBYTE_ISA=avx2"),
    "halfbyte.dll",
    ".exe",
    (WINE,),
    # Wine takes its DLLs from where they are installed, instead of filling a folder with copies, 700 MB of them.
    {"WINEPREFIX": str(PREFIX), "WINEBOOTSTRAPMODE": "1", "WINEDEBUG": "-all", "LC_ALL": "C.UTF-8"},
    (PREFIX / ".update-timestamp", "disable\n"),
)
TARGETS = (AARCH64, MUSL, WINDOWS)


def build(folder: Path, *options: str) -> Path:
    """Configure and build native/ in `folder`; the folder."""
    tools = Path(sys.executable).parent
    cmake, ninja = (shutil.which(name, path=f"{tools}:{os.environ['PATH']}") for name in ("cmake", "ninja"))
    if not cmake or not ninja:
        pytest.skip("cmake or ninja is not installed")
    flags = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_BUILD_TYPE=Release", *options]
    configure = [cmake, "-S", str(ROOT / "native"), "-B", str(folder), *flags]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of pytest-xdist share the folder
        for command in (configure, [cmake, "--build", str(folder)]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder
