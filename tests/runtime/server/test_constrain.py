"""Grammars: published suites, limits, and errors in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.constrain import MAX_SOURCE, Guide
from halfbyte.runtime.model import Model
from halfbyte.runtime.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import json_schema_suite as suite

# By the JSON Schema specification these are valid: numbers have no longest form, and a schema without `type` says
# nothing of other types. llama.cpp, whose vectors these are, decided otherwise.
LLAMA_CPP_ONLY = ("min 0", "min 2", "empty schema (object)", "min+max items", "object properties")


@pytest.fixture(scope="module")
def guide(demo: Model) -> Guide:
    """The grammars' view of the story model."""
    return Guide(demo)


@pytest.mark.parametrize("draft", suite.DRAFTS)
def test_json_schema_suite(demo: Model, guide: Guide, shared_data: Path, draft: str) -> None:
    tallies = suite.schema_suite(demo, guide, shared_data / "conformance", draft)
    total = sum((t.instances for t in tallies.values()), start=suite.Tally().instances)
    accepted = sum(t.schemas["accepted"] for t in tallies.values())
    suite.show(draft, tallies, False)
    assert total["wrong"] == 0 and accepted > 215 and total["passed"] > 1100
    assert {name for name, t in tallies.items() if t.instances["narrowed"]} <= set(suite.WHY)
    assert total["narrowed"] <= 28 and total["respelled"] <= 16


def test_grammar_vectors(demo: Model, guide: Guide, shared_data: Path) -> None:
    tally = suite.grammar_vectors(demo, guide, shared_data / "conformance")
    assert tally.instances["narrowed"] == 0 and tally.instances["passed"] > 340
    refused = [line for line in tally.failures if line.startswith("refused")]
    assert len(refused) == tally.schemas["refused"] == 1 and "uniqueItems" in refused[0]
    wrong = [line.split(": ")[1] for line in tally.failures if line.startswith("wrong")]
    assert set(wrong) == set(LLAMA_CPP_ONLY)


@pytest.mark.parametrize(
    ("syntax", "source"),
    [
        ("json_schema", {"uniqueItems": True}), ("json_schema", {"type": "strange"}), ("json_schema", False),
        ("json_schema", {"$ref": "#/nowhere"}), ("json_schema", {"$ref": "http://example.com/x"}),
        ("json_schema", {"a": float("nan")}), ("json_schema", {"a": "\ud800"}), ("json_schema", 5),
        ("json_schema", {"pattern": "(" * 50, "type": "string"}), ("regex", "("), ("regex", 7), ("lark", "start: ("),
        ("lark", ""), ("gbnf", "root ::= x"), ("lark", "x" * (MAX_SOURCE + 1)), ("yacc", "x"),
        ("lark", 'start: "\ud800"'),
    ],
)  # fmt: skip
def test_bad_grammars(guide: Guide, syntax: str, source: object) -> None:
    with pytest.raises(UsageError) as caught:
        guide.compile(syntax, source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "keyword",
    [
        {"contains": {"type": "null"}}, {"not": {"pattern": "x"}}, {"if": {"multipleOf": 2}, "then": {"minimum": 0}},
        {"minContains": 2, "contains": {"const": 1}}, {"not": {"type": "integer"}}, {"not": {"const": [1]}},
        {"dependencies": {"a": {"not": {"uniqueItems": True}}}}, {"format": "regex"}, {"format": "idn-email"},
        {"unevaluatedItems": False, "anyOf": [{"items": True}, {"type": "null"}]},
        {"unevaluatedProperties": False, "if": {"required": ["a"]}, "then": {"properties": {"a": True}}},
        {"propertyNames": {"pattern": "x"}, "properties": {"y": {}}}, {"uniqueItems": True}, {"$dynamicRef": "#x"},
        {"oneOf": [{"pattern": "a"}, {"pattern": "b"}]}, {"not": {"not": {"not": {"format": "date"}}}},
        {"divisibleBy": 2},
        {"disallow": "string"}, {"extends": {}}, {"exclusiveMinimum": True}, {"required": True},
    ],
)  # fmt: skip
def test_what_is_not_kept_is_refused_by_its_name(guide: Guide, keyword: dict) -> None:
    name = next(iter(keyword))
    wrapped: list[dict] = [
        keyword,
        {"properties": {"a": keyword}},
        {"items": {"anyOf": [{"type": "null"}, keyword]}},
    ]
    for schema in wrapped:
        with pytest.raises(UsageError) as caught:
            guide.compile("json_schema", schema)
        assert name in str(caught.value) or (name == "dependencies" and "not" in str(caught.value))
    guide.compile(
        "json_schema", {"properties": {name: {"const": {name: 1}}}}
    )  # here it is a name, no keyword


def test_deep_schemas(guide: Guide) -> None:
    schema: dict = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(UsageError, match="nested"):
        guide.compile("json_schema", schema)
    while schema:  # else its end would recurse
        schema = schema.pop("items")


def test_a_tokenizer_that_puts_a_space_in_front(tmp_path: Path) -> None:
    """What a grammar forces is spelled without it: after "ca" only "t" may come."""
    import tokenizers

    pieces = ["<unk>", "</s>", *"acdogtw", "\u2581", "ca", "and"]
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(dict(zip(pieces, range(len(pieces)))), [("c", "a")], unk_token="<unk>")
    )
    library.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    library.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = Tokenizer(library.to_str().encode(), None, [1], False)
    assert tokenizer.encode("ca") == [9, 10]
    model = SimpleNamespace(eos_ids=[1], vocab_size=len(pieces), tokenizer=tokenizer)
    matcher = Guide(model).compile("regex", "(cat|cow) a(tt|d)o").matcher()  # type: ignore[arg-type]
    text = b""
    while not matcher.stopped:
        token = int(matcher.masked(np.arange(len(pieces), dtype=np.float32)).argmax())
        text += tokenizer.token_bytes(token)
        assert token != 1
        matcher.consume(token)
    assert text == b"cat atto"


def test_masks_leave_what_may_come(demo: Model, guide: Guide) -> None:
    matcher = guide.compile("regex", "(dog|cat)!?").matcher()
    logits = np.arange(demo.vocab_size, dtype=np.float32)
    text, steps = b"", 0
    while not matcher.stopped:
        row = matcher.masked(logits)
        allowed = [int(i) for i in np.flatnonzero(np.isfinite(row)) if i != 2]
        whole = {text + demo.tokenizer.token_bytes(i) for i in allowed}
        assert allowed and all(any(w.startswith(t) for w in (b"dog!", b"cat!")) for t in whole)
        np.testing.assert_array_equal(row[allowed], logits[allowed])
        assert np.isfinite(row[2]) == matcher.accepting == (text in (b"dog", b"cat"))
        text, steps = text + demo.tokenizer.token_bytes(allowed[-1]), steps + 1
        matcher.consume(allowed[-1])
    assert text in (b"dog!", b"cat!") and steps > 1
    assert np.flatnonzero(np.isfinite(matcher.masked(logits))).tolist() == [2]
