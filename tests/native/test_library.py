"""The stable C interface (native/include/halfbyte.h) against the Python runtime, over the same files."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from story import story_folder

import halfbyte
from halfbyte.formats.container import File
from halfbyte.formats.errors import FormatError
from halfbyte.runtime.backends.native import load_library
from halfbyte.runtime.model import load
from halfbyte.runtime.sampler import Sampler, Sampling
from halfbyte.runtime.session import Session

FORMATS = Path(__file__).resolve().parents[1] / "formats"
IDS = [1, 40, 7, 300, 12, 9, 88, 5, 6, 3, 100, 41, 77]


class Library:
    """Calls with their status checked."""

    def __init__(self) -> None:
        self.ffi, self.lib = load_library()

    def error(self) -> str:
        """What the library says went wrong."""
        return self.ffi.string(self.lib.hb_last_error()).decode()

    def new(self, name: str, *arguments: Any) -> Any:
        """The handle that a creating function writes to its last argument."""
        kind = {"open": "file", "model": "model", "session": "session", "sampler": "sampler"}[
            name.split("_")[1]
        ]
        out = self.ffi.new(f"hb_{kind} **")
        status = getattr(self.lib, name)(*arguments, out)
        assert status == 0, f"{name}: {status}, {self.error()}"
        return out[0]

    def struct(self, kind: str, **fields: Any) -> Any:
        """A struct of options with its size set."""
        value = self.ffi.new(f"{kind} *", fields)
        value.size = self.ffi.sizeof(kind)
        return value

    def feed(self, session: Any, ids: list[int], vocab: int) -> np.ndarray:
        """The logits after `ids`."""
        logits = np.empty(vocab, np.float32)
        status = self.lib.hb_feed(session, ids, len(ids), self.ffi.cast("float *", logits.ctypes.data))
        assert status == 0, self.error()
        return logits


@pytest.fixture(scope="module")
def c() -> Library:
    return Library()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 320 tokens and 256 positions."""
    folder = tmp_path_factory.mktemp("library")
    halfbyte.convert(story_folder(folder / "story", context=256), folder / "story.hb", recipe="q4")
    return folder / "story.hb"


@pytest.fixture
def demo(c: Library, path: Path) -> Iterator[Any]:
    file = c.new("hb_open_path", str(path).encode(), c.ffi.NULL)
    yield file
    c.lib.hb_close(file)


@pytest.fixture
def make(c: Library, demo: Any) -> Iterator[Callable[..., Any]]:
    """Makes models of the demo file, and frees them."""
    made = []

    def model(**options: Any) -> Any:
        texts = {k: c.ffi.new("char[]", v.encode()) for k, v in options.items() if isinstance(v, str)}
        made.append(
            (c.new("hb_model_create", demo, c.struct("hb_model_options", **{**options, **texts})), texts)
        )
        return made[-1][0]

    yield model
    for m, _ in made:
        c.lib.hb_model_free(m)


def opens(c: Library, data: bytes) -> int:
    out = c.ffi.new("hb_file **")
    memory = c.ffi.new("char[]", data)
    status: int = c.lib.hb_open_memory(memory, len(data), c.ffi.NULL, out)
    if status == 0:
        status = c.lib.hb_verify(out[0], c.ffi.NULL, c.ffi.NULL)
        c.lib.hb_close(out[0])
    return status


def test_versions_agree(c: Library) -> None:
    parts = (c.lib.HB_VERSION_MAJOR, c.lib.HB_VERSION_MINOR, c.lib.HB_VERSION_PATCH)
    assert c.lib.hb_version() == parts[0] * 1000000 + parts[1] * 1000 + parts[2]


@pytest.mark.parametrize("golden", sorted((FORMATS / "golden").glob("*.hb")), ids=lambda p: p.stem)
def test_golden_files_open_and_verify(c: Library, golden: Path) -> None:
    assert opens(c, golden.read_bytes()) == 0, c.error()


def test_files_that_python_refuses_are_refused_in_one_line(c: Library) -> None:
    refused = 0
    for path in sorted((FORMATS / "golden_errors").glob("*.hb")):
        if path.name == "flipped_tokenizer_bit.hb":
            continue  # read by hb_verify only, as in Python
        assert opens(c, path.read_bytes()) == c.lib.HB_ERROR_FORMAT, path.name
        assert c.error() and "\n" not in c.error() and len(c.error()) < 256
        refused += 1
    assert refused == len(json.loads((FORMATS / "golden_errors" / "expected.json").read_text())) - 1


def test_mutated_files_are_refused_by_both_or_neither(c: Library, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ("1.0-q4", "1.1-a4.k256", "1.1-i3", "1.2-annotations", "1.0-z8")
    good = {n: bytearray((FORMATS / "golden" / f"{n}.hb").read_bytes()) for n in names}
    agreed = {True: 0, False: 0}
    for i in range(400):
        data = bytearray(good[names[i % len(names)]])
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(0, min(len(data), 4096))] ^= 1 << rng.integers(0, 8)
        if i % 2:  # digests that are right again, so that what lies behind them is looked at
            data = _with_digests(data)
        path = tmp_path / "m.hb"
        path.write_bytes(data)
        try:
            File(path).verify()
            python = True
        except FormatError:
            python = False
        native = opens(c, bytes(data)) == 0
        assert native == python, (i, c.error())
        agreed[native] += 1
    assert agreed[False] > 100


def _with_digests(data: bytearray) -> bytearray:
    from halfbyte.formats.container import sha256

    count = int.from_bytes(data[12:16], "little")
    if count > 64 or 64 + 64 * count > len(data):
        return data
    for i in range(count):
        row = 64 + 64 * i
        offset, length = (int.from_bytes(data[row + k : row + k + 8], "little") for k in (8, 16))
        if data[row : row + 4] != b"DATA" and offset + length <= len(data):
            data[row + 32 : row + 64] = sha256(bytes(data[offset : offset + length]))
    data[32:64] = sha256(bytes(data[:32]), bytes(data[64 : 64 + 64 * count]))
    return data


def test_metadata(c: Library, demo: Any, path: Path) -> None:
    meta = File(path).metadata
    number, text, size = c.ffi.new("int64_t *"), c.ffi.new("char **"), c.ffi.new("size_t *")
    assert c.lib.hb_metadata_int(demo, b"model.vocab_size", number) == 1
    assert number[0] == meta["model.vocab_size"] == c.lib.hb_vocab_size(demo)
    assert c.lib.hb_context_length(demo) == meta["model.context_length"]
    assert c.lib.hb_metadata_text(demo, b"general.model_type", text, size) == 1
    assert c.ffi.unpack(text[0], size[0]).decode() == meta["general.model_type"]
    assert c.lib.hb_metadata_text(demo, b"model.vocab_size", text, size) == 0
    assert c.lib.hb_metadata_int(demo, b"no.such.key", number) == 0
    assert bytes(c.ffi.unpack(c.lib.hb_file_digest(demo), 32)) == File(path).digest


@pytest.mark.parametrize("kv", ["auto", "f16", "f32", "k8v8", "tq3", "k4v4,0=k8v8", "k8vt1", "tq3-qjl"])
def test_logits_are_those_of_python(c: Library, make: Callable[..., Any], path: Path, kv: str) -> None:
    python = load(path, backend="native", kv=kv)
    native = make(kv=kv, rows=5, sessions=2)
    assert c.ffi.string(c.lib.hb_model_kv(native)).decode() == python.kv_mode
    session = c.new("hb_session_create", native, c.ffi.NULL)
    expected = python.session()
    ids = (IDS * 6)[:70]
    for part in (ids[:1], ids[1:9], ids[9:]):
        assert np.array_equal(c.feed(session, part, python.vocab_size), expected.feed(part))
    assert c.lib.hb_session_position(session) == 70
    assert c.ffi.unpack(c.lib.hb_session_ids(session), 70) == ids
    c.lib.hb_session_free(session)


def test_many_sessions_share_a_step(c: Library, make: Callable[..., Any], path: Path) -> None:
    python = load(path, backend="native")
    vocab, native = python.vocab_size, make(rows=16, sessions=3, threads=2)
    sessions = [c.new("hb_session_create", native, c.ffi.NULL) for _ in range(3)]
    parts = [IDS[:3], IDS * 3, IDS[5:6]]
    logits = np.empty((3, vocab), np.float32)
    for _ in range(2):
        keep = [c.ffi.new("int32_t[]", p) for p in parts]
        items = c.ffi.new("hb_feed_item[3]")
        for i in range(3):
            out = c.ffi.cast("float *", logits[i].ctypes.data) if i != 1 else c.ffi.NULL
            items[i] = {"size": c.ffi.sizeof("hb_feed_item"), "session": sessions[i], "ids": keep[i],
                        "count": len(parts[i]), "logits": out}  # fmt: skip
        assert c.lib.hb_feed_many(native, items, 3) == 0, c.error()
    for i in (0, 2):
        assert np.array_equal(logits[i], python.session().feed(parts[i] * 2))
    assert np.array_equal(c.feed(sessions[1], [7], vocab), python.session().feed([*(parts[1] * 2), 7]))
    items[1].session = sessions[0]
    assert c.lib.hb_feed_many(native, items, 3) == c.lib.HB_ERROR_ARGUMENT
    for s in sessions:
        c.lib.hb_session_free(s)


@pytest.mark.parametrize("kv", ["f16", "k8v8", "tq3", "k8vt1", "tq3-qjl,0=kq4v8"])
def test_rewind_fork_save_load(
    c: Library, make: Callable[..., Any], path: Path, kv: str, tmp_path: Path
) -> None:
    python = load(path, backend="native", kv=kv)
    vocab, native = python.vocab_size, make(kv=kv)
    ids = (IDS * 8)[:90]
    session = c.new("hb_session_create", native, c.ffi.NULL)
    c.feed(session, ids, vocab)
    assert c.lib.hb_session_rewind(session, 20) == 0
    fork = c.new("hb_session_fork", session)
    expected = python.session().feed([*ids[:70], 5])
    assert np.array_equal(c.feed(fork, [5], vocab), expected)
    assert np.array_equal(c.feed(session, [6], vocab), python.session().feed([*ids[:70], 6]))
    assert c.lib.hb_session_save(fork, str(tmp_path / "c").encode()) == 0, c.error()
    mirror = python.session()
    mirror.feed([*ids[:70], 5])
    mirror.save(tmp_path / "python")
    assert (tmp_path / "c").read_bytes() == (tmp_path / "python").read_bytes()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["c", "python"]
    loaded = c.new("hb_session_load", native, str(tmp_path / "python").encode(), c.ffi.NULL)
    expected = Session.load(python, tmp_path / "c").feed([9, 9])
    assert np.array_equal(c.feed(loaded, [9, 9], vocab), expected)
    data = bytearray((tmp_path / "c").read_bytes())
    data[len(data) // 2] ^= 1
    out = c.ffi.new("hb_session **")
    for bad in (bytes(data), bytes(data[:50]), b"", bytes(data[:-1])):
        memory = c.ffi.new("char[]", bad + b"\0")
        assert c.lib.hb_session_read(native, memory, len(bad), c.ffi.NULL, out) == c.lib.HB_ERROR_FORMAT
    assert c.lib.hb_session_rewind(loaded, 1000) == c.lib.HB_ERROR_ARGUMENT
    for s in (session, fork, loaded):
        c.lib.hb_session_free(s)


def test_what_cannot_be_fed_changes_nothing(c: Library, make: Callable[..., Any]) -> None:
    native = make(positions=20)
    session = c.new("hb_session_create", native, c.struct("hb_session_options", positions=10))
    assert c.lib.hb_feed(session, IDS, 11, c.ffi.NULL) == c.lib.HB_ERROR_POSITION
    assert c.lib.hb_feed(session, [1, 1 << 30], 2, c.ffi.NULL) == c.lib.HB_ERROR_ID
    assert c.lib.hb_feed(session, [-1], 1, c.ffi.NULL) == c.lib.HB_ERROR_ID
    assert c.lib.hb_feed(session, [1], 0, c.ffi.NULL) == c.lib.HB_ERROR_ARGUMENT
    c.lib.hb_cancel(native, 1)
    assert c.lib.hb_feed(session, IDS, 10, c.ffi.NULL) == c.lib.HB_ERROR_CANCELLED
    assert c.lib.hb_session_position(session) == 0
    c.lib.hb_cancel(native, 0)
    assert c.lib.hb_feed(session, IDS, 10, c.ffi.NULL) == 0
    c.lib.hb_session_free(session)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("kv", ["f16", "tq3"])
def test_a_model_runs_in_the_memory_that_was_foretold_and_in_no_less(
    c: Library, demo: Any, path: Path, threads: int, kv: str
) -> None:
    mode = c.ffi.new("char[]", kv.encode())
    options = c.struct("hb_model_options", threads=threads, kv=mode, rows=32, sessions=1)
    needs = c.struct("hb_needs")
    assert c.lib.hb_fit(demo, options, 200, needs) == 0, c.error()
    assert needs.mapped == path.stat().st_size

    def run(nbytes: int) -> int:
        memory = np.empty(nbytes, np.uint8)
        arena = c.ffi.new("hb_allocator *")
        status: int = c.lib.hb_arena(c.ffi.cast("void *", memory.ctypes.data), nbytes, arena)
        options.allocator = arena
        model, session = c.ffi.new("hb_model **"), c.ffi.new("hb_session **")
        status = status or c.lib.hb_model_create(demo, options, model)
        status = status or c.lib.hb_session_create(model[0], c.ffi.NULL, session)
        status = status or c.lib.hb_feed(session[0], (IDS * 20)[:200], 200, c.ffi.NULL)
        if session[0] != c.ffi.NULL:
            c.lib.hb_session_free(session[0])
        c.lib.hb_model_free(model[0])
        return status

    total = needs.model + needs.session
    assert run(total) == 0, c.error()
    assert run(total - 4096) == c.lib.HB_ERROR_MEMORY
    assert "memory" in c.error()
    assert run(int(total * 0.98)) == c.lib.HB_ERROR_MEMORY


def test_nothing_is_allocated_in_a_reserved_step(c: Library, demo: Any) -> None:
    taken = []

    @c.ffi.callback("void *(void *, size_t)")
    def allocate(_: Any, nbytes: int) -> Any:
        block = c.ffi.new("char[]", nbytes)
        taken.append(block)
        return block

    @c.ffi.callback("void(void *, void *)")
    def release(_: Any, memory: Any) -> None:
        assert any(memory == block for block in taken)

    allocator = c.struct("hb_allocator", allocate=allocate, release=release)
    model = c.new("hb_model_create", demo, c.struct("hb_model_options", allocator=allocator, threads=2))
    session = c.new("hb_session_create", model, c.struct("hb_session_options", reserve=100))
    before = len(taken)
    assert c.lib.hb_feed(session, (IDS * 8)[:100], 100, c.ffi.NULL) == 0
    assert len(taken) == before > 3
    assert c.lib.hb_feed(session, (IDS * 3)[:30], 30, c.ffi.NULL) == 0
    assert len(taken) > before
    c.lib.hb_session_free(session)
    c.lib.hb_model_free(model)


def test_draws_are_those_of_python(c: Library) -> None:
    rng, n = np.random.default_rng(3), 300
    rows = [
        {}, {"temperature": 0.7, "seed": 5}, {"temperature": 1.0, "top_k": 7, "seed": 2**63 + 11},
        {"temperature": 1.3, "top_p": 0.8}, {"temperature": 1.0, "top_k": 20, "top_p": 0.5, "seed": 1},
        {"temperature": 0.9, "min_p": 0.1, "seed": 9},
        {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1,
         "penalty_window": 16, "top_p": 0.9, "seed": 4},
        {"repetition_penalty": 1.5},
    ]  # fmt: skip
    for how in rows:
        python = Sampler(Sampling(**{"penalty_window": 0, **how}))  # type: ignore[arg-type]
        native = c.new("hb_sampler_create", c.struct("hb_sampling", **how), n, c.ffi.NULL)
        history: list[int] = []
        out = c.ffi.new("int32_t *")
        for _ in range(60):
            logits = np.round(rng.normal(0, 2, n), 1).astype(np.float32)  # with equals
            logits[rng.integers(0, n, 5)] = -np.inf
            at = c.ffi.cast("float *", logits.ctypes.data)
            assert c.lib.hb_sample(native, at, history, len(history), out) == 0
            assert out[0] == python.sample(logits, history), how
            history.append(out[0])
        c.lib.hb_sampler_free(native)
    out = c.ffi.new("hb_sampler **")
    for bad in ({"temperature": -1.0}, {"top_p": 1.5}, {"min_p": float("nan")}):
        assert (
            c.lib.hb_sampler_create(c.struct("hb_sampling", **bad), n, c.ffi.NULL, out)
            == c.lib.HB_ERROR_ARGUMENT
        )


def test_files_that_cannot_be_read(c: Library, path: Path, tmp_path: Path) -> None:
    out = c.ffi.new("hb_file **")
    assert c.lib.hb_open_path(str(tmp_path / "none").encode(), c.ffi.NULL, out) == c.lib.HB_ERROR_IO
    assert c.lib.hb_open_path(str(tmp_path).encode(), c.ffi.NULL, out) == c.lib.HB_ERROR_FORMAT
    (tmp_path / "short").write_bytes(b"x")
    assert c.lib.hb_open_path(str(tmp_path / "short").encode(), c.ffi.NULL, out) == c.lib.HB_ERROR_FORMAT
    (tmp_path / "asset").write_bytes(b"y" * 100 + path.read_bytes() + b"z" * 9)
    with open(tmp_path / "asset", "rb") as f:
        size = path.stat().st_size
        file = c.new("hb_open_fd", f.fileno(), 100, size, c.struct("hb_open_options", verify=1))
        c.lib.hb_close(file)
        assert c.lib.hb_open_fd(f.fileno(), 100, size + 10, c.ffi.NULL, out) == c.lib.HB_ERROR_ARGUMENT
        assert c.lib.hb_open_fd(f.fileno(), 100, 0, c.ffi.NULL, out) == c.lib.HB_ERROR_FORMAT


CLIENT = """
#include "halfbyte.h"
int main(void) {
    hb_file *file = 0;
    hb_needs needs = {sizeof needs, 0, 0, 0};
    if (hb_open_path("absent.hb", 0, &file) != HB_ERROR_IO) return 1;
    return hb_last_error()[0] ? (int)needs.mapped : 2;
}
"""


@pytest.mark.parametrize("compiler", [["gcc", "-std=c99", "-x", "c"], ["g++", "-std=c++11", "-x", "c++"]])
def test_the_header_is_for_c99_and_cpp11(compiler: list[str], tmp_path: Path) -> None:
    from shutil import which

    from halfbyte.runtime.backends.native import library_path

    if not which(compiler[0]):
        pytest.skip(f"{compiler[0]} is not installed")
    include = Path(__file__).resolve().parents[2] / "native" / "include"
    (tmp_path / "client").write_text(CLIENT)
    flags = ["-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{include}", str(tmp_path / "client")]
    library = library_path()
    assert library
    subprocess.run([*compiler, *flags, "-o", tmp_path / "run", "-x", "none", library], check=True)
    assert subprocess.run([tmp_path / "run"], env={"LD_LIBRARY_PATH": str(library.parent)}).returncode == 0


@pytest.mark.parametrize("name", tiny.case_names())
def test_every_model_type_gives_the_same_logits(c: Library, name: str, tmp_path: Path) -> None:
    tiny.load_case(name).write_folder(tmp_path)
    halfbyte.convert(tmp_path, tmp_path / "m.hb", recipe="q4")
    python = load(tmp_path / "m.hb", backend="native")
    file = c.new("hb_open_path", str(tmp_path / "m.hb").encode(), c.ffi.NULL)
    model = c.new("hb_model_create", file, c.struct("hb_model_options", rows=7, sessions=1, threads=2))
    session = c.new("hb_session_create", model, c.ffi.NULL)
    ids = [(7 * i + 3) % python.vocab_size for i in range(min(40, python.context_length - 1))]
    expected = python.session()
    assert np.array_equal(c.feed(session, ids, python.vocab_size), expected.feed(ids))
    assert c.lib.hb_session_rewind(session, len(ids) - 12) == 0  # beyond windows too
    expected.rewind(len(ids) - 12)
    assert np.array_equal(c.feed(session, [5], python.vocab_size), expected.feed([5]))
    c.lib.hb_session_free(session)
    c.lib.hb_model_free(model)
    c.lib.hb_close(file)


def test_auto_is_the_mode_that_was_measured(c: Library, path: Path, tmp_path: Path) -> None:
    from halfbyte.formats import annotation, kv_gate

    for kld in (
        {"k8v8": [0.001], "tq3": [0.002], "tq2": [0.5]},
        {"k8v8": [0.5], "tq3": [0.02]},
        {"tq4": [0.01]},
    ):
        notes = kv_gate.annotate("t", "0" * 64, 9, [64], kld)
        copy = tmp_path / "kv.hb"
        copy.write_bytes(path.read_bytes())
        annotation.rewrite_section(copy, "KVMD", annotation.encode(notes))
        file = c.new("hb_open_path", str(tmp_path / "kv.hb").encode(), c.ffi.NULL)
        model = c.new("hb_model_create", file, c.ffi.NULL)
        chosen = c.ffi.string(c.lib.hb_model_kv(model)).decode()
        assert chosen == kv_gate.automatic(File(tmp_path / "kv.hb"))
        c.lib.hb_model_free(model)
        c.lib.hb_close(file)
