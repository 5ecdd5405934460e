"""Round trips: what is packed, written and opened comes back bit for bit; what is not canonical is refused."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from programs import Logical, Tiny, code_matrix, float_tensor

from halfbyte.formats import encodings, metadata, tiles
from halfbyte.formats.container import DATA_ALIGNMENT, SECTION_ALIGNMENT, File
from halfbyte.formats.encodings import MATRIX_ENCODINGS, SCALE_TYPES, parameters_are_valid
from halfbyte.formats.errors import FormatError, HalfbyteError, UsageError
from halfbyte.formats.writer import TensorSpec, Writer

CODED = [e.name for e in MATRIX_ENCODINGS if e.has_codes]


def carrier() -> Tiny:
    """A smallest program, to which tensors are added."""
    t = Tiny(3)
    x = t.slot(4)
    t.emit("embed", [x], [], (t.tensor(float_tensor("embed", t.values(8, 4))),))
    t.finish(x)
    return t


def random_matrix(encoding: str, rows: int, cols: int, rng: np.random.Generator, i: int) -> Logical:
    """Random stored bits of an encoding; groups and scale types in turn."""
    name = f"{encoding}.{rows}x{cols}"
    if encoding in CODED:
        group, scale = (0, 4, 8, 16, 32, 64, 128)[i % 7], ("f32", "f16", "bf16")[i % 3]
        e = encodings.BY_NAME[encoding]
        if e.scale == "*" and parameters_are_valid(e, group, encodings.K256) and i % 2:
            scale = encodings.K256
        return code_matrix(name, encoding, rows, cols, rng, group, scale)
    return float_tensor(name, rng.normal(size=(rows, cols)).astype(np.float32), encoding)


@pytest.mark.parametrize("encoding", [e.name for e in MATRIX_ENCODINGS])
def test_every_tail_comes_back(encoding: str, tmp_path: Path) -> None:
    """Rows and columns from 1 to 40, every plane equal to what was packed; padding is zero."""
    rng = np.random.default_rng(len(encoding))
    t = carrier()
    shapes = [(n, 41 - n) for n in range(1, 41)] + [(n, n) for n in range(1, 41, 3)] + [(17, 33), (16, 32)]
    shapes += [(18, 255), (16, 256), (3, 257), (33, 300), (17, 513)]  # about and beyond 256 columns
    made = [random_matrix(encoding, r, c, rng, i) for i, (r, c) in enumerate(dict.fromkeys(shapes))]
    for m in made:
        t.tensor(m)
    file = t.write(tmp_path / "t.hb")
    file.verify()
    for m in made:
        tensor = file.tensors[file.tensor_index[m.spec.name]]
        assert (tensor.encoding, tensor.shape, tensor.offset % 64) == (encoding, m.spec.shape, 0)
        if encoding in CODED:
            got = file.codes(tensor)
            assert set(got) == set(m.planes)
            for plane, want in m.planes.items():
                np.testing.assert_array_equal(got[plane], want)
                assert got[plane].dtype == want.dtype
        else:
            values = encodings.bits_to_float(m.planes["values"], encoding)
            np.testing.assert_array_equal(file.dequantize(tensor), values)
        stored = file.raw(tensor)
        inside = np.zeros(len(stored), bool)
        for p in tensor.planes:
            assert p.offset % tiles.ALIGNMENT == 0
            inside[p.offset : p.offset + p.nbytes] = True
        assert not stored[~inside].any()


def test_the_tile_is_the_text_of_the_spec() -> None:
    """Byte positions of SPEC.md 6.1 and 6.2, by the scalar formulas."""
    rng = np.random.default_rng(0)
    rows, cols = 35, 41
    codes = rng.integers(0, 256, (rows, cols)).astype(np.uint8)
    plane = tiles.pack_codes(codes, 8)
    k = 64  # columns rounded up to 32
    assert len(plane) == 48 * k
    for i in range(48):
        for j in range(k):
            want = codes[i, j] if i < rows and j < cols else 0
            assert plane[(i // 16) * 16 * k + (j // 4) * 64 + (i % 16) * 4 + j % 4] == want
    nibbles = codes & 15
    plane = tiles.pack_codes(nibbles, 4)
    assert len(plane) == 48 * k // 2
    for i in range(48):
        for j in range(k):
            byte = plane[(i // 16) * 8 * k + (j // 8) * 64 + (i % 16) * 4 + j % 4]
            assert (byte >> (4 * (j % 8 // 4))) & 15 == (nibbles[i, j] if i < rows and j < cols else 0)
    for bits, columns in ((2, 16), (1, 32)):
        fields = codes & ((1 << bits) - 1)
        plane = tiles.pack_codes(fields, bits)
        assert len(plane) == 48 * k * bits // 8
        for i in range(48):
            for j in range(k):
                byte = plane[(i // 16) * 2 * k * bits + (j // columns) * 64 + (i % 16) * 4 + j % 4]
                want = fields[i, j] if i < rows and j < cols else 0
                assert (byte >> (bits * (j % columns // 4))) & ((1 << bits) - 1) == want
    values = rng.normal(size=(rows, 3))
    plane = tiles.pack_groups(values)
    for i in range(48):
        for g in range(3):
            assert plane[(i // 16) * 48 + g * 16 + i % 16] == (values[i, g] if i < rows else 0)


@pytest.mark.parametrize(("bits", "low", "high"), [(3, 2, 1), (5, 4, 1), (6, 4, 2)])
def test_codes_in_two_planes(bits: int, low: int, high: int) -> None:
    """`codes` holds the low bits and `high` the others; together they are the codes."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (35, 41)).astype(np.uint8)
    planes = tiles.pack_code_planes(codes, bits)
    assert list(planes) == ["codes", "high"]
    np.testing.assert_array_equal(tiles.unpack_codes(planes["codes"], low, 35, 41), codes % (1 << low))
    np.testing.assert_array_equal(tiles.unpack_codes(planes["high"], high, 35, 41), codes >> low)
    np.testing.assert_array_equal(tiles.unpack_code_planes(planes, bits, 35, 41), codes)


def test_the_example_of_two_planes() -> None:
    """SPEC.md 6.2: element (17, 13) of a q3 matrix of 40 rows and 44 columns."""
    codes = np.zeros((40, 44), np.uint8)
    codes[17, 13] = 7
    planes = {p.name: p for p in tiles.planes("q3", 40, 44, 32, "")}
    assert [(n, p.offset, p.nbytes) for n, p in planes.items()] == [
        ("codes", 0, 768), ("high", 768, 384), ("scales", 1152, 96), ("row", 1280, 48)
    ]  # fmt: skip
    stored = tiles.pack_code_planes(codes, 3)
    assert np.flatnonzero(stored["codes"]) == 261 and stored["codes"][261] == 0b11000000
    assert np.flatnonzero(stored["high"]) + 768 == 901 and stored["high"][133] == 0b1000


def test_vectors_and_names(tmp_path: Path) -> None:
    """Vectors in their stored type, names beyond ASCII, sections aligned as the spec says."""
    t = carrier()
    for e in ("f32", "f16", "bf16"):
        for n in (1, 31, 64, 77):
            t.tensor(float_tensor(f"vector é {e}.{n}", t.values(1, n)[0], e))
    t.index(t.rng.integers(0, 1 << 32, 77, dtype=np.uint64))
    file = t.write(tmp_path / "v.hb", tokenizer=b"{}", template="{{ x }}")
    file.verify()
    for m in t.tensors[1:]:
        tensor = file.tensors[file.tensor_index[m.spec.name]]
        np.testing.assert_array_equal(file.vector(tensor), m.planes["values"])
    for kind, (offset, _, _) in file.sections.items():
        assert offset % (DATA_ALIGNMENT if kind == "DATA" else SECTION_ALIGNMENT) == 0
    assert len(file.explain()) == 2


def test_float_conversions() -> None:
    """bf16 rounds to nearest even and keeps NaN; f16 overflows to infinity; E6M2 is its formula."""
    x = np.array(
        [1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -0.0, np.inf, np.nan, 3.4e38], np.float32
    )
    back = encodings.bits_to_float(encodings.float_to_bits(x, "bf16"), "bf16")
    np.testing.assert_array_equal(
        back, np.array([1, 1, 1 + 2**-6, 1 + 2**-7, -0.0, np.inf, np.nan, np.inf], np.float32)
    )
    assert np.isinf(encodings.float_to_bits(np.float32(70000), "f16"))
    for r in range(256):
        scale = 0.0 if r == 0 else (1 + (r & 3) / 4) * 2.0 ** ((r >> 2) - 60)
        assert float(encodings.e6m2_decode(np.uint8(r))) == scale


META: dict[str, metadata.Value] = {
    "a": True,
    "b": -5,
    "b2": (1 << 63) - 1,
    "c": 0.1,
    "d": "naïve 字",
    "e": b"\x00\xff",
    "f": [1, -2, 3],
    "g": [0.5, math.inf],
    "h": ["x", "", "字"],
    "i": [],
    "j": "",
    "z.long" * 20: False,
}


def test_metadata_round_trip() -> None:
    """Every type; keys sorted by code point; entries of 8 bytes."""
    data = metadata.encode(META)
    assert len(data) % 8 == 0 and metadata.decode(data) == META
    assert metadata.encode(dict(reversed(META.items()))) == data
    for (key, value), back in zip(sorted(META.items()), metadata.decode(data).values()):
        assert type(back) is type(value), key
    assert metadata.decode(b"") == {}


@pytest.mark.parametrize(
    "value",
    [1 << 63, [1 << 64], ["a", 1], "\ud800", [None], {"a": 1}, None, object()],
    ids=["int", "ints", "mixed", "surrogate", "nones", "dict", "none", "object"],
)
def test_metadata_that_no_type_holds(value: object) -> None:
    """One line, not a traceback."""
    with pytest.raises(FormatError, match="cannot be stored"):
        metadata.encode({"key": value})  # type: ignore[dict-item]


def test_only_the_canonical_metadata_is_read() -> None:
    """Whatever single byte changes, decoding refuses or gives metadata that encodes to those very bytes."""
    data = metadata.encode({"a": True, "bc": 7, "d": "text", "e": ["x", "yz"], "f": [], "g": [1.5]})
    accepted = 0
    for at in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            try:
                value = metadata.decode(bytes(changed))
            except FormatError:
                continue
            accepted += 1
            assert metadata.encode(value) == bytes(changed)
    assert accepted > 50


# ---- the writer ----------------------------------------------------------------------------------


def writer(path: Path, specs: list[TensorSpec] | None = None) -> Writer:
    """A writer of the smallest program."""
    t = carrier()
    return Writer(
        path,
        meta={"model.vocab_size": 4, "model.context_length": 8},
        slots=np.array(t.slots, "<u4,<u4,<u4,<u4"),
        caches=np.zeros((0, 4), "<u4"),
        program=np.array(t.records),
        tensors=specs or [t.tensors[0].spec],
    )


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_remains_after_an_exception(error: type[BaseException], tmp_path: Path) -> None:
    """Neither the file nor a partial one; an older file of that name stays as it was."""
    path = tmp_path / "m.hb"
    for existing in (False, True):
        if existing:
            path.write_bytes(b"older")
        with pytest.raises(error), writer(path) as w:
            assert [p.name for p in tmp_path.iterdir() if p != path] == [w.partial.name]
            raise error
        assert list(tmp_path.iterdir()) == ([path] if existing else [])
    assert path.read_bytes() == b"older"


def test_an_interrupt_while_space_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserving a large file takes seconds; Ctrl-C there leaves nothing either."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "truncate", interrupt)
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "m.hb"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places(tmp_path: Path) -> None:
    """A missing folder, a file in its place, a folder under the final name: one line, nothing left."""
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "taken.hb").mkdir()
    before = sorted(tmp_path.iterdir())
    for path in (tmp_path / "missing" / "m.hb", tmp_path / "file" / "m.hb", tmp_path / "taken.hb"):
        with pytest.raises(HalfbyteError, match="cannot write") as caught, writer(path):
            pass
        assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_without_permission(tmp_path: Path) -> None:
    """Root may write everywhere, so the attempt is made by a user that owns nothing."""
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write to a read-only folder")
        with pytest.raises(HalfbyteError, match="cannot write"), writer(folder / "m.hb"):
            pass
    finally:
        folder.chmod(0o755)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found when space is reserved or at the latest when writing; one line, nothing left."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    for name in ("posix_fallocate", "pwrite", "fsync"):
        if not hasattr(os, name):
            continue
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(HalfbyteError, match="No space left"), writer(tmp_path / "m.hb") as w:
                w.write(0, "values", 0, np.zeros(64, "<f4"))
        assert list(tmp_path.iterdir()) == []


def test_panels_in_any_order(tmp_path: Path) -> None:
    """Panels written one by one, backwards, give the same file as all at once."""
    rng = np.random.default_rng(1)
    m = code_matrix("m", "a4", 40, 44, rng, 16, "f16")
    t = carrier()
    t.tensor(m)
    whole = t.write(tmp_path / "a.hb")
    spec = [x.spec for x in t.tensors]
    with Writer(
        tmp_path / "b.hb", meta=dict(whole.metadata), slots=whole.slots, caches=whole.caches,
        program=whole.program, tensors=spec,
    ) as w:  # fmt: skip
        for plane in tiles.planes("a4", 40, 44, 16, "f16"):
            data = m.packed()[plane.name]
            n = plane.panel_bytes // data.itemsize
            for panel in (2, 0, 1):
                w.write(1, plane.name, panel, data[panel * n : (panel + 1) * n])
        w.write(0, "values", 0, t.tensors[0].packed()["values"])
    assert (tmp_path / "b.hb").read_bytes() == (tmp_path / "a.hb").read_bytes()


def test_reading_what_is_not_a_file(tmp_path: Path) -> None:
    """A missing path, a folder: one line."""
    for path in (tmp_path / "none.hb", tmp_path):
        with pytest.raises(FormatError) as caught:
            File(path)
        assert len(str(caught.value).splitlines()) == 1 and str(path) in str(caught.value)


def test_a_group_wider_than_the_row_is_a_whole_row(tmp_path: Path) -> None:
    """Group 128 of a 40-column matrix is written as group 0: one spelling, the same planes and values."""
    rng = np.random.default_rng(2)
    t = carrier()
    m = code_matrix("m", "z4", 20, 40, rng, 128, "f16")
    t.tensor(m)
    file = t.write(tmp_path / "g.hb")
    assert file.tensors[1].group == 0
    np.testing.assert_array_equal(file.codes(file.tensors[1])["scales"], m.planes["scales"])


def test_parameters_that_no_tensor_has(tmp_path: Path) -> None:
    """Every encoding with every group and scale type: writable when the table allows it, else refused by name."""
    allowed = refused = 0
    for e in MATRIX_ENCODINGS:
        for scale in SCALE_TYPES:
            for group in (0, 4, 8, 12, 16, 32, 48, 64, 256):
                spec = TensorSpec("m", e.name, (16, 512), group, scale)
                if e.scale == "*" and not parameters_are_valid(e, group, scale):
                    refused += 1
                    with pytest.raises(UsageError, match=f"tensor m: {e.name} cannot have"):
                        spec.resolved()
                    continue
                allowed += 1
                done = spec.resolved()
                assert parameters_are_valid(e, done.group, done.scale_type)
                assert tiles.nbytes(e.name, 16, 512, done.group, done.scale_type) > 0
    assert allowed > 200 and refused > 200
    for name, group, scale in (("i4", 32, "k256"), ("a4", 16, "k256"), ("f8e4m3", 0, "f32")):
        assert parameters_are_valid(encodings.BY_NAME[name], group, scale)
    for name, group, scale in (
        ("z4", 32, "k256"),
        ("f8e4m3", 32, "k256"),
        ("a4", 64, "k256"),
        ("q3", 32, "f16"),
    ):
        assert not parameters_are_valid(encodings.BY_NAME[name], group, scale)


def test_the_stated_version_is_the_lowest(tmp_path: Path) -> None:
    """1.0 for what 1.0 had; 1.1 for a new encoding, a new scale type or a new op."""
    rng = np.random.default_rng(3)
    makers = {
        "old": (0, lambda t: t.tensor(code_matrix("m", "a4", 16, 32, rng, 32, "f16"))),
        "encoding": (1, lambda t: t.tensor(code_matrix("m", "q3", 16, 32, rng))),
        "scales": (1, lambda t: t.tensor(code_matrix("m", "a4", 16, 32, rng, 32, "k256"))),
        "op": (1, lambda t: t.emit("hadamard", [0], [0], dim=4)),
    }
    for name, (minor, change) in makers.items():
        t = Tiny(3)
        x = t.slot(4)
        t.emit("embed", [x], [], (t.tensor(float_tensor("embed", t.values(8, 4))),))
        change(t)
        t.finish(x)
        assert t.write(tmp_path / f"{name}.hb").version == (1, minor)
