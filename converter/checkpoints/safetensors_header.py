"""The header of a safetensors file, read with every number checked.

Layout after https://github.com/huggingface/safetensors: uint64 header length, a JSON object
(name -> dtype, shape, data_offsets; `__metadata__` holds strings), then the data, which the tensors
cover without holes or overlaps.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from halfbyte.converter.checkpoints.bounded_file import BoundedFile, checked_product
from halfbyte.converter.checkpoints.tokenizer_files import parse_json_object
from halfbyte.formats.errors import CheckpointError

# The reference implementation's own limit.
MAX_HEADER_BYTES = 100_000_000
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its dtype as safetensors names it, and its bytes [begin, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_safetensors_header(file: BoundedFile) -> dict[str, TensorEntry]:
    """All tensors of the file by name. Raises CheckpointError unless the whole layout is sound."""
    name = file.path.name
    if file.size < 8:
        raise CheckpointError(f"{name} is too short for a safetensors file ({file.size} bytes)")
    (length,) = struct.unpack("<Q", file.read(0, 8).tobytes())
    if length > min(file.size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(f"{name} is truncated or no safetensors file: its header claims {length} bytes")
    header = parse_json_object(file.read(8, length).tobytes(), f"the header of {name}", unique=True)
    header.pop("__metadata__", None)
    data_begin = 8 + length
    entries = {key: _entry(key, value, data_begin, file) for key, value in header.items()}
    position = data_begin
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            what = "overlaps another" if entry.begin < position else "leaves a hole before it"
            raise CheckpointError(f"{name} is damaged: tensor {key!r} {what}")
        position = entry.end
    if position != file.size:
        raise CheckpointError(f"{name} is damaged: its tensors end at byte {position} of {file.size}")
    return entries


def _entry(key: str, value: Any, data_begin: int, file: BoundedFile) -> TensorEntry:
    where = f"{file.path.name} is damaged: tensor {key!r}"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not described by an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise CheckpointError(f"{where} has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise CheckpointError(f"{where} has no valid shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise CheckpointError(f"{where} has no valid data_offsets")
    begin, end = offsets
    room = file.size - data_begin
    if not 0 <= begin <= end <= room:
        raise CheckpointError(f"{where} lies outside the file (is the file truncated?)")
    elements = checked_product(tuple(shape), 8 * room)
    if elements is None or elements * _DTYPE_BITS[dtype] != 8 * (end - begin):
        raise CheckpointError(f"{where} has {end - begin} bytes, which its dtype and shape do not need")
    return TensorEntry(dtype, tuple(shape), data_begin + begin, data_begin + end)
