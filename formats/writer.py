"""Writing a `.hb` file: laid out first, filled in any order, renamed into place at the end.

The writer knows every size before the first byte, so tensors stream through it panel by panel and
a half-written file never carries the final name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import container, metadata, ops, tiles
from .encodings import BY_NAME, K256, SCALE_TYPES, parameters_are_valid
from .errors import HalfbyteError, UsageError


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


class Writer:
    """Context manager: on a clean exit the file appears under `path`; otherwise nothing remains.

    The file states the lowest minor version that has everything it uses. Raises HalfbyteError when the disk
    is full or the folder is not writable, UsageError for a tensor that no file can hold.
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
    ):
        self.path = Path(path)
        self.partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self.tensors = [t.resolved() for t in tensors]
        self._blobs = {
            "META": metadata.encode(meta),
            "TOKN": tokenizer,
            "TMPL": template.encode(),
            "SLOT": slots.tobytes(),
            "KVCA": caches.tobytes(),
            "PROG": program.tobytes(),
        }
        used = [ops.BY_CODE[int(code)].minor for code in program["code"]]
        self.minor = max([*used, *(t.minor for t in self.tensors)], default=0)
        for kind in ("TOKN", "TMPL"):
            if not self._blobs[kind]:
                del self._blobs[kind]
        self._fd = -1
        self._lay_out()

    def _lay_out(self) -> None:
        """Offsets of everything; only digests are still unknown."""
        self._names = b"".join(t.name.encode() for t in self.tensors)
        self._blobs["TENS"] = bytes(
            container.TABLE_HEAD + len(self.tensors) * container.TENSOR_DTYPE.itemsize + len(self._names)
        )
        end = 64 + 64 * (len(self._blobs) + 1)
        self._offsets: dict[str, int] = {}
        for kind, blob in self._blobs.items():
            self._offsets[kind] = end = tiles.align(end, container.SECTION_ALIGNMENT)
            end += len(blob)
        self._data = tiles.align(end, container.DATA_ALIGNMENT)
        at = 0
        self.placed: list[tuple[int, int]] = []  # (offset in the file, bytes) of every tensor
        for t in self.tensors:
            at = tiles.align(at)
            n = container.tensor_bytes(t.encoding, t.tile, t.shape, t.group, t.scale_type)
            self.placed.append((self._data + at, n))
            at += n
        self._data_length = at
        self.length = self._data + at

    def __enter__(self) -> Writer:
        try:
            self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
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
        with contextlib.suppress(OSError):
            self.partial.unlink()

    def write(self, index: int, plane: str, panel: int, data: np.ndarray) -> None:
        """Store `data` (already packed, whole panels) of a plane, from panel `panel` on.

        Vectors have the one plane 'values' and `panel` 0.
        """
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

    def _digest(self, offset: int, nbytes: int) -> bytes:
        h = hashlib.sha256()
        while nbytes:
            chunk = os.pread(self._fd, min(nbytes, 1 << 22), offset)
            h.update(chunk)
            offset, nbytes = offset + len(chunk), nbytes - len(chunk)
        return h.digest()

    def _finish(self) -> None:
        records = np.zeros(len(self.tensors), container.TENSOR_DTYPE)
        at = 0
        digests = []
        for r, t, (offset, nbytes) in zip(records, self.tensors, self.placed):
            r["name_offset"], r["name_length"] = at, len(t.name.encode())
            at += len(t.name.encode())
            r["encoding"], r["tile"], r["rank"] = BY_NAME[t.encoding].code, t.tile, len(t.shape)
            r["shape"][: len(t.shape)] = t.shape
            r["group"] = t.group
            r["scale_type"] = SCALE_TYPES[t.scale_type]
            r["offset"], r["length"] = offset - self._data, nbytes
            digests.append(self._digest(offset, nbytes))
            r["digest"] = np.void(digests[-1])
        head = np.zeros(container.TABLE_HEAD // 4, "<u4")
        head[:2] = len(self.tensors), len(self._names)
        self._blobs["TENS"] = head.tobytes() + records.tobytes() + self._names
        table = np.zeros(len(self._blobs) + 1, container.SECTION_DTYPE)
        for s, (kind, blob) in zip(table, self._blobs.items()):
            s["kind"], s["flags"], s["offset"], s["length"] = kind, 1, self._offsets[kind], len(blob)
            s["digest"] = np.void(container.sha256(blob))
            self._pwrite(blob, self._offsets[kind])
        table[-1]["kind"], table[-1]["flags"] = "DATA", container.MUST_UNDERSTAND
        table[-1]["offset"], table[-1]["length"] = self._data, self._data_length
        table[-1]["digest"] = np.void(container.sha256(*digests))
        header = np.zeros(1, container.HEADER_DTYPE)
        header["magic"], header["length"], header["sections"] = container.MAGIC, self.length, len(table)
        header["major"], header["minor"] = container.VERSION[0], self.minor
        header["digest"] = np.void(container.sha256(header.tobytes()[:32], table.tobytes()))
        self._pwrite(header.tobytes() + table.tobytes(), 0)
        os.fsync(self._fd)
        fd, self._fd = self._fd, -1
        os.close(fd)
        os.replace(self.partial, self.path)
