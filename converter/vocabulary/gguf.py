"""Tokenizers in GGUF metadata: `tokenizer.ggml.model` 'llama' (sentencepiece) and 'gpt2' (byte-level BPE)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from halfbyte.converter.vocabulary.pieces import (
    BYTE,
    CONTROL,
    MAX_PIECES,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    PieceVocabulary,
    added_token,
    guess_kinds,
    tokenizer_json,
    unique_texts,
)
from halfbyte.converter.vocabulary.pretokenizers import pre_tokenizer
from halfbyte.formats.errors import TokenizerError

_KEY = "tokenizer.ggml."


@dataclass(frozen=True)
class GgufTokenizer:
    """The tokenizer as the object that `tokenizers` reads, and what the metadata says of its special ids."""

    json: dict[str, Any]
    bos: int | None
    eos: list[int]
    add_bos: bool
    add_eos: bool


def _array(metadata: dict[str, Any], name: str) -> list[Any] | None:
    value = metadata.get(_KEY + name)
    if value is None:
        return None
    values = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(values, list):
        raise TokenizerError(f"GGUF metadata {_KEY}{name} is not an array")
    return values


def _strings(values: Iterable[Any], name: str) -> list[str]:
    texts = [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in values]
    if not all(isinstance(text, str) for text in texts):
        raise TokenizerError(f"GGUF metadata {_KEY}{name} is not an array of strings")
    return texts


def _text(metadata: dict[str, Any], name: str, default: str) -> str:
    value = metadata.get(_KEY + name, default)
    if not isinstance(value, str):
        raise TokenizerError(f"GGUF metadata {_KEY}{name} is not a string")
    return value


def _flag(metadata: dict[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(_KEY + name)
    return default if value is None else bool(value)


def _id(metadata: dict[str, Any], name: str, count: int, default: int | None = None) -> int | None:
    value = metadata.get(f"{_KEY}{name}_token_id", default)
    if value is None or isinstance(value, (str, bytes, bool)):
        return None
    return int(value) if 0 <= int(value) < count else None  # 0xFFFFFFFF stands for none


def read_gguf(metadata: dict[str, Any]) -> GgufTokenizer:
    """Read `tokenizer.ggml.*`; raises TokenizerError for missing, damaged or unsupported metadata."""
    model = _text(metadata, "model", "")
    tokens = _array(metadata, "tokens")
    if not tokens:
        raise TokenizerError("the GGUF file has no tokenizer.ggml.tokens; pass a tokenizer with --tokenizer")
    if len(tokens) > MAX_PIECES:
        raise TokenizerError(
            f"the GGUF tokenizer has {len(tokens)} tokens; at most {MAX_PIECES} are possible"
        )
    texts = _strings(tokens, "tokens")
    kinds = _array(metadata, "token_type")
    if kinds is None:
        kinds = guess_kinds(texts) if model == "llama" else [NORMAL] * len(texts)
    kinds = [kind if isinstance(kind, int) and NORMAL <= kind <= BYTE else NORMAL for kind in kinds]
    if len(kinds) != len(texts):
        raise TokenizerError("GGUF tokenizer.ggml.tokens and token_type differ in length")
    for index, text in enumerate(texts):
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            if kinds[index] != UNUSED:
                raise TokenizerError(f"token {index} of the GGUF tokenizer is not UTF-8")
            texts[index] = ""
    if model == "llama":
        return _llama(metadata, texts, kinds)
    if model == "gpt2":
        return _gpt2(metadata, texts, kinds)
    raise TokenizerError(
        f"GGUF tokenizer model {model!r} is not supported; pass the model's tokenizer.json with --tokenizer"
    )


def _special_ids(
    metadata: dict[str, Any], count: int, bos: int | None, eos: int | None
) -> tuple[int | None, list[int]]:
    ends = (_id(metadata, "eos", count, eos), _id(metadata, "eot", count), _id(metadata, "eom", count))
    return _id(metadata, "bos", count, bos), list(dict.fromkeys(i for i in ends if i is not None))


def _llama(metadata: dict[str, Any], texts: list[str], kinds: list[int]) -> GgufTokenizer:
    scores = _array(metadata, "scores")
    if scores is None:
        raise TokenizerError("the GGUF tokenizer has no tokenizer.ggml.scores")
    if not all(isinstance(score, (int, float)) for score in scores):
        raise TokenizerError("GGUF metadata tokenizer.ggml.scores is not an array of numbers")
    bos, eos = _special_ids(metadata, len(texts), 1, 2)
    vocabulary = PieceVocabulary(
        texts,
        [float(score) for score in scores],
        kinds,
        add_dummy_prefix=_flag(metadata, "add_space_prefix", True),
        remove_extra_whitespaces=_flag(metadata, "remove_extra_whitespaces", False),
    )
    add_bos, add_eos = _flag(metadata, "add_bos_token", True), _flag(metadata, "add_eos_token", False)
    return GgufTokenizer(tokenizer_json(vocabulary), bos, eos, add_bos, add_eos)


def _gpt2(metadata: dict[str, Any], texts: list[str], kinds: list[int]) -> GgufTokenizer:
    pre = pre_tokenizer(_text(metadata, "pre", "default"))
    merges = _array(metadata, "merges")
    if merges is None:
        raise TokenizerError("the GGUF tokenizer has no tokenizer.ggml.merges")
    pairs = []
    for index, merge in enumerate(_strings(merges, "merges")):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise TokenizerError(f"merge {index} of the GGUF tokenizer is not two tokens")
        pairs.append([left, right])
    special = [kind in (UNKNOWN, CONTROL) for kind in kinds]
    texts = unique_texts(texts, special)
    bos, eos = _special_ids(metadata, len(texts), None, None)
    json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(index, text, special[index])
            for index, text in enumerate(texts)
            if special[index] or kinds[index] == USER_DEFINED
        ],
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": pre.json(),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": {text: index for index, text in enumerate(texts)},
            "merges": pairs,
        },
    }
    add_bos = _flag(metadata, "add_bos_token", pre.add_bos)
    return GgufTokenizer(json, bos, eos, add_bos, _flag(metadata, "add_eos_token", False))
