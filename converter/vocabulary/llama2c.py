"""llama2.c's tokenizer.bin: int32 max_token_length, then float32 score, int32 length, bytes per token.

The exporter writes U+2581 as a space and puts newlines around <s> and </s>; both are undone here.
"""

from __future__ import annotations

import struct

from halfbyte.converter.vocabulary.pieces import (
    CONTROL,
    MAX_PIECE_BYTES,
    SPACE,
    UNKNOWN,
    PieceVocabulary,
    guess_kinds,
)
from halfbyte.formats.errors import TokenizerError

_UNKNOWN, _BOS, _EOS = 0, 1, 2  # fixed by the format


def read_tokenizer_bin(data: bytes, vocab_size: int) -> PieceVocabulary:
    """Read exactly `vocab_size` tokens; raises TokenizerError for a file that holds fewer, more or other."""
    if len(data) < 4:
        raise TokenizerError("tokenizer.bin is truncated: it has no header")
    (longest,) = struct.unpack_from("<i", data, 0)
    if not 0 < longest <= MAX_PIECE_BYTES:
        raise TokenizerError(f"tokenizer.bin claims tokens of {longest} bytes; is it a llama2.c tokenizer?")
    if vocab_size < 3 or vocab_size > (len(data) - 4) // 8:
        raise TokenizerError(f"tokenizer.bin is too short for the model's {vocab_size} tokens")
    pieces: list[str] = []
    scores: list[float] = []
    offset = 4
    while offset < len(data):
        if len(pieces) == vocab_size:
            raise TokenizerError(f"tokenizer.bin holds more tokens than the model's {vocab_size}")
        if len(data) - offset < 8:
            raise TokenizerError(f"tokenizer.bin is truncated in token {len(pieces)}")
        score, length = struct.unpack_from("<fi", data, offset)
        offset += 8
        # The header counts the pieces before newlines were put around <s> and </s>.
        if not 0 <= length <= max(longest, 8):
            raise TokenizerError(f"token {len(pieces)} of tokenizer.bin claims {length} bytes")
        if len(data) - offset < length:
            raise TokenizerError(f"tokenizer.bin is truncated in token {len(pieces)}")
        raw = data[offset : offset + length]
        offset += length
        try:
            pieces.append(raw.decode("utf-8").replace(" ", SPACE))
        except UnicodeDecodeError:
            raise TokenizerError(f"token {len(pieces)} of tokenizer.bin is not UTF-8") from None
        scores.append(score)
    if len(pieces) < vocab_size:
        raise TokenizerError(f"tokenizer.bin holds {len(pieces)} tokens, the model {vocab_size}")
    pieces[_BOS], pieces[_EOS] = pieces[_BOS].strip("\n"), pieces[_EOS].strip("\n")
    kinds = guess_kinds(pieces)
    kinds[_UNKNOWN], kinds[_BOS], kinds[_EOS] = UNKNOWN, CONTROL, CONTROL
    return PieceVocabulary(pieces, scores, kinds, bos=_BOS, eos=_EOS)
