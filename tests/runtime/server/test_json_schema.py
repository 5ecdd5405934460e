"""Schemas said in other keywords: what they accept is what another implementation of the standard says."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.constrain import Guide
from halfbyte.runtime.json_schema import COUNTS, NAMED, ONE, SEVERAL, rewritten
from halfbyte.runtime.model import Model

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import json_schema_suite as suite

NAMES = ("a", "b", "c")
SCALARS = (None, True, False, 0, 1, 2, 1.5, "", "a", "ab", "abc", "b")
ALL_KEYS = (*ONE, *SEVERAL, *NAMED, *COUNTS, "type", "enum", "required", "dependentRequired", "$ref")
TYPES = ("object", "array", "string", "number", "boolean", "null", "integer", ["object", "string"])


@pytest.fixture(scope="module")
def guide(demo: Model) -> Guide:
    """The grammars' view of the story model."""
    return Guide(demo)


def value(rng: random.Random, depth: int = 0) -> Any:
    """A value of a few levels."""
    kind = rng.randrange(8 if depth < 2 else 6)
    if kind < 6:
        return rng.choice(SCALARS)
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {name: value(rng, depth + 1) for name in rng.sample([*NAMES, "d"], rng.randrange(4))}


def schema(rng: random.Random, depth: int = 0) -> Any:
    """A schema of a few keywords."""
    if depth > 2 or rng.random() < 0.06:
        return rng.choice((True, False, {}))

    def inner() -> Any:
        return schema(rng, depth + 1)

    def names(least: int) -> list[str]:
        return rng.sample(NAMES, rng.randrange(least, 3))

    def several() -> list[Any]:
        return [inner() for _ in range(rng.randrange(1, 4))]

    makers: dict[str, Any] = {
        "type": lambda: rng.choice(TYPES), "const": lambda: rng.choice(SCALARS),
        "enum": lambda: rng.sample(SCALARS, 3), "minimum": lambda: rng.choice((0, 1, 1.5)),
        "maxLength": lambda: rng.choice((0, 1.0, 2)), "minItems": lambda: rng.choice((0, 1, 2.0)),
        "maxProperties": lambda: rng.randrange(3), "required": lambda: names(1),
        "properties": lambda: {n: inner() for n in names(1)}, "allOf": several, "anyOf": several, "oneOf": several,
        "prefixItems": several, "not": inner, "if": inner, "then": inner, "else": inner, "items": inner,
        "additionalProperties": inner, "unevaluatedProperties": inner, "unevaluatedItems": inner,
        "dependentRequired": lambda: {rng.choice(NAMES): names(0)}, "$ref": lambda: "#/$defs/x",
        "uniqueItems": lambda: True,
        "dependentSchemas": lambda: {rng.choice(NAMES): inner()}, "contains": dict,
        "propertyNames": lambda: rng.choice((True, False, {"enum": ["a", "b"]}, {"maxLength": 1}, {"pattern": "^a"})),
    }  # fmt: skip
    return {key: makers[key]() for key in rng.sample(list(makers), rng.randrange(1, 5))}


@pytest.mark.parametrize("seed", range(3))
def test_random_schemas(demo: Model, guide: Guide, seed: int) -> None:
    oracle = pytest.importorskip("jsonschema").Draft202012Validator
    rng, compared, accepted = random.Random(seed), 0, 0
    for _ in range(150):
        tried = {
            "allOf": [schema(rng)],
            "$defs": {"x": {"type": "object", "properties": {"a": schema(rng, 1)}}},
        }
        try:
            grammar = guide.compile("json_schema", tried)
        except UsageError:
            continue
        accepted += 1
        for candidate in [*(value(rng) for _ in range(12)), {"a": 1}, {"a": "a", "b": 1}, {}]:
            try:
                valid = oracle(tried).is_valid(candidate)
            except RecursionError:  # a reference to itself
                continue
            written = any(suite.accepts(demo, grammar, text) for text in suite.spellings(candidate))
            assert written == valid, (tried, candidate)
            compared += 1
    assert accepted > 40 and compared > 500


@pytest.mark.parametrize(
    ("given", "right", "wrong"),
    [
        ({"not": {"const": "foo"}}, ["fo", "", "fooo", "f", 1, {}], ["foo"]),
        ({"not": {"enum": [1, "a", None, True]}}, [0, 1.5, 2, "b", False, []], [1, "a", None, True]),
        ({"if": {"properties": {"k": {"const": "a"}}, "required": ["k"]}, "then": {"required": ["x"]}},
         [{"k": "a", "x": 1}, {"k": "b"}, {}], [{"k": "a"}]),
        ({"type": "object", "additionalProperties": {"type": "integer"}, "propertyNames": {"type": "string"}},
         [{"q": 1}], [{"q": "x"}]),
        ({"type": "object", "properties": {"a": {"format": "int32", "type": "integer"}}}, [{"a": 1}], [{"a": "x"}]),
        ({"$ref": "#/$defs/p", "properties": {"z": True}, "unevaluatedProperties": False,
          "$defs": {"p": {"properties": {"a": {"type": "null"}}}}}, [{"a": None, "z": 1}], [{"y": 1}, {"a": 1}]),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"}, [{"a": 1}, {"b": 1}],
         [{}, {"a": 1, "b": 1}]),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "$ref": "#/definitions/n", "type": "string",
          "definitions": {"n": {"type": "null"}}}, [None], ["x"]),
        ({"type": "array", "items": {"$ref": "#/$defs/c"}, "uniqueItems": True, "minItems": 1, "maxItems": 2,
          "$defs": {"c": {"type": "string", "enum": ["r", "g", "b"]}}}, [["g", "r"], ["b"]],
         [[], ["r", "r"], ["r", "g", "b"], ["x"], "r"]),
        ({"items": {"enum": [1, None, "x"]}, "uniqueItems": True}, [[None, 1], [], "y"], [[1, 1], [1, 1.0], [True]]),
        ({"type": "number", "exclusiveMinimum": -1.25, "maximum": 0.256}, [0.2, 0.25, 0.256, -1.2, 0], [-1.25, 0.26]),
        ({"type": "string", "format": "date"}, ["2024-02-29"], ["2023-02-29", "2100-02-29", "2024-04-31"]),
        ({"type": "string", "format": "time"}, ["01:29:60+01:30", "23:59:60Z"], ["01:29:60Z", "24:00:00Z"]),
        ({"type": "string", "format": "ipv6"}, ["::", "::ffff:1.2.3.4", "1::8"], [":", "1:2", "::1::", "::1.2.3.256"]),
    ],
)  # fmt: skip
def test_what_is_said_by_others(
    demo: Model, guide: Guide, given: Any, right: list[Any], wrong: list[Any]
) -> None:
    before = repr(given)
    grammar = guide.compile("json_schema", given)
    assert repr(given) == before  # the caller's object
    for candidate in right:
        assert any(suite.accepts(demo, grammar, t) for t in suite.spellings(candidate)), candidate
    for candidate in wrong:
        assert not any(suite.accepts(demo, grammar, t) for t in suite.spellings(candidate)), candidate


def test_what_nothing_matches_is_said() -> None:
    for impossible in (False, {"not": {}}, {"allOf": [False]}, {"not": {"type": [*TYPES[:7]]}}):
        with pytest.raises(UsageError, match="nothing matches"):
            rewritten(impossible)


def test_references_without_end_and_many_branches() -> None:
    loop = {"$defs": {"a": {"not": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}
    assert "not" in rewritten(loop)["$defs"]["a"]
    many = {"oneOf": [{"required": [str(i)]} for i in range(17)]}
    assert rewritten(many, one_of=True) == many


def test_hostile_schemas_end_in_one_line(guide: Guide) -> None:
    chain: dict[str, Any] = {"e": {"const": 1}}
    for i in range(40):
        there = {"$ref": f"#/$defs/{'e' if i == 0 else i - 1}"}
        chain[str(i)] = {"properties": {"a": there, "b": there}}
    deep: Any = {"const": 1}
    for _ in range(60):
        deep = {"not": {"properties": {"a": deep}}}
    wrong = [
        {key: odd} for key in (*ALL_KEYS, "if", "format") for odd in (5, "x", [], [5], None, {"a": 5}, [None])
    ]
    for hostile in [{"not": {"$ref": "#/$defs/39"}, "$defs": chain},
                    {"enum": ["x" * 10**5], "not": {"const": "y" * 10**4}},
                    {"unevaluatedProperties": False, "$ref": "#/$defs/39", "$defs": chain}, deep, {"not": {"enum": []}},
                    {"exclusiveMinimum": 10**400, "maximum": 0.5}, {"minimum": -(10**400), "maximum": 1e-300},
                    {"allOf": [{"$ref": "#/$defs/39"}, {"minimum": 0.5}] * 999, "$defs": chain},
                    {"allOf": [{}] * 10**5}, {"not": {"anyOf": [{"minimum": i} for i in range(10**4)]}}, *wrong,
                    *({"not": w} for w in wrong)]:  # fmt: skip
        try:
            guide.compile("json_schema", hostile)
        except UsageError as error:
            assert "\n" not in str(error)


ENDS = (-10, -2.5, -2, -1.25, -1, -0.5, 0, 0.001, 0.25, 0.3, 1, 1.2, 1.25, 1.5, 2, 9.99, 10)


def test_bounds_of_numbers(demo: Model, guide: Guide) -> None:
    tried = refused = 0
    for low, high in itertools.combinations(ENDS, 2):
        for least, most in itertools.product(
            ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
        ):
            try:
                grammar = guide.compile("json_schema", {"type": "number", least: low, most: high})
            except UsageError as error:
                assert "exclusive" in str(error)
                refused += 1
                continue
            for number in sorted({*ENDS, -1.2, -1.1, 0.2, 0.1, 0.24, 0.26, 1.24, 1.4, 5, 9.9, 11, 0.0005}):
                above = low < number or (low == number and least == "minimum")
                below = number < high or (number == high and most == "maximum")
                assert suite.accepts(demo, grammar, json.dumps(number)) == (above and below), (
                    least,
                    most,
                    low,
                    high,
                    number,
                )
                tried += 1
    assert tried > 5000 and 0 < refused < 60
    apart = {"allOf": [{"$ref": "#/$defs/a"}, {"maximum": 0.5}], "$defs": {"a": {"exclusiveMinimum": 0}}}
    with pytest.raises(UsageError, match="exclusiveMinimum"):
        guide.compile("json_schema", apart)
    guide.compile("json_schema", {"properties": {"a": {"exclusiveMinimum": 0}, "b": {"maximum": 0.5}}})


def test_what_an_older_draft_means_is_not_guessed(guide: Guide) -> None:
    old = {"$schema": "https://json-schema.org/draft/2019-09/schema", "items": [{"type": "null"}]}
    with pytest.raises(UsageError, match="unevaluatedItems"):
        guide.compile("json_schema", {**old, "unevaluatedItems": False})
