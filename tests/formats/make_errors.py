"""Writes golden_errors/*.hb and expected.json: files that are wrong in exactly one place, digests corrected.

Each is a small valid file with one lie; `expected.json` gives, for each, a fragment of the one-line
message that opening and verifying it must raise. `python tests/formats/make_errors.py` rewrites all.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from halfbyte.formats import metadata, program
from halfbyte.formats.container import File

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "ops"))
from parts import Parts, Section, redigest_header
from programs import Tiny, code_matrix

FOLDER = Path(__file__).resolve().parent / "golden_errors"
Change = Callable[[Parts], bytes | None]
ERRORS: dict[str, tuple[str, Change, Callable[[Path], File]]] = {}


def base(path: Path) -> File:
    """The valid file that most lies start from: 8-bit table, norm, attention, logits."""
    t = Tiny(7)
    table = t.tensor(code_matrix("table", "i8", 16, 16, t.rng, 8, "f16"))
    norm = t.vector(t.rng.normal(1, 0.1, 16))
    freq = t.vector(np.ones(2))
    x, qkv, y = t.slot(16), t.slot(48), t.slot(16)
    head = t.tensor(code_matrix("head", "q4", 48, 16, t.rng))
    t.caches.append((2, 8, 8, 0))
    t.emit("embed", [x], [], (table,))
    t.emit("rmsnorm", [y], [x], (norm,), eps=1e-5, dim=16)
    t.emit("linear", [qkv], [y], (head, None))
    q, k, v = (t.view(qkv, a, 16) for a in (0, 16, 32))
    t.emit("rope", [q], [q], (freq,), head_dim=8, mscale=1.0)
    t.emit("kv_put", [], [k, v], cache=0)
    t.emit("attend", [y], [q], cache=0, scale=1.0, softcap=0.0)
    t.emit("glu", [t.slot(8)], [y], function=3)
    t.emit("unary", [y], [y], function=2, p=30.0)
    t.finish(y)
    return t.write(path, {"general.name": "hostile"}, b"{}")


def newer(path: Path) -> File:
    """The same for what version 1.1 added: two-level scales, codes in two planes, 8-bit floats, index vectors."""
    t = Tiny(11)
    table = t.tensor(code_matrix("table", "a4", 16, 272, t.rng, 32, "k256"))
    index = t.index(t.rng.permutation(272)[:48])
    head = t.tensor(code_matrix("head", "q3", 40, 48, t.rng))
    tail = t.tensor(code_matrix("tail", "f8e4m3", 16, 40, t.rng, 0, "f32"))
    other = t.tensor(code_matrix("other", "i6", 16, 40, t.rng, 16, "k256"))
    x, some, h, a, b = (t.slot(n) for n in (272, 48, 40, 16, 16))
    t.emit("embed", [x], [], (table,))
    t.emit("hadamard", [x], [x], dim=16)
    t.emit("gather", [some], [x], (index,))
    t.emit("linear", [h], [some], (head, None))
    t.emit("linear", [a], [h], (tail, None))
    t.emit("linear", [b], [h], (other, None))
    t.emit("add", [a], [a, b], scale=1.0)
    t.finish(a)
    return t.write(path, {"general.name": "hostile"}, b"{}")


def lie(
    fragment: str, name: str | None = None, base: Callable[[Path], File] = base
) -> Callable[[Change], Change]:
    """Register a change of a valid file and the fragment of the message that it must cause."""

    def register(change: Change) -> Change:
        key = name or change.__name__
        assert key not in ERRORS
        ERRORS[key] = (fragment, change, base)
        return change

    return register


def simple(
    name: str, fragment: str, change: Callable[[Parts], object], base: Callable[[Path], File] = base
) -> None:
    """A change of an attribute of Parts."""

    def apply(p: Parts) -> bytes | None:
        change(p)
        return None

    lie(fragment, name, base)(apply)


def setter(what: str, index: int, field: str, value: object) -> Callable[[Parts], object]:
    """Set one field of a record of `slots`, `caches`, `program` or `tensors`."""

    def change(p: Parts) -> None:
        getattr(p, what)[index][field] = value

    return change


def element(what: str, index: int, field: str, i: int, value: int) -> Callable[[Parts], object]:
    """Set one element of an array field."""

    def change(p: Parts) -> None:
        getattr(p, what)[index][field][i] = value

    return change


def raw(name: str, fragment: str, change: Callable[[bytearray], bytes | bytearray | None]) -> None:
    """A change of the bytes of the valid file, nothing re-digested."""

    def apply(p: Parts) -> bytes:
        body = bytearray(p.build())
        changed = change(body)
        return bytes(body if changed is None else changed)

    lie(fragment, name)(apply)


def write_at(at: int, value: bytes) -> Callable[[bytearray], None]:
    """Overwrite bytes."""

    def change(body: bytearray) -> None:
        body[at : at + len(value)] = value

    return change


def u32(v: int) -> bytes:
    return struct.pack("<I", v)


def u64(v: int) -> bytes:
    return struct.pack("<Q", v)


# ---- header ---------------------------------------------------------------------------------------
raw("magic", "not a .hb file", write_at(0, b"\x88"))
raw("magic_text_mode", "not a .hb file", lambda b: b.replace(b"\r\n", b"\n", 1))
raw("magic_gguf", "convert it first", write_at(0, b"GGUF\3\0\0\0"))
raw("flipped_header_bit", "the header is damaged", write_at(33, b"\0\0"))
raw("flipped_section_table_bit", "the header is damaged", write_at(68, b"\3"))
raw("empty", "too short", lambda b: b"")
raw("short", "too short", lambda b: b[:63])
for n in (64, 100, 640, 1000, 16384, 16385):
    raw(f"truncated_{n}", "truncated or extended", lambda b, n=n: b[:n])
raw("extended", "truncated or extended", lambda b: b + b"\0")
simple("newer_major", "upgrade halfbyte", lambda p: p.header_edits.append((8, b"\2\0")))
simple("older_major", "upgrade halfbyte", lambda p: p.header_edits.append((8, b"\0\0")))
simple("header_reserved", "reserved header field", lambda p: p.header_edits.append((24, b"\1")))
raw("sections_zero", "0 sections do not fit", write_at(12, u32(0)))
raw("sections_many", "65 sections do not fit", write_at(12, u32(65)))
raw("sections_overflow", "4294967295 sections do not fit", write_at(12, u32(0xFFFFFFFF)))

# ---- section table: row i is at 64 * i; kind 0, flags 4, offset 8, length 16, zero 24 ---------------
META, TOKN, SLOT, KVCA, PROG, TENS, DATA = range(7)
simple("section_hole", "section TOKN: offset", lambda p: p.spaced.update({b"TOKN": 64}))
simple("section_unaligned", "section PROG: offset", lambda p: p.spaced.update({b"PROG": 8}))
simple("section_overlap", "section SLOT: offset", lambda p: p.table_edits.append((64 * SLOT + 8, u64(512))))
simple(
    "section_offset_overflow", "section META: offset", lambda p: p.table_edits.append((8, u64(2**64 - 64)))
)
simple("section_outside", "DATA lies outside", lambda p: p.table_edits.append((64 * DATA + 16, u64(1 << 40))))
simple("section_length_overflow", "META lies outside", lambda p: p.table_edits.append((16, u64(2**64 - 1))))
simple("section_flags", "section META: a reserved", lambda p: p.table_edits.append((4, u32(3))))
simple("section_reserved", "section META: a reserved", lambda p: p.table_edits.append((24, u64(1))))
simple(
    "section_newline", "its kind is not four printable", lambda p: p.extra.append(Section(b"A\nB\n", b"", 0))
)
simple(
    "section_ascii",
    "its kind is not four printable",
    lambda p: p.extra.append(Section(b"\xff" * 4, b"", 0)),
)
simple(
    "section_kind_short", "its kind is not four printable", lambda p: p.extra.append(Section(b"AB", b"", 0))
)
simple("section_twice", "section TENS appears twice", lambda p: p.extra.append(Section(b"TENS", b"")))
simple("section_unknown", "must be understood", lambda p: p.extra.append(Section(b"NEWS", b"new")))
simple("bytes_after_sections", "bytes after the last section", lambda p: setattr(p, "tail", b"\0" * 64))
for kind in (b"META", b"SLOT", b"KVCA", b"PROG", b"TENS"):
    simple(
        f"missing_{kind.decode()}", f"section {kind.decode()} is missing", lambda p, k=kind: p.dropped.add(k)
    )


@lie("section DATA is missing")
def missing_DATA(p: Parts) -> None:  # noqa: N802
    p.dropped.add(b"DATA")


@lie("section META is damaged")
def flipped_metadata_bit(p: Parts) -> bytes:
    body = bytearray(p.build())
    body[np.frombuffer(body, "<u8", 1, 64 + 8)[0] + 20] ^= 1
    return bytes(body)


@lie("section PROG is damaged")
def flipped_program_bit(p: Parts) -> bytes:
    body = bytearray(p.build())
    body[np.frombuffer(body, "<u8", 1, 64 + 64 * PROG + 8)[0]] ^= 1
    return bytes(body)


@lie("section TOKN is damaged")
def flipped_tokenizer_bit(p: Parts) -> bytes:
    body = bytearray(p.build())
    body[np.frombuffer(body, "<u8", 1, 64 + 64 * TOKN + 8)[0]] ^= 1
    return bytes(body)


@lie("section TMPL is not UTF-8")
def template_utf8(p: Parts) -> None:
    p.blobs[b"TMPL"] = b"\xff"


@lie("tensor table is damaged", "tensor_is_damaged")
def _flipped_data_bit(p: Parts) -> bytes:
    body = bytearray(p.build())
    body[16384 + 3] ^= 1
    return bytes(body)


@lie("is not zero")
def padding(p: Parts) -> bytes:
    body = bytearray(p.build())
    body[16383] = 1
    return bytes(body)


@lie("the data digest does not match")
def data_digest(p: Parts) -> bytes:
    body = bytearray(p.build())
    body[64 + 64 * DATA + 32] ^= 1
    redigest_header(body)
    return bytes(body)


# ---- metadata -------------------------------------------------------------------------------------
def meta(name: str, fragment: str, change: Callable[[dict], bytes]) -> None:
    """Replace the META bytes."""
    simple(f"metadata_{name}", fragment, lambda p: setattr(p, "meta_bytes", change(p.meta)))


def entry(kind: int, key: bytes, value: bytes) -> bytes:
    """One entry, padded."""
    out = struct.pack("<HHI", kind, len(key), len(value)) + key + value
    return out + bytes(-len(out) % 8)


meta("type", "unknown type 99", lambda m: entry(99, b"a", b""))
meta("unsorted", "not sorted and unique", lambda m: entry(2, b"b", u64(1)) + entry(2, b"a", u64(1)))
meta("twice", "not sorted and unique", lambda m: entry(2, b"a", u64(1)) + entry(2, b"a", u64(1)))
meta("empty_key", "not sorted and unique", lambda m: entry(2, b"", u64(1)))
meta("trailing", "metadata is cut off", lambda m: metadata.encode(m) + b"\0\0\0\0")
meta("cut_off", "metadata is cut off", lambda m: metadata.encode(m)[:-8])
meta("length_overflow", "metadata is cut off", lambda m: struct.pack("<HHI", 4, 1, 0xFFFFFFFF) + b"a")
meta("padding", "nonzero padding", lambda m: entry(4, b"a", b"b")[:-1] + b"\1")
meta("no_padding", "nonzero padding", lambda m: entry(4, b"a", b"b")[:-6])
meta("key_utf8", "metadata is damaged", lambda m: entry(2, b"\xff", u64(1)))
meta("value_utf8", "metadata is damaged", lambda m: entry(4, b"a", b"\xc0\x80"))
meta("bool", "not a bool", lambda m: entry(1, b"a", b"\2"))
meta("int_short", "metadata is damaged", lambda m: entry(2, b"a", b"\0\0\0\0"))
meta("ints_odd", "not a multiple of 8", lambda m: entry(6, b"a", b"\0\0\0\0"))
meta("strs_cut", "a string is cut off", lambda m: entry(8, b"a", u32(5) + b"abc"))
meta("strs_head", "a string is cut off", lambda m: entry(8, b"a", b"\0\0"))
meta("empty_floats", "an empty list is stored as ints", lambda m: entry(7, b"a", b""))


def key(name: str, fragment: str, key: str, value: object) -> None:
    """Set one metadata value."""
    simple(name, fragment, lambda p: p.meta.update({key: value}))


simple("vocab_missing", "lacks model.vocab_size", lambda p: p.meta.pop("model.vocab_size"))
simple("context_missing", "lacks model.context_length", lambda p: p.meta.pop("model.context_length"))
key("vocab_bool", "model.vocab_size is not of type int", "model.vocab_size", True)
key("vocab_zero", "model.vocab_size 0 is out of range", "model.vocab_size", 0)
key("vocab_mismatch", "does not produce logits of 15", "model.vocab_size", 15)
key("vocab_beyond_table", "fewer rows than the 17", "model.vocab_size", 17)
key("context_negative", "model.context_length -1 is out of range", "model.context_length", -1)
key("context_overflow", "is out of range", "model.context_length", 1 << 40)
key("eos_type", "tokenizer.eos_ids is not of type ints", "tokenizer.eos_ids", 2)

# ---- tensor table: rows are 0 table i8 [16, 16], 1 norm f32 [16], 2 freq f32 [2], 3 head q4 [48, 16] -------
simple("tensors_overflow", "do not fit the tensor table", lambda p: p.counts.__setitem__(0, 0xFFFFFFFF))
simple("tensors_fewer", "do not fit the tensor table", lambda p: p.counts.__setitem__(0, 3))
simple("names_overflow", "do not fit the tensor table", lambda p: p.counts.__setitem__(1, 0xFFFFFFFF))
simple("tensor_table_short", "tensor table is cut off", lambda p: setattr(p, "tens_bytes", bytes(32)))
simple("tensor_table_reserved", "tensor table is cut off", lambda p: setattr(p, "tens_bytes", b"\1" * 64))
simple("name_outside", "its name lies outside", setter("tensors", 1, "name_offset", 0xFFFFFFFF))
simple("name_length", "its name lies outside", setter("tensors", 1, "name_length", 0xFFFFFFFF))
simple("name_empty", "its name lies outside", setter("tensors", 1, "name_length", 0))
simple("name_long", "its name lies outside", lambda p: p.set_names([b"a" * 256, b"b", b"c", b"d"]))
simple("name_utf8", "not UTF-8", lambda p: p.set_names([b"\xff\xfe", b"b", b"c", b"d"]))
simple("name_newline", "has control characters", lambda p: p.set_names([b"a\nb", b"b", b"c", b"d"]))
simple("name_escape", "has control characters", lambda p: p.set_names([b"\x1b[31m", b"b", b"c", b"d"]))
simple("name_twice", "appears twice", lambda p: p.set_names([b"a", b"b", b"a", b"d"]))
simple("encoding_unknown", "unknown encoding 999", setter("tensors", 0, "encoding", 999))
simple("tile_unknown", "tile 2 with rank 2", setter("tensors", 0, "tile", 2))
simple("rank_zero", "tile 0 with rank 0", setter("tensors", 1, "rank", 0))
simple("rank_overflow", "with rank 4294967295", setter("tensors", 0, "rank", 0xFFFFFFFF))
simple("vector_of_codes", "tile 0 with rank 1", setter("tensors", 1, "encoding", 32))
simple("shape_zero", "is out of range", element("tensors", 0, "shape", 0, 0))
simple("shape_overflow", "is out of range", element("tensors", 0, "shape", 0, 0xFFFFFFFF))
simple("shape_third", "is out of range", element("tensors", 0, "shape", 2, 1))
simple("shape_large", "bytes, but i8", element("tensors", 0, "shape", 0, 1 << 28))
simple("length_mismatch", "bytes, but i8", setter("tensors", 0, "length", 255))
simple("group_odd", "is not allowed for i8", setter("tensors", 0, "group", 12))
simple("group_large", "is not allowed for i8", setter("tensors", 0, "group", 0xFFFFFFE0))
simple("group_fixed", "is not allowed for q4", setter("tensors", 3, "group", 64))
simple("group_of_floats", "is not allowed for f32", setter("tensors", 1, "group", 32))
simple("scale_type_code", "is not allowed for i8", setter("tensors", 0, "scale_type", 16))
simple("scale_type_unknown", "is not allowed for q4", setter("tensors", 3, "scale_type", 999))
simple("tensor_reserved", "a reserved field is not zero", setter("tensors", 2, "zero", 1))
simple(
    "tensor_reserved_tail", "a reserved field is not zero", setter("tensors", 2, "zero2", np.void(b"\1" * 32))
)
simple("tensor_overlap", "offset leaves a hole or overlaps", setter("tensors", 1, "offset", 0))
simple("tensor_hole", "offset leaves a hole or overlaps", setter("tensors", 1, "offset", 4096))
simple("tensor_offset_overflow", "offset leaves a hole", setter("tensors", 1, "offset", 2**64 - 64))
simple("tensor_outside", "lies outside the data", lambda p: p.data.__delitem__(slice(-1, None)))
simple("data_tail", "bytes after the last tensor", lambda p: p.data.extend(b"\0"))

# ---- slots, caches, program: records 0 embed 1 rmsnorm 2 linear 3 rope 4 kv_put 5 attend 6 glu 7 unary 8 pick ----
simple("slots_cut", "not a whole number of records", lambda p: setattr(p, "slots", p.slots.view("u1")[:-1]))
simple(
    "program_cut", "not a whole number of records", lambda p: setattr(p, "program", p.program.view("u1")[:-8])
)
simple("program_empty", "a program of 0 records", lambda p: setattr(p, "program", p.program[:0]))
simple("op_unknown", "record 1: unknown op 4242", setter("program", 1, "code", 4242))
simple("op_flags", "record 1 (rmsnorm): unknown flags", setter("program", 1, "flags", 1))
simple("function_unknown", "unknown function 77", element("program", 7, "attr", 0, 77))
simple("function_parametric", "function softcap takes a parameter", element("program", 6, "attr", 0, 2))
simple("attribute_nan", "eps is not finite", element("program", 1, "attr", 0, 0x7FC00000))
simple("slot_cycle", "is not a base slot", setter("slots", 4, "base", 5))
simple("slot_base_outside", "is not a base slot", setter("slots", 4, "base", 0xFFFFFFFE))
simple("slot_width", "width 0 is out of range", setter("slots", 0, "width", 0))
simple("slot_wide", "width 4294967295 is out of range", setter("slots", 0, "width", 0xFFFFFFFF))
simple("view_outside", "does not lie inside slot", setter("slots", 5, "offset", 40))
simple("view_offset_overflow", "does not lie inside slot", setter("slots", 5, "offset", 0xFFFFFFFF))
simple("read_before_write", "is read before it is written", lambda p: setattr(p, "program", p.program[1:]))
simple("slot_outside", "slot 99 does not exist", element("program", 1, "in", 0, 99))
simple("weight_outside", "tensor 99 does not exist", element("program", 1, "w", 0, 99))
simple("cache_outside", "cache 1 does not exist", element("program", 4, "attr", 0, 1))
simple("cache_dim", "k_dim 0 is out of range", setter("caches", 0, "k_dim", 0))
simple("cache_heads", "do not fit cache 0", setter("caches", 0, "kv_heads", 1))


@lie("the slots together are wider", "slots_memory")
def _slots_memory(p: Parts) -> None:
    many = np.zeros(5, program.SLOT_DTYPE)
    many["width"], many["base"] = program.MAX_WIDTH, len(p.slots) + np.arange(5)
    p.slots = np.concatenate([p.slots, many])


# ---- version 1.1: tensors are 0 table a4 k256 [16, 272], 1 index u32 [48], 2 head q3 [40, 48], 3 tail f8e4m3 [16, 40],
# 4 other i6 k256 [16, 40]; records 0 embed 1 hadamard 2 gather 3 linear 4 linear 5 linear 6 add 7 pick
def index(at: int, value: int) -> Callable[[Parts], object]:
    """Set an element of the index vector."""

    def change(p: Parts) -> None:
        start = int(p.tensors[1]["offset"]) + 4 * at
        p.data[start : start + 4] = u32(value)

    return change


for name, fragment, change in (
    ("index_beyond", "index reaches column 272 of 272", index(7, 272)),
    ("index_overflow", "index reaches column 4294967295 of 272", index(47, 0xFFFFFFFF)),
    ("index_of_floats", "index must be a u32 vector of 48", setter("tensors", 1, "encoding", 1)),
    ("index_length", "u32 (47,) takes 188", element("tensors", 1, "shape", 0, 47)),
    ("index_is_a_matrix", "index must be a u32 vector of 48", element("program", 2, "w", 0, 2)),
    ("index_tile", "tile 1 with rank 2 is not known for u32", setter("tensors", 2, "encoding", 4)),
    ("float8_vector", "tile 0 with rank 1 is not known for f8e4m3", setter("tensors", 1, "encoding", 64)),
    ("hadamard_zero", "dim 0 is not a power of two", element("program", 1, "attr", 0, 0)),
    ("hadamard_odd", "dim 17 is not a power of two", element("program", 1, "attr", 0, 17)),
    ("hadamard_large", "dim 32 does not divide 272", element("program", 1, "attr", 0, 32)),
    ("hadamard_overflow", "dim 2147483648 does not divide", element("program", 1, "attr", 0, 1 << 31)),
    ("k256_group", "group 64 or scale type 256 is not allowed for a4", setter("tensors", 0, "group", 64)),
    ("k256_whole_row", "group 0 or scale type 256 is not allowed for i6", setter("tensors", 4, "group", 0)),
    ("k256_zero_point", "scale type 256 is not allowed for z4", setter("tensors", 0, "encoding", 37)),
    ("k256_searched", "scale type 256 is not allowed for q3", setter("tensors", 2, "scale_type", 256)),
    ("k256_float8", "scale type 256 is not allowed for f8e4m3", setter("tensors", 3, "scale_type", 256)),
    ("k256_unknown", "scale type 257 is not allowed for a4", setter("tensors", 0, "scale_type", 257)),
    ("scale_type_index", "scale type 4 is not allowed for a4", setter("tensors", 0, "scale_type", 4)),
    ("scale_type_missing", "scale type 0 is not allowed for f8e4m3", setter("tensors", 3, "scale_type", 0)),
    ("searched_group", "group 16 or scale type 0 is not allowed for q3", setter("tensors", 2, "group", 16)),
    ("plane_high", "but q2 (40, 48) takes", setter("tensors", 2, "encoding", 19)),
    ("plane_super", "but a4 (16, 272) takes", setter("tensors", 0, "length", 2752)),
    ("plane_supermin", "but n4 (16, 272) takes", setter("tensors", 0, "encoding", 48)),
    ("planes_large", "bytes, but i6", element("tensors", 4, "shape", 1, 1 << 28)),
):
    simple(name, fragment, change, newer)


def main() -> None:
    """Write every file and the expectations."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.hb"):
        old.unlink()
    expected = {}
    with tempfile.TemporaryDirectory() as folder:
        bases = {}
        for make in (base, newer):
            bases[make] = make(Path(folder) / f"{make.__name__}.hb")
            bases[make].verify()
        for name, (fragment, change, make) in sorted(ERRORS.items()):
            parts = Parts(bases[make])
            body = change(parts)
            (FOLDER / f"{name}.hb").write_bytes(parts.build() if body is None else body)
            expected[f"{name}.hb"] = fragment
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
