"""Tokenizers of every source against published ids and texts."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from halfbyte.converter.checkpoints.bounded_file import BoundedFile
from halfbyte.converter.checkpoints.checkpoint import TokenizerSource
from halfbyte.converter.checkpoints.gguf_file import GGUFFile
from halfbyte.converter.tokenizer_import import ImportedTokenizer, import_tokenizer
from halfbyte.converter.vocabulary.pieces import CONTROL, NORMAL
from halfbyte.runtime.tokenizer import Tokenizer


def runtime(imported: ImportedTokenizer) -> Tokenizer:
    return Tokenizer(imported.json, imported.bos_id, imported.eos_ids, imported.add_bos)


def folder(path: Path) -> TokenizerSource:
    config, added = path / "tokenizer_config.json", path / "added_tokens.json"
    return TokenizerSource(
        "tokenizer.json",
        (path / "tokenizer.json").read_bytes(),
        json.loads(config.read_bytes()) if config.exists() else {},
        json.loads(added.read_bytes()) if added.exists() else {},
    )


def gguf(path: Path) -> TokenizerSource:
    file = BoundedFile(path)
    try:
        read = GGUFFile(file)
        return TokenizerSource("gguf", {key: read.get(key) for key in read.keys_under("tokenizer.")})
    finally:
        file.close()


def published(vectors: Path, name: str) -> list[tuple[str, list[int]]]:
    """llama.cpp's cases: texts between marker lines, ids a line per text."""
    texts = (vectors / f"{name}.inp").read_bytes().decode("utf-8").split("\n__ggml_vocab_test__\n")
    lines = (vectors / f"{name}.out").read_text("utf-8").split("\n")
    assert len(texts) == 47 and len(lines) >= 47
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines)]


def source_of(tokenizers: Path, name: str) -> TokenizerSource:
    if name == "gguf":
        return gguf(tokenizers / "vectors" / "ggml-vocab-llama-spm.gguf")
    if name == "sentencepiece":
        return TokenizerSource("sentencepiece", (tokenizers / "llama2" / "tokenizer.model").read_bytes())
    if name == "llama2.c":
        return TokenizerSource("llama2.c", (tokenizers / "llama2" / "tokenizer.llama2c.bin").read_bytes())
    return folder(tokenizers / name)


@pytest.mark.parametrize(
    ("vectors", "name", "rows"),
    [
        ("llama-bpe", "llama3", 128256),
        ("qwen2", "qwen2", 151936),
        ("llama-spm", "llama2", 32000),
        ("llama-spm", "gguf", 32000),
        ("llama-spm", "sentencepiece", 32000),
        ("llama-spm", "llama2.c", 32000),
    ],
)
def test_ids_are_the_published_ones(shared_data: Path, vectors: str, name: str, rows: int) -> None:
    tokenizer = runtime(import_tokenizer(source_of(shared_data / "tokenizers", name), rows))
    for text, ids in published(shared_data / "tokenizers" / "vectors", vectors):
        assert tokenizer.encode(text, bos=False) == ids, repr(text)
        assert tokenizer.encode(text, bos=False, special=False) == ids, repr(text)


@pytest.mark.parametrize(("name", "ends"), [("gguf", [2]), ("sentencepiece", [2]), ("llama2.c", [2, 1])])
def test_llama2_from_other_sources_is_its_tokenizer_json(
    shared_data: Path, name: str, ends: list[int]
) -> None:
    own = json.loads((shared_data / "tokenizers" / "llama2" / "tokenizer.json").read_bytes())
    imported = import_tokenizer(source_of(shared_data / "tokenizers", name), 32000)
    made = json.loads(imported.json)
    assert [" ".join(pair) for pair in made["model"].pop("merges")] == own["model"].pop("merges")
    assert made["model"] == own["model"]
    assert made["normalizer"] == own["normalizer"] and made["decoder"] == own["decoder"]
    assert (imported.bos_id, imported.eos_ids, imported.add_bos) == (1, ends, True)
    assert imported.vocab_size == 32000


def test_gguf_pre_tokenizers_give_the_ids_of_the_tokenizer_json(shared_data: Path) -> None:
    """llama3 and qwen2 as GGUF metadata would hold them."""
    for vectors, name, pre in (("llama-bpe", "llama3", "llama-bpe"), ("qwen2", "qwen2", "qwen2")):
        own = json.loads((shared_data / "tokenizers" / name / "tokenizer.json").read_bytes())
        added = {token["id"]: token["content"] for token in own["added_tokens"]}
        texts = {index: text for text, index in own["model"]["vocab"].items()} | added
        metadata = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": [texts[i] for i in range(len(texts))],
            "tokenizer.ggml.token_type": np.array(
                [CONTROL if i in added else NORMAL for i in range(len(texts))]
            ),
            "tokenizer.ggml.merges": [" ".join(pair) for pair in own["model"]["merges"]],
            "tokenizer.ggml.bos_token_id": min(added),
        }
        imported = import_tokenizer(TokenizerSource("gguf", metadata), len(texts))
        assert imported.add_bos is (pre == "llama-bpe")
        tokenizer = runtime(imported)
        for text, ids in published(shared_data / "tokenizers" / "vectors", vectors):
            assert tokenizer.encode(text, bos=False) == ids, repr(text)
        assert tokenizer.encode(added[min(added)] + "x", bos=False)[0] == min(added)


@pytest.mark.parametrize("kind", ["llama2.c", "sentencepiece", "gguf"])
def test_stories260k(shared_data: Path, kind: str) -> None:
    stories = shared_data / "stories260K"
    if kind == "gguf":
        source = gguf(stories / "stories260K.gguf")
    else:
        name = "tok512.bin" if kind == "llama2.c" else "tok512.model"
        source = TokenizerSource(kind, (stories / name).read_bytes())
    imported = import_tokenizer(source, 512)
    assert (imported.bos_id, imported.eos_ids[0], imported.add_bos) == (1, 2, True)
    tokenizer = runtime(imported)
    golden = json.loads((shared_data / "golden_float64.json").read_bytes())
    for name in ("stories260K", "stories260K.q8_0-weights"):
        case = golden[name]
        assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]
        assert tokenizer.decode(case["greedy_ids"]) == case["greedy_text"]


def test_tinystories_656k(shared_data: Path) -> None:
    imported = import_tokenizer(folder(shared_data / "tinystories-656k"), 2048)
    assert (imported.bos_id, imported.eos_ids, imported.add_bos) == (1, [2], True)
    assert (imported.vocab_size, imported.notes) == (2048, ())
    case = json.loads((shared_data / "golden_float64.json").read_bytes())["tinystories-656k"]
    tokenizer = runtime(imported)
    assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]
    assert tokenizer.decode(case["greedy_ids"], skip_special=False) == case["greedy_text"]


def test_control_tokens_of_an_older_llama_tokenizer_are_found_anywhere(shared_data: Path) -> None:
    tokenizer = runtime(import_tokenizer(folder(shared_data / "tinystories-656k"), 2048))
    assert tokenizer.encode("once<|end_story|>once").count(2) == 1
    assert 2 not in tokenizer.encode("once<|end_story|>once", special=False)
    assert tokenizer.decode(tokenizer.encode("once<|end_story|>"), skip_special=False).endswith(
        "once<|end_story|>"
    )


@pytest.mark.parametrize(
    ("model", "rows"), [("tokenizers/llama2/tokenizer.model", 32000), ("stories260K/tok512.model", 512)]
)
def test_sentencepiece_itself_agrees(shared_data: Path, model: str, rows: int) -> None:
    reference = pytest.importorskip("sentencepiece").SentencePieceProcessor(
        model_file=str(shared_data / model)
    )
    source = TokenizerSource("sentencepiece", (shared_data / model).read_bytes())
    tokenizer = runtime(import_tokenizer(source, rows))
    vectors = json.loads((shared_data / "tokenizers" / "vectors" / "transformers-js.json").read_bytes())
    texts = [
        case["text"] for group in vectors.values() for cases in group.values() for case in cases.values()
    ]
    chooser = random.Random(4)
    letters = " aab be\t\n\u4f60\u597d\U0001f999\u00e9\u200d<s>"
    texts += ["".join(chooser.choices(letters, k=chooser.randrange(40))) for _ in range(500)]
    for name in ("tinyshakespeare.txt", "war-and-peace.txt"):
        lines = (shared_data / "text" / name).read_text("utf-8", "ignore").split("\n")
        texts += chooser.sample(lines, 300)
    for text in texts:
        assert tokenizer.encode(text, bos=False, special=False) == reference.encode(text), repr(text)
