"""Normalisers and pre-tokenizers of a tokenizer.json as steps of the section VOCB."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from halfbyte.converter.vocabulary import code_points
from halfbyte.converter.vocabulary.patterns import (
    Ahead,
    AtStart,
    Characters,
    Choice,
    Node,
    Repeat,
    Series,
    automaton,
    literal,
    parse,
)
from halfbyte.converter.vocabulary.pretokenizers import GPT2
from halfbyte.formats.errors import TokenizerError
from halfbyte.formats.vocab import BEHAVIOURS, FIRST_ONLY, INVERT, UNLESS_THERE, Step
from halfbyte.formats.vocab_tables import Automaton, character_map

_SPACE = "\u2581"
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def _several(entry: Any, parts: str) -> list[dict[str, Any]]:
    if entry is None:
        return []
    if entry["type"] == "Sequence":
        return [one for part in entry[parts] for one in _several(part, parts)]
    return [entry]


def _map(replaced: dict[int, bytes]) -> list[Step]:
    return [Step("map", pattern=character_map(replaced))] if replaced else []


def normalizer_steps(entry: dict[str, Any] | None) -> list[Step]:
    """Steps of the entry `normalizer`; TokenizerError names what has none."""
    return [step for one in _several(entry, "normalizers") for step in _normalizer(one)]


def _normalizer(entry: dict[str, Any]) -> list[Step]:
    from tokenizers import normalizers

    kind = entry["type"]
    if kind in _FORMS:
        return [Step("normal", pattern=code_points.normal_form(kind).encode())]
    if kind in ("Lowercase", "StripAccents", "Nmt"):
        return _map(code_points.replaced_by(getattr(normalizers, kind)()))
    if kind == "BertNormalizer":
        return _bert(entry)
    if kind == "Replace":
        content = entry["content"].encode()
        if "String" in entry["pattern"]:
            return [Step("literal", pattern=entry["pattern"]["String"].encode(), text=content)]
        return [Step("replace", pattern=_compiled(entry["pattern"]["Regex"]).encode(), text=content)]
    if kind == "Prepend":
        return [Step("prepend", text=entry["prepend"].encode())]
    if kind == "Strip":
        return _strip(entry["strip_left"], entry["strip_right"])
    raise TokenizerError(f"the normaliser {kind}")


def _bert(entry: dict[str, Any]) -> list[Step]:
    from tokenizers import normalizers

    def probe(**on: bool) -> dict[int, bytes]:
        names = ("clean_text", "handle_chinese_chars", "strip_accents", "lowercase")
        return code_points.replaced_by(normalizers.BertNormalizer(**{n: on.get(n, False) for n in names}))

    clean, chinese = entry["clean_text"], entry["handle_chinese_chars"]
    steps = _map(probe(clean_text=clean, handle_chinese_chars=chinese)) if clean or chinese else []
    strip = entry["strip_accents"]
    if entry["lowercase"] if strip is None else strip:
        steps.append(Step("normal", pattern=code_points.normal_form("NFD").encode()))
        steps += _map({p: new for p, new in probe(strip_accents=True).items() if not new})
    return steps + (_map(probe(lowercase=True)) if entry["lowercase"] else [])


def _strip(left: bool, right: bool) -> list[Step]:
    spaces = Repeat(Characters("space"), 1, None)
    ends: list[Node] = [Series((AtStart(), spaces))] if left else []
    ends += [Series((spaces, Ahead("", False, True)))] if right else []
    if not ends:
        return []
    named = {"space": code_points.dropped_by("WhitespaceSplit")}
    return [Step("replace", pattern=automaton(Choice(tuple(ends)), named).encode())]


def _compiled(pattern: str) -> Automaton:
    """The automaton of a pattern, tried against the library on texts of characters of every class."""
    from tokenizers import Regex, pre_tokenizers

    found = automaton(parse(pattern))
    library = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    classes = np.flatnonzero(np.r_[True, np.diff(found.classes[:0xD800].astype(int)) != 0])
    every = [chr(i) for i in [*classes.tolist(), *range(0x21, 0x7F)]]
    chooser = random.Random(0)
    for _ in range(300):
        text = "".join(chooser.choices(every, k=chooser.randrange(1, 24)))
        if [span for _, span in library.pre_tokenize_str(text)] != found.spans(text):
            raise TokenizerError(f"the pattern {pattern!r}")
    return found


def _split(found: Automaton, behaviour: str, invert: bool = False) -> Step:
    return Step("split", BEHAVIOURS[behaviour] | (INVERT if invert else 0), found.encode())


def _characters(named: np.ndarray, runs: bool = False) -> Automaton:
    one: Node = Characters("named")
    return automaton(Repeat(one, 1, None) if runs else one, {"named": named})


def pre_tokenizer_steps(entry: dict[str, Any] | None) -> tuple[list[Step], bool]:
    """Steps of the entry `pre_tokenizer`, and whether words end up in the alphabet of bytes."""
    entries = _several(entry, "pretokenizers")
    steps = [step for one in entries for step in _pre_tokenizer(one)]
    byte_level = [one["type"] == "ByteLevel" for one in entries]
    if any(byte_level[:-1]):
        raise TokenizerError("a pre-tokenizer behind ByteLevel")
    return steps, any(byte_level)


def _pre_tokenizer(entry: dict[str, Any]) -> list[Step]:
    kind = entry["type"]
    if kind == "Split":
        behaviour, text = _snake(entry["behavior"]), entry["pattern"].get("String")
        found = _compiled(entry["pattern"]["Regex"]) if text is None else automaton(literal(text))
        return [_split(found, behaviour, entry.get("invert", False))]
    if kind == "ByteLevel":
        steps = [Step("prepend", UNLESS_THERE, text=b" ")] if entry["add_prefix_space"] else []
        return steps + ([_split(_compiled(GPT2), "isolated")] if entry.get("use_regex", True) else [])
    if kind == "Digits":
        numeric = code_points.isolated_by("Digits")
        return [_split(_characters(numeric), "isolated" if entry["individual_digits"] else "contiguous")]
    if kind == "Punctuation":
        return [_split(_characters(code_points.isolated_by("Punctuation")), _snake(entry["behavior"]))]
    if kind == "Metaspace":
        return _metaspace(entry)
    spaces = code_points.dropped_by("WhitespaceSplit")
    if kind == "WhitespaceSplit":
        return [_split(_characters(spaces, runs=True), "removed")]
    if kind == "BertPreTokenizer":
        return [
            _split(_characters(spaces, runs=True), "removed"),
            _split(_characters(code_points.isolated_by("Punctuation")), "isolated"),
        ]
    if kind == "Whitespace":
        words = code_points.word_characters()
        others = ~words & ~code_points.dropped_by("Whitespace")
        runs = [Repeat(Characters(name), 1, None) for name in ("words", "others")]
        return [_split(automaton(Choice(tuple(runs)), {"words": words, "others": others}), "removed", True)]
    if kind == "CharDelimiterSplit":
        return [_split(automaton(literal(entry["delimiter"])), "removed")]
    raise TokenizerError(f"the pre-tokenizer {kind}")


def _snake(behaviour: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in behaviour).lstrip("_")


def _metaspace(entry: dict[str, Any]) -> list[Step]:
    mark = entry["replacement"]
    scheme = entry.get("prepend_scheme") or ("always" if entry.get("add_prefix_space", True) else "never")
    steps = [Step("literal", pattern=b" ", text=mark.encode())]
    if scheme != "never":
        flags = UNLESS_THERE | (FIRST_ONLY if scheme == "first" else 0)
        steps.append(Step("prepend", flags, text=mark.encode()))
    if entry.get("split", True):
        steps.append(_split(automaton(literal(mark)), "merged_with_next"))
    return steps
