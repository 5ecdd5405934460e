"""The tokenizer in C (native/src/tokenizer*.c) against the `tokenizers` library, over what the converter compiles.

HALFBYTE_TOKENIZER_STRINGS=100000 compares that many random strings a tokenizer, and the whole of WikiText.
"""

from __future__ import annotations

import json
import os
import random
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from ctokenizer import ADD, SPECIAL, CError, CTokenizer, strings
from test_tokenizer_vectors import folder, published
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from halfbyte.converter.tokenizer_import import import_tokenizer
from halfbyte.converter.vocabulary.compile import compile_vocabulary
from halfbyte.formats import vocab
from halfbyte.formats.errors import FormatError, TokenizerError, UsageError
from halfbyte.runtime.backends import native
from halfbyte.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(
    native.library_path() is None, reason="the native library is not built (make native)"
)
MANY = os.environ.get("HALFBYTE_TOKENIZER_STRINGS")
COUNT = int(MANY or 2000)
ROWS = {
    "tokenizers/qwen2": 151936,
    "tokenizers/llama3": 128256,
    "tokenizers/llama2": 32000,
    "tinystories-656k": 2048,
}
VECTORS = {"tokenizers/qwen2": "qwen2", "tokenizers/llama3": "llama-bpe", "tokenizers/llama2": "llama-spm"}


@dataclass
class Pair:
    """A tokenizer of the library and its section."""

    library: Tokenizer
    section: bytes
    c: CTokenizer


def pair_of(json: bytes, bos: int | None = None, add_bos: bool = False) -> Pair:
    section = compile_vocabulary(json, bos, add_bos)
    return Pair(Tokenizer(json, bos, [], add_bos), section, CTokenizer(section))


@cache
def stored(data: Path, name: str) -> Pair:
    imported = import_tokenizer(folder(data / name), ROWS[name])
    return pair_of(imported.json, imported.bos_id, imported.add_bos)


def compare(p: Pair, text: str, decoded: bool = True) -> None:
    """Ids of both readings of a text, and the text of its ids."""
    for special in (True, False):
        try:
            ids = p.library.encode(text, bos=False, special=special)
        except UsageError as refused:
            with pytest.raises(CError, match="as plain text"):
                p.c.encode(text, special * SPECIAL)
            assert "as plain text" in str(refused)
        else:
            assert p.c.encode(text, special * SPECIAL) == ids, (repr(text), special)
    ids = p.library.encode(text)
    assert p.c.encode(text, SPECIAL | ADD) == ids, repr(text)
    if decoded:
        for skip in (True, False):
            assert p.c.decode(ids, int(not skip)) == p.library.decode(ids, skip), ids


@pytest.mark.parametrize("name", VECTORS)
def test_ids_are_the_published_ones(shared_data: Path, name: str) -> None:
    p = stored(shared_data, name)
    for text, ids in published(shared_data / "tokenizers" / "vectors", VECTORS[name]):
        assert p.c.encode(text) == p.c.encode(text, 0) == ids, repr(text)


@pytest.mark.parametrize("name", ROWS)
def test_texts_of_other_tokenizers_vectors(shared_data: Path, name: str) -> None:
    vectors = json.loads((shared_data / "tokenizers" / "vectors" / "transformers-js.json").read_bytes())
    p = stored(shared_data, name)
    for group in vectors.values():
        for cases in group.values():
            for case in cases.values():
                compare(p, case["text"])


@pytest.mark.parametrize("name", ROWS)
def test_random_strings(shared_data: Path, name: str) -> None:
    p = stored(shared_data, name)
    text = (shared_data / "text" / "tinyshakespeare.txt").read_text("utf-8")
    spelled = [p.library.piece(i) for i in sorted(p.library.special_ids)[:6]]
    for one in strings(17, COUNT, spelled, text):
        compare(p, one)


@pytest.mark.parametrize("name", ROWS)
def test_wikitext(shared_data: Path, name: str) -> None:
    p = stored(shared_data, name)
    text = (shared_data / "text" / "wiki.test.raw").read_text("utf-8")
    text = text if MANY else text[:120_000]
    ids = p.library.encode(text, bos=False)
    assert p.c.encode(text) == ids
    assert p.c.decode(ids) == p.library.decode(ids)


@pytest.mark.parametrize("name", ROWS)
def test_tokens(shared_data: Path, name: str) -> None:
    """Bytes, spelling, and random ids one after the other, which are no valid UTF-8."""
    p = stored(shared_data, name)
    lib, r = p.c.lib, random.Random(2)
    assert lib.hb_tokenizer_size(p.c.handle) == p.library.vocab_size
    assert lib.hb_tokenizer_bos(p.c.handle) == (-1 if p.library.bos_id is None else p.library.bos_id)
    for i in [r.randrange(p.library.vocab_size) for _ in range(500)] + sorted(p.library.special_ids)[:9]:
        assert p.c.bytes_of(i) == p.library.token_bytes(i)
        assert lib.hb_token_special(p.c.handle, i) == (i in p.library.special_ids)
    for _ in range(200):
        ids = [r.randrange(p.library.vocab_size) for _ in range(9)]
        assert p.c.decode(ids, 1) == p.library.decode(ids, skip_special=False)


def trained(name: str, text: str) -> Any:
    """A small tokenizer of a family, trained on a text."""
    lines = text.split("\n")
    model: Any = models.BPE()
    normalizer: Any = None
    pre: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    decoder: Any = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    p, n = pre_tokenizers, normalizers
    if name == "gpt2":
        pre = p.ByteLevel(add_prefix_space=True)
    elif name == "digits":
        pre = p.Sequence([p.Digits(individual_digits=True), pre])
    elif name == "behaviours":
        normalizer = n.Lowercase()
        steps = [p.Punctuation("merged_with_previous"), p.Digits(), p.Split(" ", "merged_with_next")]
        pre = p.Sequence([*steps, p.CharDelimiterSplit("x"), pre])
    elif name == "inverted":
        cut = p.Split(Regex("[a-c]+"), "merged_with_previous", invert=True)
        pre = p.Sequence([p.Punctuation("contiguous"), p.WhitespaceSplit(), cut, pre])
    elif name.startswith("bert"):
        model = models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=14)
        trainer = trainers.WordPieceTrainer(
            vocab_size=1000, special_tokens=["[UNK]", "[CLS]"], show_progress=False
        )
        normalizer, pre = n.BertNormalizer(lowercase=name == "bert"), p.BertPreTokenizer()
        if name == "bert-cased":
            normalizer, pre = n.Sequence([n.NFKC(), n.StripAccents(), n.Strip()]), p.Whitespace()
        decoder = decoders.WordPiece(cleanup=name == "bert")
    elif name.startswith("unigram"):
        model, scheme = models.Unigram(), name.rpartition("-")[2]
        special = ["<unk>", "<s>", "</s>"]
        trainer = trainers.UnigramTrainer(
            vocab_size=1000, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        normalizer = {
            "always": n.Sequence([n.NFKD(), n.Replace(Regex(" {2,}"), " "), n.Lowercase()]),
            "first": n.NFD(), "never": n.Sequence([n.Nmt(), n.NFKC()]),
        }[scheme]  # fmt: skip
        pre = p.Metaspace(prepend_scheme=scheme)
        decoder = decoders.Metaspace(prepend_scheme=scheme)
    elif name == "characters":
        model = models.BPE(unk_token="<unk>", fuse_unk=False)
        normalizer, pre = n.Replace(" ", "\u2581"), p.Split("\u2581", "merged_with_next")
        decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
        trainer = trainers.BpeTrainer(
            vocab_size=900, special_tokens=["<unk>", "<s>"], limit_alphabet=60, show_progress=False
        )
    t = tokenizers.Tokenizer(model)
    t.normalizer, t.pre_tokenizer, t.decoder = normalizer or n.Sequence([]), pre, decoder
    t.train_from_iterator(lines, trainer)
    t.add_tokens(
        [AddedToken("foo bar", single_word=True), AddedToken("The"), AddedToken("  ", normalized=False)]
    )
    t.add_tokens([AddedToken("<x>", lstrip=True, rstrip=True, normalized=False)])
    t.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    return t


FAMILIES = (
    "gpt2", "digits", "behaviours", "inverted", "bert", "bert-cased", "unigram-always", "unigram-first",
    "unigram-never", "characters",
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families(shared_data: Path, name: str) -> None:
    text = (shared_data / "text" / "tinyshakespeare.txt").read_text("utf-8")[:25_000]
    p = pair_of(trained(name, text).to_str().encode())
    spelled = ["<mask>", "<|endoftext|>", "<s>", "[CLS]", "</s>", "foo bar", " The ", "<x>", "  "]
    for one in strings(5, int(MANY) if MANY else 300, spelled, text):
        compare(p, one, decoded=False)
        ids = p.library.encode(one)
        if not name.startswith("bert"):
            assert p.c.decode(ids) == p.library.decode(ids)
        elif p.library.id_of("The") not in ids:  # the library shows that one as it is normalised
            assert p.c.decode(ids) == p.library._library.decode(ids)


def test_what_cannot_be_compiled_is_named(shared_data: Path) -> None:
    t = trained("gpt2", "some text\n" * 9)
    for change, why in (
        ({"normalizer": n}, why)
        for n, why in (
            (normalizers.Replace(Regex("(?<=a)b"), "c"), r"group \(\?<="),
            (normalizers.Replace(Regex("b++"), "c"), "possessive"),
            (normalizers.Replace(Regex("b*"), "c"), "matches the empty text"),
            (normalizers.ByteLevel(), "normaliser ByteLevel"),
        )
    ):
        other = tokenizers.Tokenizer.from_str(t.to_str())
        other.normalizer = change["normalizer"]
        with pytest.raises(TokenizerError, match=why):
            compile_vocabulary(other.to_str().encode(), None, False)


def test_calls_that_are_wrong(shared_data: Path) -> None:
    c = stored(shared_data, "tinystories-656k").c
    ids = c.ffi.new("int32_t[4]")
    for data in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"ab\xe2\x82"):
        assert c.lib.hb_tokenize(c.handle, data, len(data), 0, ids, 4) == c.lib.HB_ERROR_ARGUMENT
    whole = c.encode("Once upon a time", SPECIAL | ADD)
    for room in (0, 1, len(whole) - 1):
        ids[0] = ids[1] = -7
        data = b"Once upon a time"
        n = c.lib.hb_tokenize(c.handle, data, len(data), 3, ids if room else c.ffi.NULL, min(room, 4))
        assert n == len(whole) and list(ids)[: min(room, 2)] == whole[: min(room, 2)]
    with pytest.raises(CError, match="outside the vocabulary"):
        c.bytes_of(2048)
    assert c.decode([5000]) == ""


def test_damaged_sections_are_refused_or_harmless(shared_data: Path) -> None:
    """The law refuses them in one line, or C gives some ids; nothing reads beside the section."""
    section = stored(shared_data, "tinystories-656k").section
    assert vocab.encode(vocab.decode(section)) == section
    r = random.Random(9)
    texts = strings(3, 12, ["<s>", "<|end_story|>"])
    refused = 0
    for k in range(400):
        data = bytearray(section)
        if k % 4 == 0:
            data = data[: r.randrange(len(data))]
        limit = 700 if k % 2 else len(data)
        for _ in range(r.randrange(1, 6)):
            data[r.randrange(min(limit, len(data)))] = r.choice((0, 1, 0x7F, 0x80, 0xFF, r.randrange(256)))
        try:
            vocab.decode(bytes(data))
        except FormatError as error:
            refused += 1
            assert "\n" not in str(error)
        try:
            c = CTokenizer(bytes(data))
        except CError as error:
            assert "VOCB" in str(error)
            continue
        for one in texts:
            with suppress(CError):
                c.decode(list(c.encode(one, r.randrange(4))), 1)
    assert refused > 100
