"""Annotations: added, replaced and removed without touching the rest; damaged ones are refused in one line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from make_golden import GOLDEN
from parts import Parts, Section
from test_fuzz import mutate_bytes

from halfbyte.formats import annotation, container
from halfbyte.formats.container import SECTIONS, File
from halfbyte.formats.errors import FormatError, HalfbyteError
from halfbyte.formats.writer import TensorSpec, Writer

KINDS = [k for k, s in SECTIONS.items() if s.annotation]
SOURCE = GOLDEN / "1.0-q4.hb"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A copy of a golden file of version 1.0, alone in its folder."""
    (tmp_path / "m.hb").write_bytes(SOURCE.read_bytes())
    return tmp_path / "m.hb"


def rest(file: File) -> dict[str, bytes]:
    """The bytes of all other sections."""
    base, size, _ = file.sections["DATA"]
    out = {k: file.section(k) for k in file.sections if k not in KINDS and k != "DATA"}
    return out | {"DATA": file.bytes[base : base + size].tobytes()}


@pytest.mark.parametrize("kind", KINDS)
def test_add_replace_remove(kind: str, path: Path) -> None:
    """The other sections keep their bytes, and without annotations the file is the very file that it was."""
    assert annotation.read(File(path), kind) is None
    before = rest(File(path))
    for value in ({"a": 1}, {"b": "x" * 100_000, "c": [0.1, None]}, {}):
        annotation.rewrite_section(path, kind, annotation.encode(value))
        file = File(path)
        file.verify()
        assert annotation.read(file, kind) == value and rest(file) == before and file.version == (1, 2)
    annotation.rewrite_section(path, kind, None)
    assert path.read_bytes() == SOURCE.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_order_of_adding_does_not_matter(path: Path, tmp_path: Path) -> None:
    """Sections lie in the order of the table, and those unknown here stay, after them."""
    parts = Parts(File(path))
    parts.extra.append(Section(b"NEWS", b"new", flags=0))
    made = []
    for order in (KINDS, KINDS[::-1]):
        path.write_bytes(parts.build())
        for kind in order:
            annotation.rewrite_section(path, kind, annotation.encode({"kind": kind}))
        made.append(path.read_bytes())
    file = File(path)
    assert made[0] == made[1] and list(file.sections)[-len(KINDS) - 1 :] == [*KINDS, "NEWS"]
    assert file.section("NEWS") == b"new" and len(file.tensors)


def test_what_rewriting_refuses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sections that are no annotations, damaged files, full disks; the file stays as it was."""
    good = path.read_bytes()
    with pytest.raises(ValueError, match="not an annotation"):
        annotation.rewrite_section(path, "META", b"{}")
    path.write_bytes(good[:-1])
    with pytest.raises(FormatError, match="truncated"):
        annotation.rewrite_section(path, "PROF", b"{}")
    path.write_bytes(good)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HalfbyteError, match="No space left"):
        annotation.rewrite_section(path, "PROF", b"{}")
    assert path.read_bytes() == good and [p.name for p in path.parent.iterdir()] == [path.name]


def test_damaged_data_stays_noticeable(path: Path) -> None:
    """Digests are carried over, not taken anew: a flipped bit of the weights is still found."""
    body = bytearray(path.read_bytes())
    body[File(path).tensors[0].offset] ^= 1
    path.write_bytes(body)
    annotation.rewrite_section(path, "PROF", b"{}")
    with pytest.raises(FormatError, match="damaged"):
        File(path).verify()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON in UTF-8"),
        (b"[]", "not an object"),
        (b'{"a":1,"a":2}', "a key appears twice"),
        (b'{"a":NaN}', "NaN is not a number"),
        (b'{"a":-Infinity}', "Infinity is not a number"),
        (b'{"a":1e999}', "out of range"),
        (b'{"a":' + b"[" * 100_000 + b"}", "not JSON"),
        (b'{"a":' + b"1" * 100_000 + b"}", "not JSON"),
        (b"{" + b" " * annotation.MAX_BYTES + b"}", "are too many"),
    ],
)
def test_hostile_annotations(data: bytes, why: str, path: Path) -> None:
    """Refused in one line when asked for; the model itself still opens."""
    annotation.rewrite_section(path, "PROF", data)
    file = File(path)
    with pytest.raises(FormatError, match=why) as caught:
        annotation.read(file, "PROF")
    assert str(caught.value).startswith(f"{path}: section PROF") and len(str(caught.value).splitlines()) == 1


def test_a_damaged_annotation(path: Path) -> None:
    """One flipped bit: found when it is read and by verify, no obstacle to opening."""
    annotation.rewrite_section(path, "PROF", b'{"a":1}')
    body = bytearray(path.read_bytes())
    body[-2] ^= 4
    path.write_bytes(body)
    for look in (lambda f: annotation.read(f, "PROF"), File.verify):
        with pytest.raises(FormatError, match="section PROF is damaged"):
            look(File(path))


def test_random_damage() -> None:
    """Whatever the bytes, an object or FormatError comes out, never anything else."""
    rng = np.random.default_rng(0)
    good = annotation.encode({"a": [1, 2.5, {"b": None}], "c": "ü\\\n", "d": {"e": True, "f": -1e-30}})
    assert annotation.decode("PROF", good)["a"] == [1, 2.5, {"b": None}]
    refused = 0
    for _ in range(3000):
        try:
            assert isinstance(annotation.decode("PROF", mutate_bytes(good, rng)), dict)
        except FormatError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert 1000 < refused < 3000


def test_encoding_is_canonical() -> None:
    """The same facts are the same bytes; what JSON cannot hold is the caller's mistake."""
    assert annotation.encode({"b": 1, "a": {"d": "ü", "c": 0.1}}) == '{"a":{"c":0.1,"d":"ü"},"b":1}'.encode()
    for wrong in ({"a": float("nan")}, {"a": "x" * annotation.MAX_BYTES}):
        with pytest.raises(ValueError):
            annotation.encode(wrong)


def kept_writer(path: Path, partial: Path | None, kinds: tuple[str, ...] = ()) -> Writer:
    """A writer of the golden file's program, its weights still to come."""
    file = File(SOURCE)
    return Writer(
        path, meta=dict(file.metadata), slots=file.slots, caches=file.caches, program=file.program,
        tensors=[TensorSpec(t.name, t.encoding, t.shape, t.group, t.scale_type) for t in file.tensors],
        tokenizer=file.section("TOKN"), template=file.section("TMPL").decode(), partial=partial, annotations=kinds,
    )  # fmt: skip


def fill(w: Writer, tensors: range) -> None:
    """Copy tensors of the golden file."""
    file = File(SOURCE)
    for i in tensors:
        t = file.tensors[i]
        planes = file.plane_arrays(t) if len(t.shape) == 2 else {"values": file.vector(t)}
        for name, data in planes.items():
            w.write(i, name, 0, data)


def test_a_writer_goes_on_where_another_stopped(tmp_path: Path) -> None:
    """Given a partial file, it stays after a failure and is continued; what is stored can be read back meanwhile."""
    out, part = tmp_path / "o.hb", tmp_path / "part"
    source = File(SOURCE)
    n = len(source.tensors)
    with pytest.raises(KeyboardInterrupt), kept_writer(out, part) as w:
        fill(w, range(n // 2))
        w.seal()  # whatever lies behind the weights must not survive
        raise KeyboardInterrupt
    assert not out.exists() and part.exists()
    with kept_writer(out, part) as w:
        fill(w, range(n // 2, n))
        for i, t in enumerate(source.tensors):
            assert w.digest(i) == t.digest
            if len(t.shape) == 2:
                for start in range(0, t.shape[0], 16):
                    rows = w.rows(i, start, min(start + 16, t.shape[0]))
                    assert np.array_equal(rows, source.dequantize(t)[start : start + 16])
                    assert np.array_equal(rows, source.dequantize(t, start, start + 16))
    assert out.read_bytes() == SOURCE.read_bytes() and not part.exists()


def test_a_sealed_file_opens_before_it_is_annotated(tmp_path: Path) -> None:
    """An announced annotation is empty first, which is as good as absent; then it is what `annotate` gave."""
    with kept_writer(tmp_path / "o.hb", None, ("PROF",)) as w:
        fill(w, range(len(w.tensors)))
        w.seal()
        sealed = File(w.partial)
        sealed.verify()
        assert annotation.read(sealed, "PROF") is None
        w.annotate("PROF", annotation.encode({"a": 1}))
    file = File(tmp_path / "o.hb")
    file.verify()
    assert annotation.read(file, "PROF") == {"a": 1} and file.version == (1, 2)
    annotation.rewrite_section(tmp_path / "o.hb", "PROF", None)
    assert (tmp_path / "o.hb").read_bytes() == SOURCE.read_bytes()


def test_digests_follow_what_is_written(tmp_path: Path) -> None:
    """A digest taken early does not outlive a later write."""
    with kept_writer(tmp_path / "o.hb", None) as w:
        before = [w.digest(i) for i in range(len(w.tensors))]
        fill(w, range(len(w.tensors)))
        assert (
            [w.digest(i) for i in range(len(w.tensors))] == [t.digest for t in File(SOURCE).tensors] != before
        )
    assert container.File(tmp_path / "o.hb").digest == File(SOURCE).digest
