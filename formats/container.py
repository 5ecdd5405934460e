"""Reading a `.hb` file: header, section table, tensor table, and the checks that make it safe to map.

Nothing is allocated from a number in the file before that number is known to fit the bytes that
are there. Normative with SPEC.md sections 2, 3 and 9.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from . import metadata, program, tiles
from .encodings import (
    BY_CODE,
    BY_NAME,
    SCALE_NAMES,
    bits_to_float,
    decode,
    parameters_are_valid,
    stored_dtype,
    weights,
)
from .errors import FormatError

MAGIC = b"\x89hb\r\n\x1a\n\0"  # as PNG's: finds text-mode mangling and 7-bit transfers
VERSION = (1, 2)
SECTION_ALIGNMENT = 64
DATA_ALIGNMENT = 1 << 14  # a page on every machine, so that DATA can be mapped alone
MUST_UNDERSTAND = 1


@dataclass(frozen=True)
class SectionKind:
    """What a section is. An annotation lies after DATA with bit 0 clear: a reader may skip it (SPEC.md section 13)."""

    required: bool
    meaning: str
    minor: int = 0
    annotation: bool = False


# The order is the order in the file.
SECTIONS = {
    "META": SectionKind(True, "typed metadata"),
    "TOKN": SectionKind(False, "tokenizer, as the JSON of the `tokenizers` library"),
    "TMPL": SectionKind(False, "chat template, Jinja in UTF-8"),
    "SLOT": SectionKind(True, "activation slots"),
    "KVCA": SectionKind(True, "key/value caches"),
    "PROG": SectionKind(True, "program records"),
    "TENS": SectionKind(True, "tensor table and names"),
    "DATA": SectionKind(True, "tensor bytes"),
    "PROF": SectionKind(False, "proof: how close the file is to its float model", 2, True),
    "KVMD": SectionKind(False, "how close each mode of the key/value caches is", 2, True),
    "VOCB": SectionKind(False, "TOKN as tables, for readers without its library", 2, True),
    "CHAT": SectionKind(False, "TMPL as the texts between messages", 2, True),
}

HEADER_DTYPE = np.dtype(
    [("magic", "S8"), ("major", "<u2"), ("minor", "<u2"), ("sections", "<u4"), ("length", "<u8"),
     ("zero", "<u8"), ("digest", "V32")]
)  # fmt: skip
SECTION_DTYPE = np.dtype(
    [
        ("kind", "S4"),
        ("flags", "<u4"),
        ("offset", "<u8"),
        ("length", "<u8"),
        ("zero", "<u8"),
        ("digest", "V32"),
    ]
)
TENSOR_DTYPE = np.dtype(
    [("name_offset", "<u4"), ("name_length", "<u4"), ("encoding", "<u2"), ("tile", "<u2"), ("rank", "<u4"),
     ("shape", "<u4", 4), ("group", "<u4"), ("scale_type", "<u4"), ("offset", "<u8"), ("length", "<u8"),
     ("zero", "<u8"), ("digest", "V32"), ("zero2", "V32")]
)  # fmt: skip
TABLE_HEAD = 64  # TENS starts with u32 count, u32 names_length, zeros
assert HEADER_DTYPE.itemsize == 64 and SECTION_DTYPE.itemsize == 64 and TENSOR_DTYPE.itemsize == 128

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

MAX_SECTIONS = 64
MAX_DIMENSION = 1 << 28


@dataclass(frozen=True)
class Tensor:
    """One row of the tensor table. `offset` is from the start of the file."""

    name: str
    encoding: str
    tile: int
    shape: tuple[int, ...]
    group: int
    scale_type: str
    offset: int
    nbytes: int
    digest: bytes = b""

    @property
    def planes(self) -> list[tiles.Plane]:
        """Planes of a p16 matrix, offsets relative to the tensor."""
        rows, cols = self.shape
        return tiles.planes(self.encoding, rows, cols, self.group, self.scale_type)


def tensor_bytes(encoding: str, tile: int, shape: tuple[int, ...], group: int, scale_type: str) -> int:
    """Stored bytes of a tensor."""
    if tile == tiles.P16:
        return tiles.nbytes(encoding, shape[0], shape[1], group, scale_type)
    return shape[0] * stored_dtype(encoding).itemsize


def unpack(encoding: str, planes: dict[str, np.ndarray], rows: int, cols: int) -> dict[str, np.ndarray]:
    """Logical arrays of `rows` rows of a code matrix from its flat planes, which hold whole panels.

    codes is [rows, cols]; as stored, scales, mins and zeros are [rows, groups], super and supermin
    [rows, ceil(cols / 256)], row [rows].
    """
    e = BY_NAME[encoding]
    out = {"codes": tiles.unpack_code_planes(planes, e.bits, rows, cols, e.signed)}
    for name, a in planes.items():
        if name in ("codes", "high"):
            continue
        if name == "row":
            out[name] = tiles.unpack_groups(a, rows, 1)[:, 0]
        else:
            out[name] = tiles.unpack_groups(a, rows, len(a) // tiles.align(rows, tiles.PANEL))
    return out


def dequantize(
    encoding: str, planes: dict[str, np.ndarray], rows: int, cols: int, group: int, scale_type: str
) -> np.ndarray:
    """float32[rows, cols] from flat planes of whole panels."""
    if BY_NAME[encoding].is_float:
        return bits_to_float(tiles.unpack_groups(planes["values"], rows, cols), encoding)
    return weights(*decode(encoding, unpack(encoding, planes, rows, cols), group, scale_type), group)


def sha256(*parts: bytes | memoryview) -> bytes:
    """SHA-256 of the concatenation."""
    h = hashlib.sha256()
    for p in parts:
        h.update(p)
    return h.digest()


def _bad(why: str) -> FormatError:
    return FormatError(why)


class File:
    """An open, validated `.hb` file, mapped read-only.

    Opening checks the header, the section table, the metadata, the tensor table and the program, with
    the digests of their sections; the tokenizer's digest is checked when it is read, and everything
    else by `verify`. Raises FormatError in one line.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
                raise _bad(f"{path}: not a regular file")
            with open(path, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                if size < HEADER_DTYPE.itemsize:
                    raise _bad(f"{path}: {size} bytes is too short for a .hb file")
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise _bad(f"{path}: {error.strerror or error}") from None
        self.bytes = np.frombuffer(self._map, np.uint8)
        try:
            self._read()
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None

    # ---- opening ------------------------------------------------------------------------------

    def _read(self) -> None:
        header = self.bytes[:64].view(HEADER_DTYPE)[0]
        magic = bytes(self.bytes[:8])
        if magic != MAGIC:
            hint = "; convert it first: halfbyte convert" if magic[:4] == b"GGUF" else ""
            raise _bad(f"not a .hb file{hint}")
        self.version = (int(header["major"]), int(header["minor"]))
        if self.version[0] != VERSION[0]:
            raise _bad(
                f"format version {self.version[0]}.{self.version[1]} is not readable by this halfbyte"
                f" (it reads {VERSION[0]}.x); upgrade halfbyte or convert again"
            )
        if int(header["length"]) != len(self.bytes):
            said = int(header["length"])
            raise _bad(f"truncated or extended: the header says {said} bytes, found {len(self.bytes)}")
        count = int(header["sections"])
        if not 0 < count <= MAX_SECTIONS or 64 + 64 * count > len(self.bytes):
            raise _bad(f"{count} sections do not fit")
        table = self.bytes[64 : 64 + 64 * count]
        self.digest = header["digest"].tobytes()
        if sha256(self.bytes[:32].tobytes(), table.tobytes()) != self.digest:
            raise _bad("the header is damaged (its digest does not match)")
        if int(header["zero"]):
            raise _bad("a reserved header field is not zero")
        self.sections: dict[str, tuple[int, int, bytes]] = {}
        end = 64 + 64 * count
        for s in table.view(SECTION_DTYPE):
            end = self._read_section(s, end)
        if end != len(self.bytes):
            raise _bad("bytes after the last section")
        missing = [k for k, s in SECTIONS.items() if s.required and k not in self.sections]
        if missing:
            raise _bad(f"section {missing[0]} is missing")
        try:
            self._section("TMPL").decode()
        except UnicodeDecodeError:
            raise _bad("section TMPL is not UTF-8") from None
        self.metadata = metadata.decode(self._section("META"))
        self.slots = self._records("SLOT", program.SLOT_DTYPE)
        self.caches = self._records("KVCA", program.CACHE_DTYPE)
        self.program = self._records("PROG", program.OP_DTYPE)
        self.tensors = self._read_tensors()
        metadata.check_keys(self.metadata)
        vocab = self.metadata["model.vocab_size"]
        assert isinstance(vocab, int)
        program.verify(self.program, self.slots, self.caches, self.program_shapes, vocab)

    def _read_section(self, s: np.void, end: int) -> int:
        letters = bytes(s["kind"])
        if len(letters) != 4 or not all(0x20 < c < 0x7F for c in letters):
            raise _bad(f"section {letters!r}: its kind is not four printable ASCII characters")
        kind = letters.decode("ascii")
        offset, length = int(s["offset"]), int(s["length"])
        if kind not in SECTIONS and int(s["flags"]) & MUST_UNDERSTAND:
            raise _bad(f"section {kind!r} must be understood and is not; upgrade halfbyte")
        if int(s["flags"]) & ~MUST_UNDERSTAND or int(s["zero"]):
            raise _bad(f"section {kind}: a reserved field is not zero")
        if kind in self.sections:
            raise _bad(f"section {kind} appears twice")
        if offset != tiles.align(end, DATA_ALIGNMENT if kind == "DATA" else SECTION_ALIGNMENT):
            raise _bad(f"section {kind}: offset {offset} leaves a hole or overlaps")
        if offset > len(self.bytes) or length > len(self.bytes) - offset:
            raise _bad(f"section {kind} lies outside the file")
        self.sections[kind] = (offset, length, s["digest"].tobytes())
        return offset + length

    def _section(self, kind: str) -> bytes:
        if kind not in self.sections:
            return b""
        offset, length, digest = self.sections[kind]
        data = self.bytes[offset : offset + length].tobytes()
        if sha256(data) != digest:
            raise _bad(f"section {kind} is damaged (its digest does not match)")
        return data

    def _records(self, kind: str, dtype: np.dtype) -> np.ndarray:
        data = self._section(kind)
        if len(data) % dtype.itemsize:
            raise _bad(f"section {kind}: {len(data)} bytes is not a whole number of records")
        return np.frombuffer(data, dtype)

    def _read_tensors(self) -> list[Tensor]:
        data = self._section("TENS")
        if len(data) < TABLE_HEAD or any(data[8:TABLE_HEAD]):
            raise _bad("the tensor table is cut off")
        count, names_length = (int(v) for v in np.frombuffer(data, "<u4", 2))
        names_at = TABLE_HEAD + count * TENSOR_DTYPE.itemsize
        if names_at + names_length != len(data):
            raise _bad(f"{count} tensors do not fit the tensor table")
        base, size, _ = self.sections["DATA"]
        out, end, seen = [], 0, set()
        names = data[names_at:]
        for i, r in enumerate(np.frombuffer(data, TENSOR_DTYPE, count, TABLE_HEAD)):
            t = self._read_tensor(i, r, names, base)
            if t.offset != base + tiles.align(end):
                raise _bad(f"tensor {t.name}: offset leaves a hole or overlaps")
            end = t.offset - base + t.nbytes
            if end > size:
                raise _bad(f"tensor {t.name} lies outside the data")
            if t.name in seen:
                raise _bad(f"tensor {t.name} appears twice")
            seen.add(t.name)
            out.append(t)
        if end != size:
            raise _bad("bytes after the last tensor")
        return out

    def _read_tensor(self, i: int, r: np.void, names: bytes, base: int) -> Tensor:
        at, n, rank = int(r["name_offset"]), int(r["name_length"]), int(r["rank"])
        if at + n > len(names) or not 0 < n < 256:
            raise _bad(f"tensor {i}: its name lies outside the table")
        try:
            name = names[at : at + n].decode()
        except UnicodeDecodeError:
            raise _bad(f"tensor {i}: its name is not UTF-8") from None
        if _CONTROL.search(name):  # names are shown on terminals, and errors are one line
            raise _bad(f"tensor {i}: its name {name!r} has control characters")
        e = BY_CODE.get(int(r["encoding"]))
        if e is None:
            raise _bad(f"tensor {name}: unknown encoding {int(r['encoding'])}; a newer halfbyte may know it")
        tile, group = int(r["tile"]), int(r["group"])
        combined = (tile, rank) == ((tiles.ROWS, 1) if e.kind == "index" else (tiles.P16, 2))
        if not combined and not (e.is_float and (tile, rank) == (tiles.ROWS, 1)):
            raise _bad(f"tensor {name}: tile {tile} with rank {rank} is not known for {e.name}")
        shape = tuple(int(d) for d in r["shape"][:rank])
        if not all(0 < d <= MAX_DIMENSION for d in shape) or any(r["shape"][rank:]):
            raise _bad(f"tensor {name}: shape {shape} is out of range")
        scale_type = SCALE_NAMES.get(int(r["scale_type"]), "unknown")
        wide = e.scale == "*" and group > tiles.align(shape[-1], tiles.COLUMN_PAD)
        if wide or not parameters_are_valid(e, group, scale_type):
            given = f"group {group} or scale type {int(r['scale_type'])}"
            raise _bad(f"tensor {name}: {given} is not allowed for {e.name}")
        if int(r["zero"]) or r["zero2"].tobytes() != bytes(32):
            raise _bad(f"tensor {name}: a reserved field is not zero")
        nbytes = tensor_bytes(e.name, tile, shape, group, scale_type)
        if int(r["length"]) != nbytes:
            raise _bad(f"tensor {name}: {int(r['length'])} bytes, but {e.name} {shape} takes {nbytes}")
        return Tensor(
            name,
            e.name,
            tile,
            shape,
            group,
            scale_type,
            base + int(r["offset"]),
            nbytes,
            r["digest"].tobytes(),
        )

    # ---- reading ------------------------------------------------------------------------------

    @cached_property
    def tensor_index(self) -> dict[str, int]:
        """Name -> row of the tensor table."""
        return {t.name: i for i, t in enumerate(self.tensors)}

    def section(self, kind: str) -> bytes:
        """The bytes of a section other than DATA, verified against its digest; b'' when absent."""
        try:
            return self._section(kind)
        except FormatError as error:
            raise FormatError(f"{self.path}: {error}") from None

    def raw(self, tensor: Tensor) -> np.ndarray:
        """The stored bytes, uint8, a view of the mapping."""
        return self.bytes[tensor.offset : tensor.offset + tensor.nbytes]

    def vector(self, tensor: Tensor) -> np.ndarray:
        """A row-major tensor in its stored dtype, a view of the mapping."""
        return self.raw(tensor).view(stored_dtype(tensor.encoding)).reshape(tensor.shape)

    def plane_arrays(self, tensor: Tensor) -> dict[str, np.ndarray]:
        """Plane name -> flat array in its stored dtype, views of the mapping (p16 matrices)."""
        raw = self.raw(tensor)
        return {p.name: raw[p.offset : p.offset + p.nbytes].view(p.dtype) for p in tensor.planes}

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Check every byte of the file that `__init__` left unchecked; FormatError names the damage.

        `progress` is called with the number of bytes just checked.
        """
        for kind in self.sections:
            if kind != "DATA":
                self.section(kind)
        base, size, digest = self.sections["DATA"]
        if sha256(*(t.digest for t in self.tensors)) != digest:
            raise FormatError(f"{self.path}: the data digest does not match the tensor table")
        covered = 64 + 64 * len(self.sections)
        spans = [(o, n) for k, (o, n, _) in self.sections.items() if k != "DATA"]
        spans += [(t.offset, t.nbytes) for t in self.tensors] + [(base + size, 0)]
        for offset, length in sorted(spans):
            if self.bytes[covered:offset].any():
                raise FormatError(f"{self.path}: padding before byte {offset} is not zero")
            covered = offset + length
        for t in self.tensors:
            if sha256(self.raw(t).data) != t.digest:
                raise FormatError(f"{self.path}: tensor {t.name} is damaged (its digest does not match)")
            if progress:
                progress(t.nbytes)

    @cached_property
    def program_shapes(self) -> list[program.TensorShape]:
        """The view of the tensors that `program.verify` takes; index vectors are read for their reach."""
        return [
            program.TensorShape(
                t.name, t.tile, t.shape, t.encoding == "f32",
                int(self.vector(t).max()) + 1 if t.encoding == "u32" else 0,
            )
            for t in self.tensors
        ]  # fmt: skip

    def explain(self) -> list[dict[str, object]]:
        """The program in words; see `program.explain`."""
        return program.explain(self.program, self.slots, self.caches, self.program_shapes)

    def codes(self, tensor: Tensor) -> dict[str, np.ndarray]:
        """Codes and planes of scales of a code matrix, by the plane's name; see `unpack`."""
        return unpack(tensor.encoding, self.plane_arrays(tensor), *tensor.shape)

    def dequantize(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Any tensor as float32 in its logical shape; of a matrix rows start..stop, start being a multiple of 16."""
        if tensor.tile == tiles.ROWS:
            return bits_to_float(self.vector(tensor), tensor.encoding)
        rows, cols = tensor.shape
        rows = (rows if stop is None else min(stop, rows)) - start
        assert start % tiles.PANEL == 0 and rows >= 0
        first, last = start // tiles.PANEL, -(-(start + rows) // tiles.PANEL)
        raw = self.raw(tensor)
        planes = {
            p.name: raw[p.offset + first * p.panel_bytes : p.offset + last * p.panel_bytes].view(p.dtype)
            for p in tensor.planes
        }
        return dequantize(tensor.encoding, planes, rows, cols, tensor.group, tensor.scale_type)
