"""Typed metadata: key -> bool, int, float, str, bytes or a list of int, float or str.

Layout (SPEC.md section 4): each entry is `u16 type, u16 key_length, u32 value_length`, the key in
UTF-8, the value, zero padding to 8 bytes. Entries are sorted by key and keys are unique.
"""

from __future__ import annotations

import struct

from .errors import FormatError

Value = bool | int | float | str | bytes | list[int] | list[float] | list[str]

TYPES = {"bool": 1, "int": 2, "float": 3, "str": 4, "bytes": 5, "ints": 6, "floats": 7, "strs": 8}
_NAMES = {v: k for k, v in TYPES.items()}
_HEAD = struct.Struct("<HHI")

# Keys with a meaning: key -> (type, required, meaning). Any other key may hold anything (SPEC.md section 12).
KEYS: dict[str, tuple[str, bool, str]] = {
    "general.name": ("str", False, "name of the model, for display"),
    "general.model_type": (
        "str",
        False,
        "architecture of the checkpoint it came from; never changes how it runs",
    ),
    "general.source_format": ("str", False, "kind of checkpoint it came from"),
    "general.source_digest": ("str", False, "SHA-256, in hexadecimal, that identifies that checkpoint"),
    "general.tool_version": ("str", False, "version of the tool that wrote the file"),
    "general.recipe": ("str", False, "how the weights were quantised"),
    "general.parameters": ("int", False, "number of weights of the model"),
    "model.vocab_size": ("int", True, "number of token ids, and columns of the logits; 1 to 2^31 - 1"),
    "model.context_length": ("int", True, "positions that a session may use; 1 to 2^31 - 1"),
    "model.layers": ("int", False, "number of layers, for display"),
    "model.hidden_size": ("int", False, "width of the residual stream, for display"),
    "tokenizer.bos_id": ("int", False, "token that starts a text"),
    "tokenizer.eos_ids": ("ints", False, "tokens that end a generation"),
    "tokenizer.add_bos": ("bool", False, "whether encoding a text puts bos_id first; default false"),
    "generation.temperature": ("float", False, "suggested default"),
    "generation.top_k": ("int", False, "suggested default"),
    "generation.top_p": ("float", False, "suggested default"),
}
_POSITIVE_INT32 = ("model.vocab_size", "model.context_length")


def _encode(value: Value) -> tuple[str, bytes]:
    if isinstance(value, bool):
        return "bool", bytes([value])
    if isinstance(value, int):
        return "int", struct.pack("<q", value)
    if isinstance(value, float):
        return "float", struct.pack("<d", value)
    if isinstance(value, str):
        return "str", value.encode()
    if isinstance(value, bytes):
        return "bytes", value
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"no type holds a {type(value).__name__}")
    if all(isinstance(v, int) for v in value):
        return "ints", struct.pack(f"<{len(value)}q", *value)
    if all(isinstance(v, str) for v in value):
        items = [str(v).encode() for v in value]
        return "strs", b"".join(struct.pack("<I", len(i)) + i for i in items)
    return "floats", struct.pack(f"<{len(value)}d", *value)


def encode(metadata: dict[str, Value]) -> bytes:
    """The bytes of a META section. Raises FormatError for a value that no type can hold."""
    out = bytearray()
    for key in sorted(metadata):
        try:
            kind, value = _encode(metadata[key])
            name = key.encode()
            out += _HEAD.pack(TYPES[kind], len(name), len(value)) + name + value
        except (ValueError, TypeError, struct.error) as error:
            raise FormatError(f"metadata {key!r} cannot be stored: {error}") from None
        out += bytes(-len(out) % 8)
    return bytes(out)


def _strings(value: bytes) -> list[str]:
    out, at = [], 0
    while at < len(value):
        if at + 4 > len(value):
            raise ValueError("a string is cut off")
        (n,) = struct.unpack_from("<I", value, at)
        if n > len(value) - at - 4:
            raise ValueError("a string is cut off")
        out.append(value[at + 4 : at + 4 + n].decode())
        at += 4 + n
    return out


def _decode(kind: str, value: bytes) -> Value:
    if kind == "bool":
        if value not in (b"\0", b"\1"):
            raise ValueError("not a bool")
        return value == b"\1"
    if kind == "int":
        return struct.unpack("<q", value)[0]
    if kind == "float":
        return struct.unpack("<d", value)[0]
    if kind == "str":
        return value.decode()
    if kind == "bytes":
        return value
    if kind == "strs":
        return _strings(value)
    if len(value) % 8:
        raise ValueError("length is not a multiple of 8")
    return list(struct.unpack(f"<{len(value) // 8}{'q' if kind == 'ints' else 'd'}", value))


def check_keys(metadata: dict[str, Value]) -> None:
    """Refuse known keys of another type, missing required ones and sizes that are out of range."""
    for key, (kind, required, _) in KEYS.items():
        if key not in metadata:
            if required:
                raise FormatError(f"metadata lacks {key}")
            continue
        value = metadata[key]
        if _encode(value)[0] != kind:
            raise FormatError(f"metadata {key} is not of type {kind}")
        if key in _POSITIVE_INT32 and not (isinstance(value, int) and 0 < value < 1 << 31):
            raise FormatError(f"metadata {key} {value!r} is out of range")


def decode(data: bytes) -> dict[str, Value]:
    """The inverse of `encode`. Raises FormatError for anything but the one canonical encoding."""
    out: dict[str, Value] = {}
    at, last = 0, ""
    while at < len(data):
        if len(data) - at < _HEAD.size:
            raise FormatError("metadata is cut off")
        code, key_length, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        if code not in _NAMES:
            raise FormatError(f"metadata has an unknown type {code}")
        if key_length + length > len(data) - at:
            raise FormatError("metadata is cut off")
        try:
            key = data[at : at + key_length].decode()
            stored = data[at + key_length : at + key_length + length]
            value = _decode(_NAMES[code], stored)
            if value == [] and _NAMES[code] != "ints":
                raise ValueError("an empty list is stored as ints")
        except (ValueError, struct.error) as error:
            raise FormatError(f"metadata is damaged: {error}") from None
        at += key_length + length
        padding = -at % 8
        if any(data[at : at + padding]) or len(data) - at < padding:
            raise FormatError("metadata has nonzero padding")
        at += padding
        if not key or key <= last:
            raise FormatError(f"metadata keys are not sorted and unique at {key!r}")
        out[key] = value
        last = key
    return out
