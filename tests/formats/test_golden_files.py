"""Files written once and kept: good ones must open for ever, hostile ones must be refused in one line."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_golden import ANNOTATIONS, GOLDEN, RECORD, build, describe
from parts import Parts, Section

from halfbyte.formats import annotation, container, metadata
from halfbyte.formats.container import File
from halfbyte.formats.encodings import MATRIX_ENCODINGS, SCALE_TYPES
from halfbyte.formats.errors import FormatError
from halfbyte.formats.ops import OPS

ERRORS = Path(__file__).resolve().parent / "golden_errors"
GOOD = json.loads(RECORD.read_text())
HOSTILE = json.loads((ERRORS / "expected.json").read_text())


def test_the_folders_are_what_the_records_say() -> None:
    """No file without an expectation, no expectation without a file, every encoding, nothing large."""
    assert {p.name for p in GOLDEN.glob("*.hb")} == set(GOOD)
    assert {p.name for p in ERRORS.glob("*.hb")} == set(HOSTILE)
    assert {f"1.{e.minor}-{e.name}.hb" for e in MATRIX_ENCODINGS} <= set(GOOD)
    assert {t.scale_type for name in GOOD for t in File(GOLDEN / name).tensors} == set(SCALE_TYPES)
    assert all(p.stat().st_size < 24 << 10 for p in (*GOLDEN.glob("*.hb"), *ERRORS.glob("*.hb")))


@pytest.mark.parametrize("name", sorted(GOOD))
def test_good_file(name: str) -> None:
    """Same bytes, same dequantised bits, same logits on the reference (float functions differ by machine)."""
    now, kept = describe(GOLDEN / name), GOOD[name]
    assert now["sha256"] == kept["sha256"]
    assert now["values"] == kept["values"]
    for key, rows in kept["logits"].items():
        want = np.array(rows)
        assert np.abs(want).max() > 1e-3
        np.testing.assert_allclose(np.array(now["logits"][key]), want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_golden_program_uses_every_op() -> None:
    """What is kept covers the whole op table of its version, and states that version."""
    for name, minor in (("1.0-q4.hb", 0), ("1.1-q3.hb", 1), ("1.1-a4.k256.hb", 1)):
        file = File(GOLDEN / name)
        assert file.version == (1, minor)
        assert {int(r["code"]) for r in file.program} == {op.code for op in OPS if op.minor <= minor}
    file = File(GOLDEN / "1.0-q4.hb")
    assert file.metadata["golden.bytes"] == b"\x00\x01\xff"
    assert file.section("TOKN") == b'{"model":"golden"}' and file.section("TMPL") == b"{{ messages }}"


def test_golden_annotations() -> None:
    """Both are read, and the file says that it needs the version that brought them."""
    file = File(GOLDEN / "1.2-annotations.hb")
    file.verify()
    assert file.version == (1, 2) and list(file.sections)[-3:] == ["DATA", "PROF", "KVMD"]
    assert {kind: annotation.read(file, kind) for kind in ANNOTATIONS} == ANNOTATIONS


def test_writing_is_deterministic(tmp_path: Path) -> None:
    """The same model gives the same bytes."""
    a = build("q4", 4).write(tmp_path / "a.hb").path.read_bytes()
    assert a == build("q4", 4).write(tmp_path / "b.hb").path.read_bytes()


def test_golden_files_are_not_rewritten() -> None:
    """The script refuses, with and without its flag, while the version has files."""
    script = Path(__file__).resolve().parent / "make_golden.py"
    before = RECORD.read_bytes()
    for flags in ([], ["--new-version"]):
        done = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True)
        assert done.returncode == 1 and "golden files" in done.stderr
    assert RECORD.read_bytes() == before


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_file(name: str) -> None:
    """The intended check fires; the message is one line and names the file."""
    with pytest.raises(FormatError) as caught:
        File(ERRORS / name).verify()
    message = str(caught.value)
    assert HOSTILE[name] in message
    assert len(message.splitlines()) == 1 and name in message


def test_every_refusal_of_the_reader_is_shown() -> None:
    """Each message in container.py and metadata.py is caused by some hostile file."""
    messages = []
    for name in HOSTILE:
        with pytest.raises(FormatError) as caught:
            File(ERRORS / name).verify()
        messages.append(str(caught.value))
    refusals = []
    for module in (container, metadata):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and node.args and not isinstance(node.args[0], ast.Name):
                name = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                if name in ("FormatError", "_bad", "ValueError"):
                    constants = [n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant)]
                    refusals.append([c for c in constants if isinstance(c, str) and len(c) > 6])
    elsewhere = ([" cannot be stored: "], [": not a regular file"])  # of the writer, and in test_open.py
    unseen = [parts for parts in refusals if parts[-1:] not in elsewhere]
    assert len(unseen) > 40
    assert [parts for parts in unseen if not any(all(p in m for p in parts) for m in messages)] == []


def test_what_a_newer_minor_version_may_add(tmp_path: Path) -> None:
    """A newer minor number and an unknown section that need not be understood are no obstacle."""
    parts = Parts(File(GOLDEN / "1.1-q3.hb"))
    parts.header_edits.append((10, b"\x05\x00"))
    parts.extra.append(Section(b"NEWS", b"a section of the future", 0))
    path = tmp_path / "newer.hb"
    path.write_bytes(parts.build())
    file = File(path)
    file.verify()
    assert file.version == (1, 5) and file.section("NEWS") == b"a section of the future"
