"""What `make wheel-arm` and `make cross` build: the wheel for AArch64, and the names a library may import."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from targets import MUSL, ROOT, WINDOWS

COMPILER = "aarch64-linux-gnu-gcc"
BIONIC = ROOT / "native" / "cmake" / "bionic.txt"
AARCH64, X86_64 = 183, 62  # e_machine of an ELF header


def machine(elf: bytes) -> int:
    """e_machine of a little-endian ELF file."""
    assert elf[:6] == b"\x7fELF\x02\x01"
    return int.from_bytes(elf[18:20], "little")


def imports(library: Path) -> set[str]:
    """The names that a shared library needs others to define; weak ones may stay absent."""
    done = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return {name.split("@")[0] for kind, name in rows if kind == "U"}


def declared() -> set[str]:
    """The functions that the headers offer."""
    text = "".join(h.read_text() for h in (ROOT / "native" / "include").glob("*.h"))
    return set(re.findall(r"^HB_API [^;]*?(\bhb_\w+)\(", text, re.M))


def bionic() -> set[str]:
    """The names on the list of what Android's libraries export."""
    return {
        name for names in re.findall(r"^lib[cm]: (.*)$", BIONIC.read_text(), re.M) for name in names.split()
    }


def test_the_library_imports_only_what_android_has(rig) -> None:
    from halfbyte.runtime.backends import native

    if not shutil.which("nm"):
        pytest.skip("nm is not installed (Debian: binutils)")
    needed = imports(native.library_path())
    assert {"pthread_create", "malloc", "sched_getaffinity"} <= needed  # nm was understood
    assert needed - bionic() - {"__errno_location", "__tls_get_addr"} == set()  # glibc's names for the same


def test_the_library_exports_what_its_headers_declare(rig) -> None:
    from halfbyte.runtime.backends import native

    if not shutil.which("nm"):
        pytest.skip("nm is not installed (Debian: binutils)")
    command = ["nm", "-D", "--defined-only", str(native.library_path())]
    rows = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {row.split()[2] for row in rows} == declared() >= {"hb_open_path", "hb_run"}


def test_a_dll_needs_windows_only_and_exports_the_same() -> None:
    """No run-time library of the compiler, and none for threads."""
    command = ["x86_64-w64-mingw32-objdump", "-p", WINDOWS.built() / WINDOWS.library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {n.lower() for n in re.findall(r"DLL Name: (\S+)", text)} == {"kernel32.dll", "msvcrt.dll"}
    names = text.partition("[Ordinal/Name Pointer]")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\s*\[ *\d+\].*?(\w+)$", names, re.M)) == declared()


def test_a_library_for_musl_needs_musl_only() -> None:
    command = ["readelf", "-d", MUSL.built() / MUSL.library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"NEEDED.*\[(.*)\]", text) == ["libc.so"]


def test_the_wheel_for_aarch64(tmp_path) -> None:
    if not shutil.which(COMPILER):
        pytest.skip(f"{COMPILER} is not installed (Debian: gcc-aarch64-linux-gnu)")
    command = [
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path),
        "-C", f"build-dir={tmp_path / 'tree'}", "-C", "wheel.tags=py3-none-linux_aarch64",
        "-C", f"cmake.define.CMAKE_TOOLCHAIN_FILE={ROOT / 'native' / 'cmake' / 'aarch64-linux-gnu.cmake'}",
        "-C", "cmake.define.HALFBYTE_ISA=scalar", str(ROOT),  # what is packed, not how fast it is
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-linux_aarch64.whl")
    with zipfile.ZipFile(wheel) as z:
        elfs = {n: machine(z.read(n)) for n in z.namelist() if z.read(n)[:4] == b"\x7fELF"}
        (tags,) = (z.read(n).decode() for n in z.namelist() if n.endswith(".dist-info/WHEEL"))
    assert elfs == {"halfbyte/native/libhalfbyte.so": AARCH64}
    assert re.findall(r"^Tag: (.*)$", tags, re.M) == ["py3-none-linux_aarch64"]
    assert "Root-Is-Purelib: false" in tags
