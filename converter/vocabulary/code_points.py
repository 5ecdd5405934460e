"""What the `tokenizers` library knows of Unicode, asked of the library itself: its version of the tables counts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from halfbyte.formats.vocab_tables import ITSELF, STAYS, Normal

_MARK = "|"  # between characters that are asked about together: no normaliser here touches it
_BLOCK = 4096  # of them
_SPAN = 1 << 15  # characters that are asked about at once otherwise
_HANGUL = range(0xAC00, 0xAC00 + 11172)
_CHANGING = 0x30000  # no character from here on has a case, a decomposition or a combining class
_HIGHEST = "\u0345"  # the only mark of the last combining class
_LETTER = re.compile(r"\(\?i:\w\)")
_JAMO = (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))  # second parts of Hangul syllables


@lru_cache(maxsize=2)
def _every(end: int = 0x110000) -> tuple[str, np.ndarray]:
    """All characters below `end`, and their code points."""
    points = np.concatenate([np.arange(0xD800), np.arange(0xE000, end)]).astype("<u4")
    return points.tobytes().decode("utf-32-le"), points


def _spans(end: int = 0x110000) -> Iterator[tuple[str, np.ndarray]]:
    """The same in pieces: the library keeps some 20 bytes for each byte of a text that it works on."""
    text, points = _every(end)
    for at in range(0, len(text), _SPAN):
        yield text[at : at + _SPAN], points[at : at + _SPAN]


@lru_cache(maxsize=256)
def matching(pattern: str) -> np.ndarray:
    """bool[0x110000]: the characters that a pattern of one character matches, in the library's regular expressions."""
    from tokenizers import Regex, normalizers

    # Runs of them are removed at once: a call for each would take four times as long.
    without = normalizers.Replace(Regex(f"(?:{pattern})++"), "").normalize_str
    end = _CHANGING if _LETTER.match(pattern) else 0x110000
    found = np.arange(0x110000) < end
    found[0xD800:0xE000] = False
    for text, _ in _spans(end):
        found[np.frombuffer(without(text).encode("utf-32-le"), "<u4")] = False
    return found


@lru_cache(maxsize=4)
def dropped_by(name: str) -> np.ndarray:
    """bool[0x110000]: the characters that a pre-tokenizer drops."""
    from tokenizers import pre_tokenizers

    found = np.ones(0x110000, bool)
    for text, points in _spans():
        for _, (start, stop) in getattr(pre_tokenizers, name)().pre_tokenize_str(text):
            found[points[start:stop]] = False
    found[0xD800:0xE000] = False
    return found


@lru_cache(maxsize=1)
def word_characters() -> np.ndarray:
    """bool[0x110000]: \\w of Rust's regular expressions, which know other letters than Oniguruma's."""
    from tokenizers import pre_tokenizers

    cut = pre_tokenizers.Whitespace().pre_tokenize_str  # \\w+ or [^\\w\\s]+
    found = np.zeros(0x110000, bool)
    for text, points in _spans():
        for _, (start, stop) in cut(text):
            found[points[start:stop]] = len(cut("a" + text[start])) == 1
    return found


@lru_cache(maxsize=2)
def isolated_by(name: str) -> np.ndarray:
    """bool[0x110000]: the characters that Digits or Punctuation makes words of their own."""
    from tokenizers import pre_tokenizers

    made = {
        "Digits": pre_tokenizers.Digits(individual_digits=True),
        "Punctuation": pre_tokenizers.Punctuation(),
    }
    cut = made[name].pre_tokenize_str
    found = np.zeros(0x110000, bool)
    for text, points in _spans():
        for _, (start, stop) in cut(text):
            if stop == start + 1:
                found[points[start]] = len(cut(text[start] * 2)) == 2  # a lone other character is one word
    return found


def replaced_by(normalizer: Any) -> dict[int, bytes]:
    """What a normaliser that looks at single characters makes of those that it changes."""
    text, _ = _every()
    found = dict[int, bytes]()
    for at in range(0, len(text), _BLOCK):
        block = text[at : at + _BLOCK].replace(_MARK, "")
        joined = _MARK.join(block)
        normal = normalizer.normalize_str(joined)
        if normal != joined:
            changed = ((old, new) for old, new in zip(block, normal.split(_MARK)) if old != new)
            found |= {ord(old): new.encode().replace(old.encode(), ITSELF) for old, new in changed}
    return found


@lru_cache(maxsize=4)
def normal_form(name: str) -> Normal:
    """NFC, NFD, NFKC or NFKD as the library has it."""
    from tokenizers import normalizers

    decompose = getattr(normalizers, "NFKD" if "K" in name else "NFD")().normalize_str
    compose = normalizers.NFC().normalize_str
    text, points = _every(_CHANGING)
    full = _each(decompose, text)
    classes = _combining_classes([c for c in text if ord(c) not in _HANGUL])
    form = Normal(name.endswith("C"))
    pairs = {}
    if form.compose:
        canonical = _each(normalizers.NFD().normalize_str, text)
        several = [d for d in canonical if len(d) > 1 and ord(d[0]) not in range(0x1100, 0x1200)]
        firsts = _each(compose, [d[:-1] for d in several])
        whole = _each(compose, [a + d[-1] for a, d in zip(firsts, several)])
        pairs = {
            (ord(a), ord(d[-1])): ord(c)
            for a, d, c in zip(firsts, several, whole)
            if len(a) == 1 and len(c) == 1
        }
        form.pairs = pairs
    seconds = {b for _, b in pairs} | (set(_JAMO) if form.compose else set())
    result = _each(getattr(normalizers, name)().normalize_str, text)
    for point, old, new, parts in zip(points.tolist(), text, result, full):
        ccc = classes.get(point, 0)
        changes = new != old or ccc or point in seconds
        if point in _HANGUL:
            if changes:
                form.points[point] = ccc, ()
        elif changes or parts != old:
            form.points[point] = (
                ccc | (0 if changes else STAYS),
                tuple(map(ord, parts)) if parts != old else (),
            )
    return form


def _each(call: Callable[[str], str], texts: Any) -> list[str]:
    """A call on many texts at once: a digit between them neither composes nor moves."""
    texts = list(texts)
    out = call("\n".join(texts)).split("\n")
    if len(out) != len(texts):  # the separator itself is among the characters
        at = texts.index("\n")
        out[at : at + 2] = ["\n"]
    return out


def _combining_classes(characters: list[str]) -> dict[int, int]:
    """Canonical combining classes, in the order that the library sorts by: what moves before a mark is below it."""
    from tokenizers import normalizers

    decompose = normalizers.NFD().normalize_str
    characters = [c for c in characters if c != "\n"]
    plain = dict(zip(characters, _each(decompose, characters)))

    def before(mark: str, candidates: list[str]) -> list[str]:
        """Those that are sorted before the mark."""
        texts = _each(decompose, [f"a{mark}{c}" for c in candidates])
        return [c for c, t in zip(candidates, texts) if plain[c] == c and t[1:2] == c]

    moved = before(_HIGHEST, characters)
    marks = {unicodedata.combining(c): c for c in reversed(moved)} | {
        unicodedata.combining(_HIGHEST): _HIGHEST
    }
    marks.pop(0, None)
    found = {ord(c): known for known, c in marks.items()}
    ascending = sorted(marks)
    for lower, known in pairwise(ascending):
        for c in before(marks[known], moved):
            found.setdefault(ord(c), lower)
    return {p: k for p, k in found.items() if k}


def forget() -> None:
    """Give back what was asked and kept: tens of megabytes."""
    for asked in (_every, matching, dropped_by, word_characters, isolated_by, normal_form):
        asked.cache_clear()
