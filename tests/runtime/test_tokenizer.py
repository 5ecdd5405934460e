"""Encoding and decoding: published texts, streams of halved characters, control tokens as plain text."""

import itertools
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from halfbyte.converter.checkpoints.checkpoint import TokenizerSource
from halfbyte.converter.tokenizer_import import import_tokenizer
from halfbyte.formats.errors import TokenizerError, UsageError
from halfbyte.runtime.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces  ",
    "\n\n\ttabs\r\n",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\ud55c\uad6d\uc5b4",
    "caf\u00e9 na\u00efve \u0935\u093f\u0915\u093f",
    "\U0001f999\U0001f600",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "a\ufffdb",
    "\x00\x7f",
]


def special(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, special=True, normalized=False, **flags)


def wrap(library: Library, bos: str | None = "<s>", add_bos: bool = True) -> Tokenizer:
    bos_id = None if bos is None else library.token_to_id(bos)
    return Tokenizer(library.to_str().encode("utf-8"), bos_id, [library.token_to_id("</s>")], add_bos)


def byte_level() -> Tokenizer:
    """Bytes, and merges that join bytes across the borders of characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("Hello", "\U0001f999", "\u4f60\u597d"):
        # The last becomes tokens of two bytes each: the middle one has parts of both characters.
        ((spelled, _),) = spell.pre_tokenize_str(text)
        for left, right in itertools.zip_longest(spelled[0::2], spelled[1::2]):
            if right is not None:
                merges.append((left, right))
                vocab[left + right] = len(vocab)
    library = Library(models.BPE(vocab=vocab, merges=merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = decoders.ByteLevel()
    library.add_tokens([special("<s>"), special("</s>"), special("<|im_end|>")])
    library.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return wrap(library)


def metaspace(add_bos: bool = True, steps: Any = None) -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *"Helowrd", "He", "Hel", "\u2581w", "\u2581wo", "\u4f60"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("H", "e"), ("He", "l"), ("\u2581", "w"), ("\u2581w", "o")]
    library = Library(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    library.decoder = steps or decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([special("<unk>"), special("<s>"), special("</s>")])
    return wrap(library, add_bos=add_bos)


def word_piece() -> Tokenizer:
    """A decoder that is no map of bytes: spaces depend on the neighbours."""
    words = ["[UNK]", "<s>", "</s>", "run", "##ning", "##s", "fast", "!"]
    vocab = {word: index for index, word in enumerate(words)}
    library = Library(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.add_special_tokens([special("<s>"), special("</s>")])
    return wrap(library)


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_stream(make: Any, text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    parts = [stream.push(id) for id in ids]
    assert "".join(parts) == text and stream.flush() == ""
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text
    # The library's own decoder agrees; it is the second opinion here.
    assert tokenizer._library.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_a_character_comes_out_whole_and_at_once(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer.encode("\U0001f999", bos=False)
    stream = tokenizer.stream()
    parts = [stream.push(id) for id in ids]
    assert parts[-1] == "\U0001f999"
    assert set(parts[:-1]) <= {""} and len(parts) >= 2


def test_tokens_that_share_a_character_with_both_neighbours() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("\u4f60\u597d\u4f60\u597d", bos=False)
    assert [len(tokenizer.token_bytes(id)) for id in ids] == [2] * 6
    stream = tokenizer.stream()
    assert [stream.push(id) for id in ids] == ["", "\u4f60", "\u597d", "", "\u4f60", "\u597d"]


def test_every_split_of_bytes_into_tokens_streams_alike() -> None:
    tokenizer = metaspace()
    byte = {value: tokenizer.id_of(f"<0x{value:02X}>") for value in range(256)}
    text = "\u00e9\u4f60\U0001f468\u200d\U0001f33e"
    stream = tokenizer.stream()
    shown = ""
    for position, value in enumerate(text.encode("utf-8"), 1):
        shown += stream.push(byte[value])
        whole = text.encode("utf-8")[:position].decode("utf-8", "ignore")
        assert shown == whole  # as early as possible, never half a character


def test_broken_utf8_is_shown_and_does_not_spoil_what_follows() -> None:
    tokenizer = metaspace()
    byte = {value: tokenizer.id_of(f"<0x{value:02X}>") for value in range(256)}
    hello = tokenizer.id_of("Hel")
    stream = tokenizer.stream()
    assert [stream.push(id) for id in (byte[0xF0], byte[0x9F], hello)] == ["", "", "\ufffdHel"]
    assert [stream.push(id) for id in (byte[0xFF], hello, byte[0xE4])] == ["\ufffd", "Hel", ""]
    assert stream.flush() == "\ufffd"
    assert stream.push(tokenizer.id_of("\u2581wo")) == "wo"  # anew: the first space is the encoder's


def test_random_ids_stream_as_they_decode_in_constant_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (byte_level, metaspace):
        tokenizer = make()
        chooser = random.Random(1)
        ids = [chooser.randrange(tokenizer.vocab_size) for _ in range(3000)]
        stream = tokenizer.stream()
        parts = [stream.push(id) for id in ids]
        assert "".join(parts) + stream.flush() == tokenizer.decode(ids)
        assert max(map(len, parts)) < 40  # nothing is kept for long
        raw = b"".join(tokenizer.token_bytes(id) for id in ids if id not in tokenizer.special_ids)
        assert tokenizer.decode(ids).strip(" ") == raw.decode("utf-8", "replace").strip(" ")


def test_only_the_first_space_of_a_text_belongs_to_the_encoder() -> None:
    tokenizer = metaspace()
    wo = tokenizer.id_of("\u2581wo")
    assert tokenizer.decode([wo, wo]) == "wo wo"
    assert tokenizer.decode([tokenizer.bos_id, wo, tokenizer.bos_id, wo]) == "wo wo"
    assert tokenizer.decode([tokenizer.bos_id, wo], skip_special=False) == "<s> wo"
    space = tokenizer.id_of("\u2581")
    assert tokenizer.decode([space, space, wo]) == "  wo"


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_decoder(scheme: str) -> None:
    tokenizer = metaspace(steps=decoders.Metaspace(prepend_scheme=scheme))
    space, wo, hel = (tokenizer.id_of(piece) for piece in ("\u2581", "\u2581wo", "Hel"))
    for ids in itertools.product((space, wo, hel), repeat=3):
        assert tokenizer.decode(ids) == tokenizer._library.decode(ids)


def test_decoders_that_are_no_map_of_bytes_go_by_a_window() -> None:
    tokenizer = word_piece()
    text = "run running runs fast ! " * 20
    ids = tokenizer.encode(text, bos=False)
    whole = tokenizer._library.decode(ids)
    stream = tokenizer.stream()
    parts = [stream.push(id) for id in ids]
    assert "".join(parts) + stream.flush() == whole == tokenizer.decode(ids)
    assert parts[1] == " run" and parts[2] == "ning"


def test_bos_once() -> None:
    tokenizer = byte_level()
    bos = tokenizer.bos_id
    plain = tokenizer.encode("x", bos=False)
    assert tokenizer.encode("x") == [bos, *plain] == tokenizer.encode("x", bos=True)
    assert tokenizer.encode("<s>x") == [bos, *plain] == tokenizer.encode("<s>x", bos=False)
    assert metaspace(add_bos=False).encode("") == []
    assert metaspace(add_bos=False).encode("", bos=True) == [1]


def test_the_post_processor_is_not_run() -> None:
    library = Library.from_str(byte_level()._library.to_str())
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(p, library.token_to_id(p)) for p in ("<s>", "</s>")]
    )
    assert wrap(library).encode("x") == byte_level().encode("x")
    assert wrap(library, add_bos=False).encode("x") == byte_level().encode("x", bos=False)


def test_truncation_in_the_file_does_not_shorten_a_prompt() -> None:
    library = Library.from_str(byte_level()._library.to_str())
    library.enable_truncation(3)
    library.enable_padding(length=50)
    assert wrap(library).encode("0123456789") == byte_level().encode("0123456789")


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("text", ["</s>", "a</s>b", "<s><s></s>", " </s> </s>", "<</s>/s>"])
def test_users_cannot_inject_control_tokens(make: Any, text: str) -> None:
    tokenizer = make()
    assert tokenizer.special_ids & set(tokenizer.encode(text, bos=False))
    plain = tokenizer.encode(text, bos=False, special=False)
    assert not tokenizer.special_ids & set(plain)
    assert tokenizer.decode(plain) == text
    assert tokenizer.encode(text, bos=False) == tokenizer.encode(text, bos=False)  # the mode does not stick


def test_a_word_that_is_a_control_token_to_the_model_itself() -> None:
    """With ignore_merges the model takes a word whole if its vocabulary has it: here that is a control."""
    library = Library.from_str(byte_level()._library.to_str())
    state = json.loads(library.to_str())
    state["model"]["vocab"]["STOP"] = 999
    state["model"]["ignore_merges"] = True
    state["added_tokens"].append({**state["added_tokens"][0], "id": 999, "content": "STOP"})
    tokenizer = Tokenizer(json.dumps(state).encode(), None, [999], False)
    assert tokenizer.encode("STOP") == [999]
    assert tokenizer.decode(tokenizer.encode("do STOP:STOP", special=False)) == "do STOP:STOP"
    assert 999 not in tokenizer.encode("do STOP:STOP", special=False)
    assert 999 not in tokenizer.encode("STOP", special=False)


def test_threads_do_not_disturb_each_other() -> None:
    tokenizer = byte_level()
    expected = {flag: tokenizer.encode("a</s>b", special=flag) for flag in (True, False)}
    wrong: list[bool] = []

    def work(flag: bool) -> None:
        for _ in range(200):
            if tokenizer.encode("a</s>b", special=flag) != expected[flag]:
                wrong.append(flag)

    threads = [threading.Thread(target=work, args=(flag,)) for flag in (True, False, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_pieces_and_bytes() -> None:
    tokenizer = metaspace()
    assert tokenizer.vocab_size == 3 + 256 + 8 + 5
    assert [tokenizer.piece(i) for i in (1, 13, 259)] == ["<s>", "<0x0A>", "\u2581"]
    assert [tokenizer.token_bytes(i) for i in (1, 13, 259)] == [b"<s>", b"\n", b" "]
    for missing in (tokenizer.vocab_size, 10**9, -1):
        assert tokenizer.piece(missing) == "" and tokenizer.token_bytes(missing) == b""
        assert tokenizer.decode([missing]) == ""
    assert byte_level().token_bytes(byte_level().encode("<think>", bos=False)[0]) == b"<think>"


def test_text_that_is_not_unicode() -> None:
    with pytest.raises(UsageError, match="Unicode"):
        byte_level().encode("\udc80")


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"model": {"type": "BPE"}}', b"[" * 10000])
def test_damaged_tokenizers(data: bytes) -> None:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer(data, None, [], False)
    assert "\n" not in str(caught.value)


# ---- real tokenizers -----------------------------------------------------------------------------------

# Cases whose expected text was cleaned up by transformers (no space before punctuation), which is not ours.
CLEANED_UP = {"PUNCTUATION"}


def real(shared_data: Path, name: str, rows: int) -> Tokenizer:
    folder = shared_data / "tokenizers" / name
    config = folder / "tokenizer_config.json"
    source = TokenizerSource(
        "tokenizer.json",
        (folder / "tokenizer.json").read_bytes(),
        json.loads(config.read_bytes()) if config.exists() else {},
    )
    imported = import_tokenizer(source, rows)
    return Tokenizer(imported.json, imported.bos_id, imported.eos_ids, imported.add_bos)


@pytest.mark.parametrize(
    ("name", "rows", "group", "model", "bos", "count"),
    [
        ("llama2", 32000, "llama", "Xenova/llama-tokenizer", True, 37),
        ("llama3", 128256, "llama", "Xenova/llama3-tokenizer", False, 37),
        ("llama3", 128256, "llama", "Xenova/llama3-tokenizer-new", True, 37),
        ("qwen2", 151936, "qwen2", "Xenova/Qwen1.5-0.5B-Chat", False, 25),
    ],
)
def test_ids_and_texts_of_transformers_js(
    shared_data: Path, name: str, rows: int, group: str, model: str, bos: bool, count: int
) -> None:
    vectors = json.loads((shared_data / "tokenizers" / "vectors" / "transformers-js.json").read_bytes())
    cases = vectors[group][model]
    assert len(cases) == count
    tokenizer = real(shared_data, name, rows)
    for title, case in cases.items():
        assert tokenizer.encode(case["text"], bos=bos) == case["ids"], title
        decoded = tokenizer.decode(case["ids"], skip_special=False)
        if name == "llama3" and title in CLEANED_UP:
            assert decoded.removeprefix("<|begin_of_text|>") == case["text"]
        else:
            assert decoded == case["decoded"], title
        stream = tokenizer.stream(skip_special=False)
        parts = [stream.push(id) for id in case["ids"]]
        assert "".join(parts) + stream.flush() == decoded
        assert all("\ufffd" not in part for part in parts) or "\ufffd" in case["text"], title


def test_a_rendered_chat_prompt_has_its_control_tokens(shared_data: Path) -> None:
    tokenizer = real(shared_data, "qwen2", 151936)
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n")
    assert ids[0] == 151644 and ids[-2] == 151645
    typed = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n", special=False)
    assert not tokenizer.special_ids & set(typed)
    assert tokenizer.decode(typed) == "<|im_start|>user\nHi<|im_end|>\n"
