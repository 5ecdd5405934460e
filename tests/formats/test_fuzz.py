"""Damage and lies at random, seeded: a flipped bit or a cut is always found, and nothing but FormatError escapes.

Every byte of a file is covered by a digest or must be zero, so a single flipped bit that goes unnoticed is a bug. Lies
with true digests may make another valid file; they must not make a crash, a hang or a large allocation.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from make_errors import base, newer
from make_golden import GOLDEN
from parts import Parts, Section
from programs import Tiny, float_tensor

from halfbyte.formats.container import File
from halfbyte.formats.errors import FormatError

SAMPLE = GOLDEN / "1.1-a4.k256.hb"
MEMORY = 256 << 20  # bytes of address space that opening a 20 kB file may add
ROUNDS = 1500


def refused(path: Path) -> bool:
    """Whether opening and verifying raises FormatError; the message is one line."""
    try:
        File(path).verify()
    except FormatError as error:
        assert len(str(error).splitlines()) == 1
        return True
    return False


def refuses(path: Path, body: bytes | bytearray) -> bool:
    """`refused` of a file of these bytes."""
    path.write_bytes(body)
    return refused(path)


def bits(file: File, step: int) -> list[int]:
    """Bits to flip: every step-th of header, table and small sections, samples of the padding and of DATA."""
    rng = np.random.default_rng(0)
    start, length, _ = file.sections["DATA"]
    used = max(o + n for k, (o, n, _) in file.sections.items() if k != "DATA")
    padding = rng.integers(used * 8, start * 8, 100)
    data = rng.integers(start * 8, (start + length) * 8, 200)
    return [*range(0, used * 8, step), *padding, *data, used * 8, start * 8 - 1, (start + length) * 8 - 1]


@pytest.mark.parametrize("which", ["all bits of a smallest file", "some bits of a whole model"])
def test_every_flipped_bit_is_found(which: str, tmp_path: Path) -> None:
    """Header, section table, sections, padding and data."""
    source, step = SAMPLE, 29
    if which.startswith("all"):
        t = Tiny(1)
        x = t.slot(4)
        t.emit("embed", [x], [], (t.tensor(float_tensor("e", t.values(4, 4))),))
        t.finish(x)
        source, step = t.write(tmp_path / "smallest.hb").path, 1
    good = source.read_bytes()
    path = tmp_path / "f.hb"
    assert not refuses(path, good)
    with open(path, "r+b", buffering=0) as f:
        for bit in bits(File(source), step):
            at = int(bit) // 8
            os.pwrite(f.fileno(), bytes([good[at] ^ 1 << bit % 8]), at)
            assert refused(path), f"bit {bit % 8} of byte {at}"
            os.pwrite(f.fileno(), good[at : at + 1], at)
    assert not refused(path)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    """Cut at every multiple of 64 bytes, one byte short, and one long."""
    good = SAMPLE.read_bytes()
    for n in (*range(0, len(good), 64), 1, 63, 65, len(good) - 1):
        assert refuses(tmp_path / "f.hb", good[:n]), n
    assert refuses(tmp_path / "f.hb", good + b"\0")


INTERESTING = (
    0,
    1,
    2,
    15,
    16,
    17,
    255,
    1 << 12,
    1 << 16,
    (1 << 22) + 1,
    1 << 28,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
)


def mutate_words(a: np.ndarray, rng: np.random.Generator) -> None:
    """One to three 32-bit words of a record array become interesting, random or nearby."""
    words = a.view("<u4").reshape(-1)
    if not len(words):
        return
    for _ in range(rng.integers(1, 4)):
        at = rng.integers(len(words))
        choice = rng.integers(3)
        if choice == 0:
            words[at] = INTERESTING[rng.integers(len(INTERESTING))]
        elif choice == 1:
            words[at] = rng.integers(0, 1 << 32, dtype=np.uint64)
        else:
            words[at] = (int(words[at]) + int(rng.integers(-2, 3))) % (1 << 32)


def mutate_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip, cut or repeat bytes."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(out) + 1))
        n = int(rng.integers(1, 9))
        choice = rng.integers(3)
        if choice == 0 and at < len(out):
            out[at] = int(rng.integers(256))
        elif choice == 1:
            del out[at : at + n]
        else:
            out[at:at] = out[at : at + n] or b"\xff"
    return bytes(out)


def shuffle(parts: Parts, what: str, rng: np.random.Generator) -> None:
    """Swap, repeat or drop records."""
    a = getattr(parts, what)
    if len(a):
        setattr(parts, what, a[rng.integers(0, len(a), rng.integers(0, len(a) + 3))].copy())


def set_meta(parts: Parts, rng: np.random.Generator) -> None:
    """Damage the metadata."""
    parts.meta_bytes = mutate_bytes(parts.sections()[0][0].data, rng)


LIES: list[Callable[[Parts, np.random.Generator], object]] = [
    lambda p, rng: mutate_words(p.program, rng),
    lambda p, rng: mutate_words(p.program, rng),
    lambda p, rng: mutate_words(p.slots, rng),
    lambda p, rng: mutate_words(p.caches, rng),
    lambda p, rng: mutate_words(p.tensors, rng),
    lambda p, rng: mutate_words(p.tensors, rng),
    lambda p, rng: shuffle(p, "program", rng),
    lambda p, rng: shuffle(p, "slots", rng),
    lambda p, rng: shuffle(p, "tensors", rng),
    set_meta,
    lambda p, rng: setattr(p, "names", mutate_bytes(p.names, rng)),
    lambda p, rng: p.counts.__setitem__(int(rng.integers(2)), int(rng.integers(0, 1 << 32))),
    lambda p, rng: p.extra.append(
        Section(bytes(rng.integers(0, 256, 4, np.uint8)), bytes(8), int(rng.integers(2)))
    ),
    lambda p, rng: p.table_edits.append(
        (int(rng.integers(64 * 7)), bytes(rng.integers(0, 256, 4, np.uint8)))
    ),
    lambda p, rng: p.header_edits.append(
        (int(rng.integers(8, 32)), bytes(rng.integers(0, 256, 2, np.uint8)))
    ),
    lambda p, rng: setattr(p, "data", bytearray(mutate_bytes(bytes(p.data), rng))),
]


@pytest.fixture
def limited_memory():
    """Address space for MEMORY more bytes than now; more is a MemoryError, which no test accepts."""
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to limit memory")
@pytest.mark.parametrize("make", [base, newer], ids=lambda make: make.__name__)
def test_lies_with_true_digests(make: Callable[[Path], File], tmp_path: Path, limited_memory: None) -> None:
    """Only FormatError, or a file that stays valid: it opens again and every tensor can be decoded."""
    rng = np.random.default_rng(2024)
    original = make(tmp_path / "base.hb")
    path = tmp_path / "f.hb"
    refused = 0
    for _ in range(ROUNDS):
        parts = Parts(original)
        for _ in range(rng.integers(1, 3)):
            LIES[rng.integers(len(LIES))](parts, rng)
        if refuses(path, parts.build()):
            refused += 1
            continue
        file = File(path)
        for tensor in file.tensors:
            assert file.dequantize(tensor).shape == tensor.shape
        assert len(file.explain()) == len(file.program)
    assert ROUNDS * 0.5 < refused < ROUNDS


def test_many_tensors_and_sections_take_linear_time(tmp_path: Path) -> None:
    """20 000 tensors and long names open in a number of bytes read proportional to the file."""
    original = base(tmp_path / "base.hb")
    parts = Parts(original)
    n = 20000
    extra = np.zeros(n, parts.tensors.dtype)
    last = parts.tensors[-1]
    at = -(-(int(last["offset"]) + int(last["length"])) // 64) * 64
    extra["encoding"], extra["rank"], extra["length"] = 1, 1, 4
    extra["shape"][:, 0] = 1
    extra["offset"] = at + 64 * np.arange(n)
    parts.data += bytes(at - len(parts.data) + 64 * (n - 1) + 4)
    parts.tensors = np.concatenate([parts.tensors, extra])
    parts.set_names([f"{i:0200d}".encode() for i in range(len(parts.tensors))])
    parts.counts[0] = len(parts.tensors)
    path = tmp_path / "many.hb"
    path.write_bytes(parts.build())
    assert len(File(path).tensors) == n + 4
