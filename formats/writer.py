"""Writing a `.hb` file: laid out first, filled in any order, renamed into place at the end.

The writer knows every size before the first byte, so tensors stream through it panel by panel and
a half-written file never carries the final name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import container, metadata, ops, tiles
from .encodings import BY_NAME, K256, SCALE_TYPES, parameters_are_valid
from .errors import HalfbyteError, UsageError

READ = 1 << 22  # bytes of a tensor read at once


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written. `scale_type` and `group` are fixed by q8 and the q family and chosen by the rest."""

    name: str
    encoding: str
    shape: tuple[int, ...]
    group: int = 0
    scale_type: str = ""

    @property
    def tile(self) -> int:
        """Matrices are stored in p16 tiles, vectors as plain rows."""
        return tiles.P16 if len(self.shape) == 2 else tiles.ROWS

    def resolved(self) -> TensorSpec:
        """With the parameters that the encoding fixes filled in; UsageError for a choice it does not have."""
        e = BY_NAME[self.encoding]
        group, scale_type = e.group or 0, "f16" if e.scale == "f16" else ""
        if e.scale == "*":
            padded = tiles.align(self.shape[1], tiles.COLUMN_PAD)
            group = self.group if self.group <= padded else 0  # one group either way
            scale_type = self.scale_type
        if not parameters_are_valid(e, group, scale_type):
            raise UsageError(
                f"tensor {self.name}: {e.name} cannot have groups of {group} with {scale_type or 'no'} scales"
            )
        return TensorSpec(self.name, self.encoding, self.shape, group, scale_type)

    @property
    def minor(self) -> int:
        """First minor version of the format that can hold the tensor."""
        return max(BY_NAME[self.encoding].minor, 1 if self.scale_type == K256 else 0)


def lowest_minor(used: Iterable[ops.Op], tensors: Iterable[TensorSpec], kinds: Iterable[str]) -> int:
    """The lowest minor version of the format that has these ops, tensors and kinds of sections (unknown ones: 0)."""
    sections = (container.SECTIONS[k].minor for k in kinds if k in container.SECTIONS)
    return max([*(op.minor for op in used), *(t.minor for t in tensors), *sections], default=0)


def layout(lengths: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Kind -> offset of sections of these lengths, in this order, after the section table."""
    lengths = list(lengths)
    end, out = 64 + 64 * len(lengths), {}
    for kind, n in lengths:
        to = container.DATA_ALIGNMENT if kind == "DATA" else container.SECTION_ALIGNMENT
        out[kind] = tiles.align(end, to)
        end = out[kind] + n
    return out


def head(minor: int, length: int, sections: Sequence[tuple[str, int, int, int, bytes]]) -> bytes:
    """Header and section table of a file of `length` bytes, of (kind, flags, offset, length, digest) of sections."""
    table = np.zeros(len(sections), container.SECTION_DTYPE)
    for row, (kind, flags, offset, nbytes, digest) in zip(table, sections):
        row["kind"], row["flags"], row["offset"], row["length"] = kind, flags, offset, nbytes
        row["digest"] = np.void(digest)
    header = np.zeros(1, container.HEADER_DTYPE)
    header["magic"], header["length"], header["sections"] = container.MAGIC, length, len(table)
    header["major"], header["minor"] = container.VERSION[0], minor
    header["digest"] = np.void(container.sha256(header.tobytes()[:32], table.tobytes()))
    return header.tobytes() + table.tobytes()


class Writer:
    """Context manager: on a clean exit the file appears under `path`; otherwise nothing remains.

    The file states the lowest minor version that has everything it uses. Raises HalfbyteError when the disk
    is full or the folder is not writable, UsageError for a tensor that no file can hold.

    partial: a path on the same disk to write to until the file is complete. It is continued if it exists and stays
    after a failure: what becomes of it is then the caller's business. annotations: sections to follow DATA, see
    `annotate`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        meta: dict[str, metadata.Value],
        slots: np.ndarray,
        caches: np.ndarray,
        program: np.ndarray,
        tensors: Sequence[TensorSpec],
        tokenizer: bytes = b"",
        template: str = "",
        annotations: Sequence[str] = (),
        partial: Path | None = None,
    ):
        self.path = Path(path)
        self.partial = partial or self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._kept = partial is not None
        self.tensors = [t.resolved() for t in tensors]
        self._blobs = {
            "META": metadata.encode(meta),
            "TOKN": tokenizer,
            "TMPL": template.encode(),
            "SLOT": slots.tobytes(),
            "KVCA": caches.tobytes(),
            "PROG": program.tobytes(),
        }
        for kind in ("TOKN", "TMPL"):
            if not self._blobs[kind]:
                del self._blobs[kind]
        self._names = b"".join(t.name.encode() for t in self.tensors)
        self._blobs["TENS"] = bytes(
            container.TABLE_HEAD + len(self.tensors) * container.TENSOR_DTYPE.itemsize + len(self._names)
        )
        self._annotations = {k: b"" for k in container.SECTIONS if k in annotations}
        kinds = [*self._blobs, "DATA", *self._annotations]
        self.minor = lowest_minor((ops.BY_CODE[int(c)] for c in program["code"]), self.tensors, kinds)
        self._fd = -1
        self._digests: dict[int, bytes] = {}  # of tensors that were not written to since
        self._lay_out()

    def _lay_out(self) -> None:
        """Offsets of everything; only digests and annotations are still unknown."""
        at = 0
        places = []
        for t in self.tensors:
            at = tiles.align(at)
            n = container.tensor_bytes(t.encoding, t.tile, t.shape, t.group, t.scale_type)
            places.append((at, n))
            at += n
        self._data_length = at
        lengths = {k: len(b) for k, b in self._blobs.items()} | {"DATA": at}
        self._offsets = layout([*lengths.items(), *((k, 0) for k in self._annotations)])
        self._data = self._offsets["DATA"]
        self.placed = [
            (self._data + start, n) for start, n in places
        ]  # (offset in the file, bytes) of tensors
        self.length = self._data + at  # without annotations

    def __enter__(self) -> Writer:
        try:
            fresh = 0 if self._kept else os.O_TRUNC
            self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | fresh, 0o644)
            os.truncate(self._fd, self.length)
            if hasattr(os, "posix_fallocate") and self.length:  # a full disk is found now, not at 99 %
                os.posix_fallocate(self._fd, 0, self.length)
        except OSError as error:
            self._abandon()
            raise HalfbyteError(f"{self.path}: cannot write {self.length} bytes: {error.strerror}") from None
        except BaseException:  # an interrupt while the disk space is reserved
            self._abandon()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            self._finish()
        except OSError as failure:
            self._abandon()
            raise HalfbyteError(f"{self.path}: cannot write: {failure.strerror}") from None
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
        if not self._kept:
            with contextlib.suppress(OSError):
                self.partial.unlink()

    def write(self, index: int, plane: str, panel: int, data: np.ndarray) -> None:
        """Store `data` (already packed, whole panels) of a plane, from panel `panel` on.

        Vectors have the one plane 'values' and `panel` 0.
        """
        self._digests.pop(index, None)
        t = self.tensors[index]
        start, nbytes = self.placed[index]
        if t.tile == tiles.P16:
            rows, cols = t.shape
            p = next(
                p for p in tiles.planes(t.encoding, rows, cols, t.group, t.scale_type) if p.name == plane
            )
            assert data.dtype.itemsize == p.dtype.itemsize and panel * p.panel_bytes + data.nbytes <= p.nbytes
            start += p.offset + panel * p.panel_bytes
        else:
            assert data.nbytes == nbytes
        self._pwrite(np.ascontiguousarray(data).data.cast("B"), start)

    def _pwrite(self, data: memoryview | bytes, offset: int) -> None:
        view = memoryview(data)
        try:
            while len(view):
                n = os.pwrite(self._fd, view, offset)
                view, offset = view[n:], offset + n
        except OSError as error:
            raise HalfbyteError(f"{self.path}: cannot write: {error.strerror}") from None

    def rows(self, index: int, start: int, stop: int) -> np.ndarray:
        """float32[stop - start, cols]: rows of a matrix as they are stored so far; `start` is a multiple of 16."""
        t, (at, _) = self.tensors[index], self.placed[index]
        first, last = start // tiles.PANEL, -(-stop // tiles.PANEL)
        rows, cols = t.shape
        planes = {}
        for p in tiles.planes(t.encoding, rows, cols, t.group, t.scale_type):
            data = self._pread(at + p.offset + first * p.panel_bytes, (last - first) * p.panel_bytes)
            planes[p.name] = np.frombuffer(data, p.dtype)
        return container.dequantize(t.encoding, planes, stop - start, cols, t.group, t.scale_type)

    def digest(self, index: int) -> bytes:
        """SHA-256 of a tensor's bytes as they are stored so far."""
        if index not in self._digests:
            h = hashlib.sha256()
            offset, nbytes = self.placed[index]
            for start in range(offset, offset + nbytes, READ):
                h.update(self._pread(start, min(READ, offset + nbytes - start)))
            self._digests[index] = h.digest()
        return self._digests[index]

    def _pread(self, offset: int, nbytes: int) -> bytes:
        parts = []
        try:
            while nbytes:
                data = os.pread(self._fd, nbytes, offset)
                if not data:
                    raise HalfbyteError(f"{self.partial}: cannot read: it was cut off by someone else")
                parts.append(data)
                offset, nbytes = offset + len(data), nbytes - len(data)
        except OSError as error:
            raise HalfbyteError(f"{self.partial}: cannot read: {error.strerror}") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def annotate(self, kind: str, data: bytes) -> None:
        """Set one of the sections that were announced as `annotations`; until then it is empty."""
        assert kind in self._annotations
        self._annotations[kind] = data

    def seal(self) -> None:
        """Make `partial` a valid file of what was written so far; more may follow."""
        try:
            self._seal()
        except OSError as failure:
            raise HalfbyteError(f"{self.path}: cannot write: {failure.strerror}") from None

    def _seal(self) -> None:
        records = np.zeros(len(self.tensors), container.TENSOR_DTYPE)
        at = 0
        for i, (r, t, (offset, nbytes)) in enumerate(zip(records, self.tensors, self.placed)):
            r["name_offset"], r["name_length"] = at, len(t.name.encode())
            at += len(t.name.encode())
            r["encoding"], r["tile"], r["rank"] = BY_NAME[t.encoding].code, t.tile, len(t.shape)
            r["shape"][: len(t.shape)] = t.shape
            r["group"] = t.group
            r["scale_type"] = SCALE_TYPES[t.scale_type]
            r["offset"], r["length"] = offset - self._data, nbytes
            r["digest"] = np.void(self.digest(i))
        counts = np.zeros(container.TABLE_HEAD // 4, "<u4")
        counts[:2] = len(self.tensors), len(self._names)
        self._blobs["TENS"] = counts.tobytes() + records.tobytes() + self._names
        digests = [self.digest(i) for i in range(len(self.tensors))]
        data = (self._data_length, container.sha256(*digests))
        sections = {k: (len(b), container.sha256(b)) for k, b in self._blobs.items()} | {"DATA": data}
        sections |= {k: (len(b), container.sha256(b)) for k, b in self._annotations.items()}
        offsets = layout((k, n) for k, (n, _) in sections.items())
        length = max(offsets[k] + n for k, (n, _) in sections.items())
        os.ftruncate(self._fd, self.length)  # what an earlier seal wrote behind DATA may lie elsewhere now
        os.ftruncate(self._fd, length)
        for kind, blob in [*self._blobs.items(), *self._annotations.items()]:
            self._pwrite(blob, offsets[kind])
        rows = [
            (k, int(not container.SECTIONS[k].annotation), offsets[k], n, digest)
            for k, (n, digest) in sections.items()
        ]
        self._pwrite(head(self.minor, length, rows), 0)

    def _finish(self) -> None:
        self._seal()
        os.fsync(self._fd)
        fd, self._fd = self._fd, -1
        os.close(fd)
        os.replace(self.partial, self.path)
