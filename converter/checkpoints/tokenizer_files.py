"""Finding the tokenizer that belongs to a checkpoint, and the JSON files around it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from halfbyte.converter.checkpoints.checkpoint import TokenizerSource
from halfbyte.formats.errors import CheckpointError

# The largest known tokenizer.json (a 262,144-piece vocabulary with merges) is about 33 MB.
MAX_TOKENIZER_BYTES = 256 << 20
MAX_CONFIG_BYTES = 16 << 20


def read_small(path: Path, limit: int = MAX_CONFIG_BYTES) -> bytes:
    """The whole of a file that has to be small. Raises CheckpointError if it is not, or unreadable."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > limit:
        raise CheckpointError(f"{path} is larger than {limit >> 20} MiB, which no such file is")
    return data


def parse_json_object(data: bytes, what: str, unique: bool = False) -> dict[str, Any]:
    """A JSON object, if `unique` without repeated keys. Raises CheckpointError naming `what` otherwise."""

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if unique and len(result) != len(pairs):
            raise ValueError("a key appears twice")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=collect)
    except RecursionError:
        raise CheckpointError(f"{what} is not valid JSON: nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} does not hold a JSON object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file; {} where the file does not exist."""
    return parse_json_object(read_small(path), path.name) if path.is_file() else {}


def tokenizer_in_folder(folder: Path) -> TokenizerSource | None:
    """The tokenizer of a Hugging Face folder: tokenizer.json, else tokenizer.model, else None."""
    config, added = read_json(folder / "tokenizer_config.json"), read_json(folder / "added_tokens.json")
    for name, kind in (("tokenizer.json", "tokenizer.json"), ("tokenizer.model", "sentencepiece")):
        if (folder / name).is_file():
            return TokenizerSource(kind, read_small(folder / name, MAX_TOKENIZER_BYTES), config, added)
    return None


def tokenizer_at(path: str | Path) -> TokenizerSource:
    """The tokenizer the user pointed at: a folder, a .json, a sentencepiece .model or a llama2.c .bin."""
    path = Path(path)
    if path.is_dir():
        source = tokenizer_in_folder(path)
        if source is None:
            raise CheckpointError(f"{path} holds neither tokenizer.json nor tokenizer.model")
        return source
    kinds = {".json": "tokenizer.json", ".model": "sentencepiece", ".bin": "llama2.c"}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise CheckpointError(f"cannot tell what tokenizer {path} is; give a .json, .model or .bin file")
    data = read_small(path, MAX_TOKENIZER_BYTES)
    if kind == "tokenizer.json":
        config, added = (read_json(path.parent / n) for n in ("tokenizer_config.json", "added_tokens.json"))
        return TokenizerSource(kind, data, config, added)
    return TokenizerSource(kind, data)


def tokenizer_beside(path: Path, vocab_size: int) -> TokenizerSource | None:
    """The llama2.c or sentencepiece tokenizer in the folder of `path` that has `vocab_size` pieces.

    tokenizer.bin, tok*.bin, tokenizer.model and tok*.model are tried in this order; None if none fits.
    """
    kinds = ((".bin", "llama2.c", llama2c_pieces), (".model", "sentencepiece", model_pieces))
    for suffix, kind, count in kinds:
        found = sorted(path.parent.glob(f"tok*{suffix}"), key=lambda p: (p.stem != "tokenizer", p.name))
        for candidate in found:
            if candidate.name == path.name or not candidate.is_file():
                continue
            # A larger file is no tokenizer but another checkpoint.
            if candidate.stat().st_size > MAX_TOKENIZER_BYTES:
                continue
            data = read_small(candidate, MAX_TOKENIZER_BYTES)
            if count(data) == vocab_size:
                return TokenizerSource(kind, data)
    return None


def llama2c_pieces(data: bytes) -> int | None:
    """How many pieces a llama2.c tokenizer holds (int32 longest, then float32 score, int32 length, text)."""
    position, pieces = 4, 0
    while position + 8 <= len(data):
        (length,) = struct.unpack_from("<i", data, position + 4)
        if length < 0 or length > len(data) - position - 8:
            return None
        position, pieces = position + 8 + length, pieces + 1
    return pieces if position == len(data) else None


def model_pieces(data: bytes) -> int | None:
    """How many pieces a sentencepiece model holds: the fields 1 of its outermost protobuf message."""
    position, pieces = 0, 0
    while position < len(data):
        key, position = _varint(data, position)
        if position < 0:
            return None
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 in (0, 2):
            value, position = _varint(data, position)
            if position < 0:
                return None
            size = value if key & 7 == 2 else 0
        if size is None or size > len(data) - position:
            return None
        pieces += key == 0x0A
        position += size
    return pieces


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A protobuf varint and the position after it, which is -1 if there is none."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    return 0, -1
