"""What constrained output accepts, on the JSON-Schema-Test-Suite and on llama.cpp's grammar vectors.

    python benchmarks/json_schema_suite.py [MODEL.hb] [--data ../shared/data/conformance] [--failures]

For every schema that is not refused, each instance of the suite is put through the matcher token by token: a valid
one must be accepted, an invalid one refused. An instance is a value: `respelled` are valid ones that are accepted in
another spelling of the same value, 1 for 1.0 or keys in another order. `narrowed` are valid ones that are not accepted
at all; `wrong` are invalid ones of which any spelling is accepted, and must be 0. Rows of format/ are the suite's
optional tests, which take formats for assertions, as halfbyte does.
Without a model the built-in demo model's tokenizer is used.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.constrain import Grammar, Guide
from halfbyte.runtime.model import Model

DRAFTS = ("draft2020-12", "draft7")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "conformance"


@dataclass
class Tally:
    """schemas: accepted or refused; instances: passed, respelled, narrowed, wrong; failures: one line each."""

    schemas: Counter[str] = field(default_factory=Counter)
    instances: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)  # why schemas were refused
    failures: list[str] = field(default_factory=list)


def accepts(model: Model, grammar: Grammar, text: str) -> bool:
    """Whether a text matches as a whole, fed by the tokens that the model's tokenizer makes of it."""
    matcher = grammar.matcher()
    for token in model.tokenizer.encode(text, bos=False, special=False):
        if matcher.count_valid([token]) != 1:
            return False
        matcher.consume(token)
    return matcher.accepting


def spellings(value: Any, most: int = 200) -> list[str]:
    """A value's JSON as it is, then with whole numbers as such and the keys of objects in every order."""
    return [json.dumps(v, ensure_ascii=False) for v in (value, *itertools.islice(_orders(value), most))]


def _orders(value: Any) -> Iterator[Any]:
    if isinstance(value, float) and value.is_integer():
        yield int(value)
    elif isinstance(value, list):
        yield from map(list, itertools.product(*map(list, map(_orders, value))))
    elif isinstance(value, dict):
        for keys in itertools.permutations(value) if len(value) < 6 else [tuple(value)]:
            for inner in itertools.product(*(list(_orders(value[k])) for k in keys)):
                yield dict(zip(keys, inner))
    else:
        yield value


def groups(data: Path, draft: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(keyword, group of tests) of the mandatory part of a draft, and of its formats."""
    import zstandard

    packed = (data / "json-schema-test-suite" / "jsts.tar.zst").read_bytes()
    raw = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        for member in archive.getmembers():
            parts = member.name.split("/")
            if parts[:2] != ["tests", draft] or not parts[-1].endswith(".json"):
                continue
            if len(parts) == 3 or parts[2:4] == ["optional", "format"]:
                file = archive.extractfile(member)
                assert file is not None
                for group in json.load(file):
                    yield "/".join(parts[2 if len(parts) == 3 else 3 :]).removesuffix(".json"), group


def schema_suite(model: Model, guide: Guide, data: Path, draft: str) -> dict[str, Tally]:
    """A tally by keyword."""
    found: dict[str, Tally] = defaultdict(Tally)
    for keyword, group in groups(data, draft):
        schema, tally = group["schema"], found[keyword]
        if draft == "draft7" and isinstance(schema, dict):
            schema = {"$schema": "http://json-schema.org/draft-07/schema#", **schema}
        try:
            grammar = guide.compile("json_schema", schema)
        except UsageError as error:
            tally.schemas["refused"] += 1
            tally.reasons[str(error).removeprefix("the json_schema grammar cannot be used: ")[:90]] += 1
            continue
        tally.schemas["accepted"] += 1
        for test in group["tests"]:
            first, *others = spellings(test["data"])
            accepted = accepts(model, grammar, first)
            other = not accepted and any(accepts(model, grammar, text) for text in others)
            if test["valid"]:
                kind = "passed" if accepted else "respelled" if other else "narrowed"
            else:
                kind = "wrong" if accepted or other else "passed"
            tally.instances[kind] += 1
            if kind not in ("passed", "respelled"):
                tally.failures.append(f"{kind}: {keyword} / {group['description']} / {test['description']}")
    return dict(found)


def grammar_vectors(model: Model, guide: Guide, data: Path) -> Tally:
    """llama.cpp's grammars (GBNF and JSON schema) with texts that must match and must not."""
    tally = Tally()
    for case in json.loads((data / "grammar-integration.vectors.json").read_text("utf-8")):
        source = json.loads(case["source"]) if case["kind"] == "json_schema" else case["source"]
        try:
            grammar = guide.compile(case["kind"], source)
        except UsageError as error:
            tally.schemas["refused"] += 1
            tally.failures.append(f"refused: {case['desc']}: {error}")
            continue
        tally.schemas["accepted"] += 1
        for valid, texts in ((True, case["pass"]), (False, case["fail"])):
            for text in texts:
                accepted = accepts(model, grammar, text)
                kind = "passed" if accepted == valid else "wrong" if accepted else "narrowed"
                tally.instances[kind] += 1
                if kind != "passed":
                    tally.failures.append(f"{kind}: {case['desc']}: {text[:70]!r}")
    return tally


def demo_model(folder: Path) -> Model:
    """The built-in model, converted."""
    import halfbyte
    from halfbyte.runtime.cli.demo import built_in_model

    return halfbyte.load(halfbyte.convert(built_in_model(), folder / "demo.hb", recipe="q8"))


WHY = {
    "format": "a format is kept, where the suite takes it for an annotation",
    "format/hostname": "names of other scripts (xn--) are not written, as their rules are no regular language",
}
"""Why a valid instance may not be written, by keyword."""


def show(title: str, tallies: dict[str, Tally], failures: bool) -> None:
    """The pass table."""
    print(
        f"\n{title:32} {'schemas':>8} {'refused':>8} "
        f"{'passed':>8} {'respelled':>9} {'narrowed':>8} {'wrong':>8}"
    )
    total = Tally()
    for name, tally in sorted(tallies.items()):
        total.schemas += tally.schemas
        total.instances += tally.instances
        _row(name, tally)
    _row("total", total)
    for name in (n for n, t in sorted(tallies.items()) if t.instances["narrowed"]):
        print(f"narrowed: {name}: {WHY.get(name, 'unexplained')}")
    for reason, count in sum((t.reasons for t in tallies.values()), Counter[str]()).most_common():
        print(f"refused: {count:4} schemas: {reason}")
    if failures:
        print(*(line for tally in tallies.values() for line in tally.failures), sep="\n")


def _row(name: str, t: Tally) -> None:
    print(
        f"{name:32} {t.schemas['accepted']:8} {t.schemas['refused']:8} {t.instances['passed']:8} "
        f"{t.instances['respelled']:9} "
        f"{t.instances['narrowed']:8} {t.instances['wrong']:8}"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--failures", action="store_true", help="name every instance that did not pass")
    args = parser.parse_args()
    import halfbyte

    with tempfile.TemporaryDirectory() as folder:
        model = halfbyte.load(args.model) if args.model else demo_model(Path(folder))
        guide = Guide(model)
        for draft in DRAFTS:
            show(draft, schema_suite(model, guide, args.data, draft), args.failures)
        show("grammars", {"grammar-integration": grammar_vectors(model, guide, args.data)}, args.failures)


if __name__ == "__main__":
    main()
