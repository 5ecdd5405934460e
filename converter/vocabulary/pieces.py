"""A sentencepiece vocabulary, wherever it was stored, and its equal as a `tokenizers` tokenizer.

sentencepiece BPE joins, at every step, the neighbours whose concatenation is the piece of highest score.
A `tokenizers` BPE wants ordered pairs instead, so the merges are all pairs of pieces whose concatenation
is a piece, by falling score of the result (Kudo and Richardson 2018; Sennrich et al. 2016).
"""

from __future__ import annotations

import base64
import math
import re
from dataclasses import dataclass
from typing import Any

from halfbyte.formats.errors import TokenizerError

# Kinds of piece: the numbers of sentencepiece's ModelProto, which GGUF's token_type shares.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SPACE = "\u2581"  # sentencepiece writes a space as this character
MAX_PIECES = 1 << 22
MAX_PIECE_BYTES = 4096
_MAX_MERGED_CHARACTERS = 512  # longer pieces (runs of a separator) are not derived from merges
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>\Z")


@dataclass
class PieceVocabulary:
    """Pieces in order of id.

    pieces       text, spaces written as U+2581
    scores       log probability (unigram) or minus the rank of the merge (BPE); finite
    kinds        NORMAL .. BYTE
    unigram      segment by the likeliest path (Viterbi) instead of by merges
    bos, eos     ids, None where there is none
    charsmap     sentencepiece's compiled normalisation rules, empty for identity
    """

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    unigram: bool = False
    bos: int | None = None
    eos: int | None = None
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""


def guess_kinds(pieces: list[str]) -> list[int]:
    """Kinds by the names that sentencepiece gives, for formats that do not store them."""
    named = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    return [named.get(p, BYTE if _BYTE_PIECE.match(p) else NORMAL) for p in pieces]


def added_token(index: int, content: str, special: bool) -> dict[str, Any]:
    """One entry of `added_tokens`: text that is cut out before the model sees the rest."""
    return {
        "id": index,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def unique_texts(texts: list[str], special: list[bool]) -> list[str]:
    """Texts that name one id each: a repeated or empty one becomes a special placeholder (in place)."""
    seen: set[str] = set()
    names = []
    for index, text in enumerate(texts):
        if not text or text in seen:
            text = f"<|halfbyte_repeated_{index}|>"
            special[index] = True
        seen.add(text)
        names.append(text)
    if len(seen) != len(names):
        raise TokenizerError("the vocabulary imitates halfbyte's own placeholder names")
    return names


def _check(vocabulary: PieceVocabulary) -> None:
    count = len(vocabulary.pieces)
    if not 0 < count <= MAX_PIECES:
        raise TokenizerError(f"the tokenizer has {count} pieces; 1 to {MAX_PIECES} are possible")
    if len(vocabulary.scores) != count or len(vocabulary.kinds) != count:
        raise TokenizerError("the tokenizer's pieces, scores and types differ in number")
    for index, (piece, score, kind) in enumerate(zip(vocabulary.pieces, vocabulary.scores, vocabulary.kinds)):
        if not math.isfinite(score):
            raise TokenizerError(f"piece {index} of the tokenizer has the score {score}")
        if not NORMAL <= kind <= BYTE:
            raise TokenizerError(f"piece {index} of the tokenizer has the unknown type {kind}")
        if kind == BYTE and not _BYTE_PIECE.match(piece):
            raise TokenizerError(f"byte piece {index} of the tokenizer is not written <0xNN>")


def derive_merges(pieces: dict[str, int], scores: list[float], results: list[str]) -> list[list[str]]:
    """Pairs [left, right] whose concatenation is in `results`, best score first, then by ids of the parts."""
    ranked: list[tuple[float, int, int, int, str, str]] = []
    for text in results:
        if not 2 <= len(text) <= _MAX_MERGED_CHARACTERS:
            continue
        index = pieces[text]
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in pieces and right in pieces:
                ranked.append((-scores[index], index, pieces[left], pieces[right], left, right))
    ranked.sort()
    return [[left, right] for *_, left, right in ranked]


def tokenizer_json(vocabulary: PieceVocabulary) -> dict[str, Any]:
    """The tokenizer as the object that `tokenizers` reads; raises TokenizerError for a broken vocabulary."""
    _check(vocabulary)
    kinds = vocabulary.kinds
    # Runs of spaces stay pieces: their text occurs as U+2581 only once the normaliser has run.
    cut_out = [kind == USER_DEFINED and p.strip(SPACE) != "" for p, kind in zip(vocabulary.pieces, kinds)]
    special = [kind in (UNKNOWN, CONTROL) for kind in kinds]
    texts = [p.replace(SPACE, " ") if cut else p for p, cut in zip(vocabulary.pieces, cut_out)]
    texts = unique_texts(texts, special)
    added = [
        added_token(index, text, special[index])
        for index, text in enumerate(texts)
        if special[index] or cut_out[index]
    ]
    unknown = next((index for index, kind in enumerate(kinds) if kind == UNKNOWN), None)
    byte_fallback = sum(kind == BYTE for kind in kinds) == 256
    if vocabulary.unigram:
        model = _unigram(texts, vocabulary.scores, unknown, byte_fallback)
    else:
        usable = {
            text: index
            for index, text in enumerate(texts)
            if not special[index] and not cut_out[index] and kinds[index] in (NORMAL, USER_DEFINED)
        }
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else texts[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": byte_fallback,
            "ignore_merges": False,
            "vocab": {text: index for index, text in enumerate(texts)},
            "merges": derive_merges(usable, vocabulary.scores, list(usable)),
        }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normalizer(vocabulary),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _decoder(vocabulary),
        "model": model,
    }


def _unigram(
    texts: list[str], scores: list[float], unknown: int | None, byte_fallback: bool
) -> dict[str, Any]:
    if unknown is None:
        raise TokenizerError("a unigram tokenizer needs an unknown piece and has none")
    return {
        "type": "Unigram",
        "unk_id": unknown,
        "vocab": [[text, score] for text, score in zip(texts, scores)],
        "byte_fallback": byte_fallback,
    }


def _normalizer(vocabulary: PieceVocabulary) -> dict[str, Any]:
    """sentencepiece's order: character map, spaces collapsed, a space in front, spaces escaped."""
    steps: list[dict[str, Any]] = []
    if vocabulary.charsmap:
        encoded = base64.b64encode(vocabulary.charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if vocabulary.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        # Not the library's Strip, which would take newlines and tabs too.
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A | \z"}, "content": ""})
    if vocabulary.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(vocabulary: PieceVocabulary) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if vocabulary.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
