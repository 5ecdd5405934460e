"""The container of a GGUF file: metadata and tensor table, read with every number checked.

Layout after https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3,
little-endian. Counts are compared with the bytes that remain before anything is allocated, so a
hostile file costs no more time or memory than its own size.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from halfbyte.converter.checkpoints import ggml_types
from halfbyte.converter.checkpoints.bounded_file import BoundedFile, checked_product
from halfbyte.formats.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_KEY_BYTES = 65535
_MAX_STRING_BYTES = 64 << 20
_MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True)
class ArrayEntry:
    """An array of the metadata, left in the file: where its elements begin and end."""

    kind: int
    count: int
    begin: int
    end: int


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of the file. shape is [out, in]; offset is that of its first byte in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    row_bytes: int


class GGUFFile:
    """Parsed metadata and tensor table of one GGUF file.

    tensors   by name, in the order of the file
    Raises CheckpointError, and nothing else, for a file that is not sound.
    """

    def __init__(self, file: BoundedFile) -> None:
        self.file = file
        self._metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        cursor = _Cursor(file)
        if cursor.take(4) != b"GGUF":
            raise CheckpointError(f"{file.path.name} is not a little-endian GGUF file")
        (version,) = cursor.unpack("<I")
        if version and not version & 0xFFFF:
            raise CheckpointError(f"{file.path.name} is a big-endian GGUF file, which is not supported")
        if version not in (2, 3):
            raise CheckpointError(f"{file.path.name} is GGUF version {version}; 2 and 3 are readable")
        tensor_count, kv_count = cursor.unpack("<QQ")
        # The smallest pair is an empty key, a type and one byte; the smallest tensor has no dimension.
        cursor.expect(kv_count, 13, "metadata pairs")
        for _ in range(kv_count):
            self._read_pair(cursor)
        cursor.expect(tensor_count, 24, "tensors")
        self._read_tensors(cursor, tensor_count)

    def keys_under(self, prefix: str) -> list[str]:
        """The metadata keys that start with `prefix`, in the order of the file."""
        return [key for key in self._metadata if key.startswith(prefix)]

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value: bool, int, float, str, list[str] or NumPy array; `default` if absent.

        float32 numbers become the shortest decimal that means the same float32 (1e-05, not
        9.99999974e-06). Bytes of strings that are not UTF-8 become surrogate escapes.
        """
        value = self._metadata.get(key, default)
        return self._read_array(value) if isinstance(value, ArrayEntry) else value

    def array_length(self, key: str) -> int | None:
        """How many elements an array holds, without reading it; None if there is no such array."""
        value = self._metadata.get(key)
        return value.count if isinstance(value, ArrayEntry) else None

    def _read_pair(self, cursor: _Cursor) -> None:
        key_bytes = cursor.string(_MAX_KEY_BYTES)
        try:
            key = key_bytes.decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.file.path.name} is damaged: a metadata key is not UTF-8") from None
        if not key or key in self._metadata:
            raise CheckpointError(f"{self.file.path.name} is damaged: key {key[:80]!r} is empty or repeated")
        (kind,) = cursor.unpack("<I")
        if kind == _STRING:
            self._metadata[key] = cursor.string(_MAX_STRING_BYTES).decode("utf-8", "surrogateescape")
        elif kind == _ARRAY:
            self._metadata[key] = cursor.array(key)
        elif kind in _SCALARS:
            raw = cursor.take(struct.calcsize(_SCALARS[kind]))
            (value,) = struct.unpack("<" + _SCALARS[kind], raw)
            self._metadata[key] = float(str(np.float32(value))) if kind == 6 else value
        else:
            raise CheckpointError(f"{self.file.path.name} is damaged: {key[:80]!r} has unknown type {kind}")

    def _read_array(self, entry: ArrayEntry) -> Any:
        data = self.file.read(entry.begin, entry.end - entry.begin)
        if entry.kind != _STRING:
            return data.view(bool if entry.kind == 7 else "<" + _SCALARS[entry.kind])
        raw, position, strings = data.tobytes(), 0, []
        for _ in range(entry.count):
            (length,) = struct.unpack_from("<Q", raw, position)
            strings.append(raw[position + 8 : position + 8 + length].decode("utf-8", "surrogateescape"))
            position += 8 + length
        return strings

    def _read_tensors(self, cursor: _Cursor, count: int) -> None:
        name = self.file.path.name
        alignment = self._metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise CheckpointError(f"{name} is damaged: general.alignment is {str(alignment)[:20]}")
        found = [_tensor_info(cursor, name) for _ in range(count)]
        data_begin = -(-cursor.position // alignment) * alignment
        for tensor in found:
            size = (tensor.shape[0] if len(tensor.shape) == 2 else 1) * tensor.row_bytes
            begin = data_begin + tensor.offset
            if tensor.offset % alignment or begin + size > self.file.size:
                raise CheckpointError(f"{name} is truncated or damaged: {tensor.name} lies outside it")
            if tensor.name in self.tensors:
                raise CheckpointError(f"{name} is damaged: tensor {tensor.name} appears twice")
            self.tensors[tensor.name] = GGUFTensor(
                tensor.name, tensor.type, tensor.shape, begin, tensor.row_bytes
            )
        end, previous = data_begin, ""
        for t in sorted(self.tensors.values(), key=lambda t: t.offset):
            if t.offset < end:
                raise CheckpointError(f"{name} is damaged: tensor {t.name} overlaps {previous}")
            end, previous = t.offset + (t.shape[0] if len(t.shape) == 2 else 1) * t.row_bytes, t.name


def _tensor_info(cursor: _Cursor, file_name: str) -> GGUFTensor:
    """One row of the tensor table; its offset still counts from the start of the data."""
    name = cursor.string(_MAX_KEY_BYTES).decode("utf-8", "backslashreplace")
    where = f"tensor {name[:80]!r} of {file_name}"
    (n_dims,) = cursor.unpack("<I")
    if not 1 <= n_dims <= 4:
        raise CheckpointError(f"{where} has {n_dims} dimensions")
    dims = list(cursor.unpack(f"<{n_dims}Q"))
    kind, offset = cursor.unpack("<IQ")
    type_name = ggml_types.NAMES.get(kind, f"type {kind}")
    if type_name not in ggml_types.TYPES:
        raise CheckpointError(
            f"{where} is {type_name}; only {', '.join(ggml_types.TYPES)} are readable:"
            " use another GGUF of this model, such as Q4_K_M"
        )
    while len(dims) > 2 and dims[-1] == 1:
        dims.pop()
    if len(dims) > 2:
        raise CheckpointError(f"{where} has {len(dims)} dimensions; only vectors and matrices are readable")
    elements, block_bytes = ggml_types.TYPES[type_name].elements, ggml_types.TYPES[type_name].nbytes
    # No type has over 5 elements a byte.
    total = checked_product(tuple(dims), 16 * cursor.file.size)
    if not total or dims[0] % elements:
        raise CheckpointError(f"{where} has the impossible sizes {dims}")
    return GGUFTensor(name, type_name, tuple(reversed(dims)), offset, dims[0] // elements * block_bytes)


class _Cursor:
    """Sequential reads from a file through a buffer, each checked against the bytes that remain."""

    _BUFFER_BYTES = 1 << 20

    def __init__(self, file: BoundedFile) -> None:
        self.file = file
        self.position = 0
        self._buffer = b""
        self._begin = 0

    def expect(self, count: int, size: int, what: str) -> None:
        """Refuse `count` items of at least `size` bytes where fewer bytes remain."""
        if count > (self.file.size - self.position) // size:
            raise CheckpointError(f"{self.file.path.name} is truncated or damaged: it claims {count} {what}")

    def take(self, count: int) -> bytes:
        begin = self.position - self._begin
        if begin + count > len(self._buffer):
            remaining = self.file.size - self.position
            if count > remaining:
                raise CheckpointError(f"{self.file.path.name} is truncated in its header")
            self._buffer = self.file.read(
                self.position, min(max(count, self._BUFFER_BYTES), remaining)
            ).tobytes()
            self._begin, begin = self.position, 0
        self.position += count
        return self._buffer[begin : begin + count]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self, limit: int) -> bytes:
        (length,) = self.unpack("<Q")
        self.expect(length, 1, "bytes of text")
        if length > limit:
            raise CheckpointError(f"{self.file.path.name} is damaged: a text of {length} bytes")
        return self.take(length)

    def array(self, key: str) -> ArrayEntry:
        """Step over an array, checking that it is whole."""
        kind, count = self.unpack("<IQ")
        if kind == _STRING:
            self.expect(count, 8, f"elements of {key[:80]!r}")
            begin = self.position
            for _ in range(count):
                (length,) = self.unpack("<Q")
                self.expect(length, 1, "bytes of text")
                if length > _MAX_STRING_BYTES:
                    raise CheckpointError(f"{self.file.path.name} is damaged: a text of {length} bytes")
                self.skip(length)
        elif kind in _SCALARS:
            size = struct.calcsize(_SCALARS[kind])
            self.expect(count, size, f"elements of {key[:80]!r}")
            begin = self.position
            self.skip(count * size)
        else:
            raise CheckpointError(
                f"{self.file.path.name}: {key[:80]!r} is an array of unsupported type {kind}"
            )
        return ArrayEntry(kind, count, begin, self.position)

    def skip(self, count: int) -> None:
        """Step over bytes that `expect` has vouched for."""
        self.position += count
        if self.position - self._begin > len(self._buffer):
            self._buffer, self._begin = b"", self.position
