"""Tokenizers of every source, built small here, and damaged ones."""

import json
import random
import struct
from typing import Any

import numpy as np
import pytest

from halfbyte.converter.checkpoints.checkpoint import TokenizerSource
from halfbyte.converter.tokenizer_import import ImportedTokenizer, import_tokenizer
from halfbyte.converter.vocabulary.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from halfbyte.converter.vocabulary.sentencepiece import read_sentencepiece
from halfbyte.formats.errors import TokenizerError
from halfbyte.runtime.tokenizer import Tokenizer


def runtime(imported: ImportedTokenizer) -> Tokenizer:
    return Tokenizer(imported.json, imported.bos_id, imported.eos_ids, imported.add_bos)


# ---- sources built here --------------------------------------------------------------------------------

PIECES = ["<unk>", "<s>", "</s>", *"\u2581abc", "ab", "\u2581ab", "abc", "\u2581abc"]
SCORES = [0.0, 0, 0, -5, -5, -5, -5, -1, -2, -3, -4]
KINDS = [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * 8


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def sentencepiece_model(
    pieces: list[str] = PIECES,
    scores: list[float] = SCORES,
    kinds: list[int] = KINDS,
    trainer: bytes = field(3, 2),
    normalizer: bytes = field(1, b"identity") + field(4, 0),
) -> bytes:
    out = b""
    for piece, score, kind in zip(pieces, scores, kinds):
        message = field(1, piece.encode("utf-8")) + field(2, float(score))
        out += field(1, message + (field(3, kind) if kind != NORMAL else b""))
    return out + field(2, trainer) + field(3, normalizer)


def tokenizer_bin(pieces: list[str] = PIECES, scores: list[float] = SCORES) -> bytes:
    out = struct.pack("<i", max(len(p.encode("utf-8")) for p in pieces))
    for index, (piece, score) in enumerate(zip(pieces, scores)):
        text = f"\n{piece}\n" if index in (1, 2) else piece.replace("\u2581", " ")
        out += struct.pack("<fi", score, len(text.encode("utf-8"))) + text.encode("utf-8")
    return out


def gguf_metadata(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": "llama",
        "tokens": list(PIECES),
        "scores": np.array(SCORES, np.float32),
        "token_type": np.array(KINDS, np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    values |= changes
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def sentencepiece(**changes: Any) -> ImportedTokenizer:
    rows = len(changes.get("pieces", PIECES))
    return import_tokenizer(TokenizerSource("sentencepiece", sentencepiece_model(**changes)), rows)


@pytest.mark.parametrize(
    "source",
    [
        TokenizerSource("sentencepiece", sentencepiece_model()),
        TokenizerSource("llama2.c", tokenizer_bin()),
        TokenizerSource("gguf", gguf_metadata()),
        TokenizerSource("gguf", gguf_metadata(token_type=None, tokens=[p.encode() for p in PIECES])),
    ],
    ids=["sentencepiece", "llama2.c", "gguf", "gguf-without-types"],
)
def test_sentencepiece_bpe(source: TokenizerSource) -> None:
    imported = import_tokenizer(source, len(PIECES))
    assert (imported.bos_id, imported.eos_ids[0], imported.add_bos) == (1, 2, True)
    tokenizer = runtime(imported)
    # "ab" has the best score, then "\u2581ab": "\u2581" and "abc" never come to meet.
    assert [tokenizer.piece(i) for i in tokenizer.encode("abc", bos=False)] == ["\u2581abc"]
    assert [tokenizer.piece(i) for i in tokenizer.encode("cab abab", bos=False)] == [
        *["\u2581", "c", "ab", "\u2581ab", "ab"]
    ]
    assert tokenizer.encode("") == [1]
    assert tokenizer.decode(tokenizer.encode("  a bc")) == "  a bc"
    assert tokenizer.encode("</s>a")[:2] == [1, 2]
    assert 2 not in tokenizer.encode("</s>a", special=False)
    assert tokenizer.encode("z", bos=False)[-1] == 0


def test_byte_fallback() -> None:
    pieces = [*PIECES, *(f"<0x{byte:02X}>" for byte in range(256))]
    scores, kinds = SCORES + [0.0] * 256, KINDS + [BYTE] * 256
    tokenizer = runtime(sentencepiece(pieces=pieces, scores=scores, kinds=kinds))
    ids = tokenizer.encode("é\n", bos=False)
    assert [tokenizer.piece(i) for i in ids] == ["\u2581", "<0xC3>", "<0xA9>", "<0x0A>"]
    assert tokenizer.decode(ids) == "é\n"
    assert tokenizer.decode(tokenizer.encode("a \U0001f999 b")) == "a \U0001f999 b"


def test_user_defined_pieces_are_cut_out_first() -> None:
    pieces, kinds = [*PIECES, "bca", "\u2581\u2581"], [*KINDS, USER_DEFINED, USER_DEFINED]
    imported = sentencepiece(pieces=pieces, scores=[*SCORES, 0.0, 0.0], kinds=kinds, normalizer=field(3, 0))
    tokenizer = runtime(imported)
    assert [tokenizer.piece(i) for i in tokenizer.encode("abcab", bos=False)] == ["a", "bca", "b"]
    assert tokenizer.encode("abca", special=False, bos=False)[-1] == len(PIECES)
    plain = runtime(sentencepiece(normalizer=field(3, 0) + field(4, 0)))
    assert [plain.piece(i) for i in plain.encode("abcab", bos=False)] == ["abc", "ab"]
    assert plain.decode(plain.encode(" a")) == " a"


def test_normalizer_flags() -> None:
    tokenizer = runtime(sentencepiece(normalizer=field(4, 1)))
    assert tokenizer.decode(tokenizer.encode("  a   b ")) == "a b"
    # Only spaces are superfluous: a newline (unknown here) stays.
    assert [tokenizer.piece(i) for i in tokenizer.encode(" \na ", bos=False)] == ["\u2581", "<unk>", "a"]
    assert tokenizer.encode("   ", bos=False) == []
    for bad in (field(5, 0),):
        with pytest.raises(TokenizerError, match="whitespace"):
            sentencepiece(normalizer=bad)
    with pytest.raises(TokenizerError, match="suffix"):
        sentencepiece(trainer=field(3, 2) + field(24, 1))
    for kind in (3, 4, 77):
        with pytest.raises(TokenizerError, match="model type"):
            sentencepiece(trainer=field(3, kind))
    with pytest.raises(TokenizerError):
        sentencepiece(normalizer=field(2, b"\xff\xff\xff\xff charsmap that is none"))


def test_unigram_takes_the_likeliest_path() -> None:
    scores = [0.0, 0, 0, -1, -4, -4, -4, -9, -9, -5, -20]
    tokenizer = runtime(sentencepiece(scores=scores, trainer=field(3, 1)))
    assert [tokenizer.piece(i) for i in tokenizer.encode("abc", bos=False)] == ["\u2581", "abc"]
    assert tokenizer.decode(tokenizer.encode("ab abc")) == "ab abc"
    # The pieces of control tokens are in the model too; as plain text they must not come out.
    pieces = [*PIECES, *"</s>"]
    letters = runtime(
        sentencepiece(pieces=pieces, scores=scores + [-3.0] * 4, kinds=[*KINDS, *[NORMAL] * 4], trainer=b"")
    )
    assert 2 in letters.encode("a</s>b", bos=False)
    plain = letters.encode("a</s>b", bos=False, special=False)
    assert not {1, 2} & set(plain)
    assert letters.decode(plain) == "a</s>b"


def test_disabled_bos_and_other_ids() -> None:
    imported = sentencepiece(trainer=field(3, 2) + field(41, -1) + field(42, 1))
    assert (imported.bos_id, imported.eos_ids, imported.add_bos) == (None, [1], False)


# ---- damage --------------------------------------------------------------------------------------------


def test_sentencepiece_cut_anywhere_is_refused() -> None:
    model = sentencepiece_model()
    for length in range(len(model)):
        with pytest.raises(TokenizerError):
            read_sentencepiece(model[:length])


def test_tokenizer_bin_cut_anywhere_is_refused() -> None:
    data = tokenizer_bin()
    for length in range(len(data)):
        with pytest.raises(TokenizerError):
            import_tokenizer(TokenizerSource("llama2.c", data[:length]), len(PIECES))
    with pytest.raises(TokenizerError):
        import_tokenizer(TokenizerSource("llama2.c", data + data[-12:]), len(PIECES))


@pytest.mark.parametrize("kind", ["sentencepiece", "llama2.c", "tokenizer.json"])
def test_flipped_bytes_never_escape(kind: str) -> None:
    """Whatever the damage: a tokenizer, or one line of TokenizerError."""
    good = {"sentencepiece": sentencepiece_model(), "llama2.c": tokenizer_bin()}.get(
        kind
    ) or sentencepiece().json
    random_ = random.Random(kind)
    outcomes = set()
    for _ in range(400):
        data = bytearray(good)
        for _ in range(random_.randint(1, 3)):
            data[random_.randrange(len(data))] = random_.choice((0, 255, 127, 128, random_.randrange(256)))
        try:
            imported = import_tokenizer(TokenizerSource(kind, bytes(data)), len(PIECES))
            runtime(imported).encode("abc </s> é")
            outcomes.add("read")
        except TokenizerError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 32,
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x80" * 16,
        field(1, field(1, b"\xff\xfe")),
        field(1, field(1, b"a" * 5000)),
        field(1, 7),
        field(1, field(2, 7)),
        field(2, 1.5),
        sentencepiece_model(kinds=[9] * 11),
        sentencepiece_model(scores=[float("nan")] * 11),
        sentencepiece_model(kinds=[BYTE] * 11),
        sentencepiece_model(trainer=field(3, b"x")),
        sentencepiece_model(trainer=field(3, 1), kinds=[NORMAL] * 11),
        b"\x03" + sentencepiece_model(),
    ],
)
def test_hostile_sentencepiece(data: bytes) -> None:
    with pytest.raises(TokenizerError) as caught:
        import_tokenizer(TokenizerSource("sentencepiece", data), 64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<i", 0),
        struct.pack("<i", -1) + bytes(64),
        struct.pack("<i", 2**31 - 1) + bytes(64),
        struct.pack("<ifi", 7, 0.0, -1) + bytes(64),
        struct.pack("<ifi", 7, 0.0, 2**31 - 1) + bytes(64),
        struct.pack("<ifi", 7, 0.0, 2) + b"\xff\xfe" + bytes(64),
        struct.pack("<i", 7) + struct.pack("<fi", float("nan"), 0) * 4,
    ],
)
def test_hostile_tokenizer_bin(data: bytes) -> None:
    with pytest.raises(TokenizerError) as caught:
        import_tokenizer(TokenizerSource("llama2.c", data), 4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "rwkv"},
        {"model": None},
        {"model": 3},
        {"tokens": None},
        {"tokens": []},
        {"tokens": "abc"},
        {"tokens": [1] * 11},
        {"tokens": ["\udcff"] * 11},
        {"scores": None},
        {"scores": np.zeros(3)},
        {"scores": ["x"] * 11},
        {"scores": np.full(11, np.nan)},
        {"token_type": np.ones(3, int)},
        {"model": "gpt2"},
        {"model": "gpt2", "merges": ["a"]},
        {"model": "gpt2", "merges": ["a b c"]},
        {"model": "gpt2", "merges": ["a zz"]},
        {"model": "gpt2", "merges": [], "pre": 4},
    ],
)
def test_damaged_gguf_metadata(changes: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError) as caught:
        import_tokenizer(TokenizerSource("gguf", gguf_metadata(**changes)), 64)
    assert "\n" not in str(caught.value)


def test_unknown_gguf_pre_tokenizer_is_refused_by_name() -> None:
    with pytest.raises(TokenizerError, match="'tomorrows-bpe'"):
        metadata = gguf_metadata(model="gpt2", merges=[], pre="tomorrows-bpe")
        import_tokenizer(TokenizerSource("gguf", metadata), 64)


def test_gguf_flags_and_ends() -> None:
    metadata = gguf_metadata(
        tokens=[*PIECES, "<|eot_id|>", "ab", "\udcff"],
        scores=np.zeros(14, np.float32),
        token_type=np.array([*KINDS, CONTROL, NORMAL, UNUSED]),
        add_bos_token=False,
        add_eos_token=True,
        eot_token_id=5,
        eom_token_id=2**32 - 1,
    )
    imported = import_tokenizer(TokenizerSource("gguf", metadata), 20)
    assert (imported.eos_ids, imported.add_bos, imported.vocab_size) == ([2, 5, 11], False, 14)
    assert "EOS" in imported.notes[0]
    tokenizer = runtime(imported)
    assert tokenizer.decode([7, 12, 13]) == "ab"  # a repeated and an unreadable token mean nothing


@pytest.mark.parametrize(
    "pre",
    [
        "default",
        "llama-bpe",
        "qwen2",
        "qwen35",
        "gpt-2",
        "smollm",
        "tekken",
        "gpt-4o",
        "dbrx",
        "olmo",
        "phi-2",
        "falcon",
        "deepseek-coder",
        "deepseek-v3",
        "seed-coder",
    ],
)
def test_every_pattern_cuts_text_without_losing_any(pre: str) -> None:
    """All 256 bytes as tokens: whatever the pattern, what is encoded decodes to itself."""
    from tokenizers.pre_tokenizers import ByteLevel

    metadata = gguf_metadata(
        model="gpt2", tokens=sorted(ByteLevel.alphabet()), token_type=None, scores=None, merges=[], pre=pre
    )
    tokenizer = runtime(import_tokenizer(TokenizerSource("gguf", metadata), 256))
    text = " It's 12345 o'CLOCK,\n\n\tüber-groß \u4f60\u597d\uff01 \U0001f468\u200d\U0001f33e  \r\n x = y[0] += 1;  "
    ids = tokenizer.encode(text, bos=False)
    assert len(ids) == len(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text


# ---- tokenizer.json ------------------------------------------------------------------------------------


def small_json(**changes: Any) -> dict[str, Any]:
    tokenizer = json.loads(sentencepiece().json)
    return tokenizer | changes


def import_json(tokenizer: Any, rows: int = 64, **source: Any) -> ImportedTokenizer:
    return import_tokenizer(TokenizerSource("tokenizer.json", json.dumps(tokenizer).encode(), **source), rows)


def template(*items: str) -> dict[str, Any]:
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if i == "A" else {"SpecialToken": {"id": i, "type_id": 0}}
        for i in items
    ]
    special = {p: {"id": p, "ids": [PIECES.index(p)], "tokens": [p]} for p in ("<s>", "</s>")}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


def test_bos_comes_from_the_post_processor() -> None:
    imported = import_json(small_json(post_processor=template("<s>", "A")))
    assert (imported.bos_id, imported.add_bos, imported.notes) == (1, True, ())
    assert runtime(imported).encode("a") == [1, *runtime(imported).encode("a", bos=False)]
    assert runtime(imported).encode("<s>a").count(1) == 1


def test_what_else_the_post_processor_adds_is_named() -> None:
    imported = import_json(
        small_json(post_processor=template("<s>", "A", "</s>")), config={"bos_token": "<s>"}
    )
    assert imported.add_bos
    assert len(imported.notes) == 1 and "</s>" in imported.notes[0]
    assert runtime(imported).encode("a")[-1] != 2


@pytest.mark.parametrize(
    ("config", "post", "expected"),
    [
        ({}, None, (None, False)),
        ({"bos_token": "<s>"}, None, (1, False)),
        ({"bos_token": "<s>", "add_bos_token": True}, None, (1, True)),
        ({"bos_token": {"content": "<s>"}, "add_bos_token": True}, None, (1, True)),
        ({"bos_token": "<s>", "add_bos_token": False}, template("<s>", "A"), (1, False)),
        ({"bos_token": "<s>", "tokenizer_class": "LlamaTokenizerFast"}, None, (1, True)),
        ({"bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}, None, (1, False)),
        ({"bos_token": None, "add_bos_token": True}, None, (None, False)),
        ({"bos_token": "nowhere", "add_bos_token": True}, None, (None, False)),
    ],
)
def test_configuration_beside_the_tokenizer(config: dict, post: Any, expected: tuple) -> None:
    imported = import_json(small_json(post_processor=post), config=config)
    assert (imported.bos_id, imported.add_bos) == expected


def test_ends_of_a_generation() -> None:
    config = {"eos_token": "</s>", "added_tokens_decoder": {"11": {"content": "<|im_end|>", "special": True}}}
    imported = import_json(small_json(), config=config, added={"<tool>": 12})
    assert imported.eos_ids == [2, 11]
    assert imported.vocab_size == 13
    tokenizer = runtime(imported)
    assert tokenizer.encode("a<|im_end|><tool>", bos=False)[-2:] == [11, 12]
    assert 11 not in tokenizer.encode("a<|im_end|>", special=False)
    assert tokenizer.special_ids == {0, 1, 2, 11}


def test_truncation_and_padding_are_switched_off() -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    imported = import_json(small_json(truncation=truncation))
    assert len(runtime(imported).encode("a b c a b c", bos=False)) > 2


def test_ids_beyond_the_model_are_refused_and_fewer_are_fine() -> None:
    assert import_json(small_json(), rows=len(PIECES)).vocab_size == len(PIECES)
    assert import_json(small_json(), rows=1000).vocab_size == len(PIECES)
    with pytest.raises(TokenizerError, match="does not belong"):
        import_json(small_json(), rows=len(PIECES) - 1)
    for source in (
        TokenizerSource("sentencepiece", sentencepiece_model()),
        TokenizerSource("gguf", gguf_metadata()),
        TokenizerSource("llama2.c", tokenizer_bin()),
    ):
        with pytest.raises(TokenizerError):
            import_tokenizer(source, len(PIECES) - 1)


def test_placeholders_of_other_modalities_may_lie_beyond() -> None:
    extra = {"11": {"content": "<image_soft_token>", "special": True}}
    imported = import_json(small_json(), rows=len(PIECES), config={"added_tokens_decoder": extra})
    assert imported.vocab_size == len(PIECES)
    added = {"id": 11, "content": "<image_soft_token>", "special": True, "normalized": False}
    added |= {"single_word": False, "lstrip": False, "rstrip": False}
    tokenizer = small_json()
    tokenizer["added_tokens"].append(added)
    imported = import_json(tokenizer, rows=len(PIECES))
    assert imported.vocab_size == len(PIECES) and "image_soft_token" in imported.notes[0]
    tokenizer["added_tokens"][-1] = added | {"content": "<|im_start|>"}
    with pytest.raises(TokenizerError, match="im_start"):
        import_json(tokenizer, rows=len(PIECES))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 100000,
        b'{"model": 5}',
        b'{"model": {"type": "Markov"}}',
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
        b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}}',
        b'{"added_tokens": 4, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
        b'{"added_tokens": [4], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
    ],
)
def test_damaged_tokenizer_json(data: bytes) -> None:
    with pytest.raises(TokenizerError) as caught:
        import_tokenizer(TokenizerSource("tokenizer.json", data), 64)
    assert "\n" not in str(caught.value)


def test_two_ids_for_one_token_are_refused() -> None:
    with pytest.raises(TokenizerError, match="two different ids"):
        import_json(small_json(), added={"<tool>": 40})


def test_unknown_kind() -> None:
    with pytest.raises(TokenizerError, match="'tiktoken'"):
        import_tokenizer(TokenizerSource("tiktoken", b"x"), 64)
    with pytest.raises(TokenizerError):
        import_tokenizer(TokenizerSource("sentencepiece", {}), 64)
