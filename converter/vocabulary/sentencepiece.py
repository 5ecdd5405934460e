"""sentencepiece's tokenizer.model: a protocol buffer (ModelProto), read without generated code.

Field numbers are those of sentencepiece_model.proto. Only what tokenization depends on is kept.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from halfbyte.converter.vocabulary.pieces import (
    MAX_PIECE_BYTES,
    MAX_PIECES,
    NORMAL,
    PieceVocabulary,
)
from halfbyte.formats.errors import TokenizerError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.model_type
_MODEL_TYPES = {3: "word", 4: "char"}
Value = int | float | bytes


def _varint(data: bytes, offset: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if offset >= end:
            break
        byte = data[offset]
        offset += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (2**64 - 1), offset
    raise TokenizerError("the sentencepiece model is truncated or damaged")


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """(field number, value) of one message: an int, a float (32-bit fields) or bytes."""
    offset, end = 0, len(data)
    while offset < end:
        key, offset = _varint(data, offset, end)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, offset = _varint(data, offset, end)
            yield number, value
            continue
        if wire == _BYTES:
            size, offset = _varint(data, offset, end)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise TokenizerError("the sentencepiece model is damaged: unknown kind of field")
        if not number or size > end - offset:
            raise TokenizerError("the sentencepiece model is truncated or damaged")
        raw = data[offset : offset + size]
        offset += size
        yield number, struct.unpack("<f", raw)[0] if wire == _FIXED32 else raw


def _message(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise TokenizerError("the sentencepiece model is damaged: a message has the wrong type")
    return value


def _integer(fields: dict[int, Value], number: int, default: int) -> int:
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise TokenizerError("the sentencepiece model is damaged: a number has the wrong type")
    return value - 2**64 if value >= 2**63 else value


def _piece(message: bytes, index: int) -> tuple[str, float, int]:
    fields = dict(_fields(message))
    raw, score = _message(fields.get(1, b"")), fields.get(2, 0.0)
    if len(raw) > MAX_PIECE_BYTES:
        raise TokenizerError(f"piece {index} of the sentencepiece model has {len(raw)} bytes")
    if not isinstance(score, float):
        raise TokenizerError("the sentencepiece model is damaged: a score has the wrong type")
    try:
        return raw.decode("utf-8"), score, _integer(fields, 3, NORMAL)
    except UnicodeDecodeError:
        raise TokenizerError(f"piece {index} of the sentencepiece model is not UTF-8") from None


def read_sentencepiece(data: bytes) -> PieceVocabulary:
    """Read a serialized ModelProto; raises TokenizerError for a damaged or unsupported one."""
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, Value] | None = None
    normalizer: dict[int, Value] | None = None
    for number, value in _fields(data):
        if number == 1:
            if len(pieces) == MAX_PIECES:
                raise TokenizerError(f"the sentencepiece model has more than {MAX_PIECES} pieces")
            piece, score, kind = _piece(_message(value), len(pieces))
            pieces.append(piece)
            scores.append(score)
            kinds.append(kind)
        elif number == 2:
            trainer = dict(_fields(_message(value)))
        elif number == 3:
            normalizer = dict(_fields(_message(value)))
    if not pieces or trainer is None or normalizer is None:
        raise TokenizerError(
            "the sentencepiece model is truncated: pieces, trainer or normalizer are missing"
        )
    model_type = _integer(trainer, 3, _UNIGRAM)
    if model_type not in (_UNIGRAM, _BPE):
        name = _MODEL_TYPES.get(model_type, str(model_type))
        raise TokenizerError(f"sentencepiece model type {name} is not supported (bpe and unigram are)")
    if _integer(trainer, 24, 0):
        raise TokenizerError("sentencepiece models with whitespace as suffix are not supported")
    if not _integer(normalizer, 5, 1):
        raise TokenizerError("sentencepiece models that do not escape whitespace are not supported")

    def present(index: int) -> int | None:
        return index if 0 <= index < len(pieces) else None

    return PieceVocabulary(
        pieces,
        scores,
        kinds,
        unigram=model_type == _UNIGRAM,
        bos=present(_integer(trainer, 41, 1)),
        eos=present(_integer(trainer, 42, 2)),
        add_dummy_prefix=bool(_integer(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_integer(normalizer, 4, 1)),
        charsmap=_message(normalizer.get(2, b"")),
    )
