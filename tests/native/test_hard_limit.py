"""The C library under a hard limit of the system: what hb_fit names is what it takes, and less is a status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from story import story_folder

import halfbyte
from halfbyte.runtime.backends import native

pytestmark = [
    pytest.mark.skipif(native.library_path() is None, reason="the native library is not built (make native)"),
    pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts malloc's memory on Linux only"),
]
POSITIONS = 262_144  # of float32: memory beside which what Python takes and gives back is small

# Arguments: the file, and what may be taken in % of what hb_fit says. Prints the status, the error, hb_fit's sum and
# what the process took, malloc's and the system's roundings included.
RUN = f"""
import resource, sys
from halfbyte.runtime.backends.native import load_library
ffi, lib = load_library()

def struct(kind, **fields):
    value = ffi.new(kind + " *", fields)
    value.size = ffi.sizeof(kind)
    return value

def taken():
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData"))

file, model, session = ffi.new("hb_file **"), ffi.new("hb_model **"), ffi.new("hb_session **")
assert lib.hb_open_path(sys.argv[1].encode(), ffi.NULL, file) == 0
kv = ffi.new("char[]", b"f32")
options, needs = struct("hb_model_options", kv=kv, sessions=1), struct("hb_needs")
assert lib.hb_fit(file[0], options, {POSITIONS}, needs) == 0
total = needs.model + needs.session
before = taken()
limit = before + total * int(sys.argv[2]) // 100
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
whole = struct("hb_session_options", positions={POSITIONS}, reserve={POSITIONS})
status = lib.hb_model_create(file[0], options, model)
status = status or lib.hb_session_create(model[0], whole, session)
status = status or lib.hb_feed(session[0], list(range(40)), 40, ffi.NULL)
print(status, total, taken() - before, ffi.string(lib.hb_last_error()).decode(), sep="\\t")
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limit")
    halfbyte.convert(story_folder(folder / "story", context=POSITIONS), folder / "story.hb", recipe="q4")
    return folder / "story.hb"


def run(path: Path, percent: int) -> tuple[int, int, int, str]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(percent)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    status, total, took, error = done.stdout.removesuffix("\n").split("\t")
    return int(status), int(total), int(took), error


def test_a_process_takes_what_was_foretold(path: Path) -> None:
    status, total, took, error = run(path, 102)
    assert status == 0, error
    print(f"\nforetold {total / 1e6:.1f} MB, taken {took / 1e6:.1f} MB")
    assert abs(took - total) <= 0.02 * total


def test_less_is_a_clear_status(path: Path) -> None:
    status, _, _, error = run(path, 98)
    assert status == -1 and "no memory" in error
    status, _, _, error = run(path, 3)  # not even the model
    assert status == -1 and "memory" in error
