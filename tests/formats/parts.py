"""Takes a `.hb` file apart and puts it together again with correct digests, so that tests can lie in one place."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from halfbyte.formats import container, metadata, program
from halfbyte.formats.container import File


def sha256(data: bytes) -> bytes:
    """SHA-256."""
    return hashlib.sha256(data).digest()


def align(n: int, to: int) -> int:
    """n rounded up to a multiple of `to`."""
    return -(-n // to) * to


@dataclass
class Section:
    """One section before it is laid out."""

    kind: bytes
    data: bytes
    flags: int = 1


class Parts:
    """A file in pieces. Change any attribute, then `build`.

    `table_edits` and `header_edits` are (offset, bytes) written over the section table or the header
    before the header's digest is taken, so that the digest does not give the lie away.
    """

    def __init__(self, file: File):
        self.version = file.version
        self.meta: dict = dict(file.metadata)
        self.meta_bytes: bytes | None = None
        self.slots, self.caches, self.program = (a.copy() for a in (file.slots, file.caches, file.program))
        table = file.section("TENS")
        n = len(file.tensors)
        self.tensors = np.frombuffer(table, container.TENSOR_DTYPE, n, container.TABLE_HEAD).copy()
        self.names = table[container.TABLE_HEAD + n * container.TENSOR_DTYPE.itemsize :]
        self.counts = [n, len(self.names)]
        base, size, _ = file.sections["DATA"]
        self.data = bytearray(file.bytes[base : base + size].tobytes())
        self.blobs = {k.encode(): file.section(k) for k in ("TOKN", "TMPL") if k in file.sections}
        self.extra: list[Section] = []  # between TENS and DATA
        self.dropped: set[bytes] = set()
        self.table_edits: list[tuple[int, bytes]] = []
        self.header_edits: list[tuple[int, bytes]] = []
        self.tail = b""
        self.length_change = 0
        self.data_length_change = 0
        self.spaced: dict[bytes, int] = {}  # bytes of hole before a section
        self.tens_bytes: bytes | None = None

    def set_names(self, names: list[bytes]) -> None:
        """Replace the names of the tensors."""
        at = 0
        for r, name in zip(self.tensors, names):
            r["name_offset"], r["name_length"] = at, len(name)
            at += len(name)
        self.names = b"".join(names)
        self.counts[1] = at

    def retake_digests(self) -> bytes:
        """Digest every tensor's bytes anew; the digest of DATA."""
        for r in self.tensors:
            part = bytes(self.data[int(r["offset"]) : int(r["offset"]) + int(r["length"])])
            r["digest"] = np.void(sha256(part))
        return sha256(b"".join(r["digest"].tobytes() for r in self.tensors))

    def sections(self) -> tuple[list[Section], bytes]:
        """Sections in file order, DATA last, and the digest of DATA."""
        data_digest = self.retake_digests()
        head = np.zeros(container.TABLE_HEAD // 4, "<u4")
        head[:2] = self.counts
        tens = head.tobytes() + self.tensors.tobytes() + self.names
        out = [Section(b"META", metadata.encode(self.meta) if self.meta_bytes is None else self.meta_bytes)]
        out += [Section(k, v) for k, v in self.blobs.items()]
        out += [
            Section(b"SLOT", self.slots.tobytes()),
            Section(b"KVCA", self.caches.tobytes()),
            Section(b"PROG", self.program.tobytes()),
            Section(b"TENS", tens if self.tens_bytes is None else self.tens_bytes),
            *self.extra,
            Section(b"DATA", bytes(self.data)),
        ]
        return [s for s in out if s.kind not in self.dropped], data_digest

    def build(self) -> bytes:
        """The file."""
        sections, data_digest = self.sections()
        table = np.zeros(len(sections), container.SECTION_DTYPE)
        end = 64 + 64 * len(sections)
        placed = []
        for row, s in zip(table, sections):
            to = container.DATA_ALIGNMENT if s.kind == b"DATA" else container.SECTION_ALIGNMENT
            end = align(end, to) + self.spaced.get(s.kind, 0)
            length = len(s.data) + (self.data_length_change if s.kind == b"DATA" else 0)
            row["kind"], row["flags"], row["offset"], row["length"] = s.kind, s.flags, end, length
            row["digest"] = np.void(data_digest if s.kind == b"DATA" else sha256(s.data))
            placed.append(end)
            end += len(s.data)
        body = bytearray(end)
        for at, s in zip(placed, sections):
            body[at : at + len(s.data)] = s.data
        body += self.tail
        header = np.zeros(1, container.HEADER_DTYPE)
        header["magic"], header["length"] = container.MAGIC, len(body) + self.length_change
        header["sections"] = len(sections)
        header["major"], header["minor"] = self.version
        body[:64] = header.tobytes()
        body[64 : 64 + table.nbytes] = table.tobytes()
        for at, value in self.table_edits:
            body[64 + at : 64 + at + len(value)] = value
        for at, value in self.header_edits:
            body[at : at + len(value)] = value
        redigest_header(body)
        return bytes(body)


def redigest_header(body: bytearray) -> None:
    """Make the header's digest true again."""
    count = int(np.frombuffer(body, "<u4", 1, 12)[0])
    body[32:64] = sha256(bytes(body[:32]) + bytes(body[64 : 64 + 64 * count]))


def put(op: str, *operands: list, **attrs: float) -> np.ndarray:
    """`program.record` for tests."""
    return program.record(op, program.NO_LAYER, *operands, **attrs)
