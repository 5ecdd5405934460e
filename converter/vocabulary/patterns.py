"""A regular expression as an automaton: parsed, then determinised with its preferences.

Only the structure of a pattern is read here. What one character matches ([^\\s\\p{L}], (?i:s)) is asked of the library
that the pattern was written for. A state of the automaton is an ordered list of threads, the preferred one first, as
in a backtracking search; a match cuts the threads behind it (Cox, "Regular expression matching: the virtual machine
approach", 2009). A lookahead of one character is decided when that character is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.converter.vocabulary.code_points import matching
from halfbyte.formats.errors import TokenizerError
from halfbyte.formats.vocab_tables import MATCH, MAX_STATES, Automaton, pages

_MAX_REPEATS = 64
_SEVERAL = ("ss", "st", "ff", "fi", "fl")  # letters that one character folds to
_REPEAT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?\w+\}|x\{[0-9A-Fa-f]+\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[sSdDwW]|[^A-Za-z0-9])|\\[nrtfv]"
)


@dataclass(frozen=True)
class Characters:
    """One character of a set. `key` names it."""

    key: str


@dataclass(frozen=True)
class Series:
    """Parts one after the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """The first of several that matches."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """A part several times; most None is without end."""

    part: Node
    least: int
    most: int | None
    greedy: bool = True


@dataclass(frozen=True)
class Ahead:
    """Whether the next character is of a set (`key`); `end` says what holds at the end of the text."""

    key: str
    negated: bool
    end: bool


@dataclass(frozen=True)
class AtStart:
    """The start of the text."""


Node = Characters | Series | Choice | Repeat | Ahead | AtStart


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.pattern, self.at = pattern, 0

    def fail(self, what: str) -> TokenizerError:
        return TokenizerError(f"{what} in the pattern {self.pattern!r}")

    def parse(self) -> Node:
        node = self.choice(False)
        if self.at < len(self.pattern):
            raise self.fail("an unmatched )")
        return node

    def take(self, text: str) -> bool:
        found = self.pattern.startswith(text, self.at)
        self.at += len(text) * found
        return found

    def choice(self, folded: bool) -> Node:
        parts = [self.series(folded)]
        while self.take("|"):
            parts.append(self.series(folded))
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def series(self, folded: bool) -> Node:
        parts: list[Node] = []
        letters = ""
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            if self.take("(?i)"):
                folded = True
                continue
            start = self.at
            part = self.atom(folded)
            one = self.pattern[start : self.at]
            letters = letters + one.lower() if len(one) == 1 else ""
            if folded and letters.endswith(_SEVERAL):
                raise self.fail("letters that one character may stand for")
            parts.append(self.repeated(part))
        return parts[0] if len(parts) == 1 else Series(tuple(parts))

    def repeated(self, part: Node) -> Node:
        while self.at < len(self.pattern):
            least, most = 0, None
            if self.take("?"):
                most = 1
            elif self.take("+"):
                least = 1
            elif not self.take("*"):
                found = _REPEAT.match(self.pattern, self.at)
                if not found or not (found[1] or found[3]):
                    return part
                self.at = found.end()
                least = int(found[1] or 0)
                most = (int(found[3]) if found[3] else None) if found[2] else least
                if max(least, most or 0) > _MAX_REPEATS or (most is not None and most < least):
                    raise self.fail("a repetition out of range")
                if self.pattern[self.at : self.at + 1] in ("+", "?"):
                    raise self.fail("a repetition of a repetition")
                part = Repeat(part, least, most)
                continue
            if self.pattern[self.at : self.at + 1] == "+":
                raise self.fail("a possessive repetition")
            part = Repeat(part, least, most, not self.take("?"))
        return part

    def atom(self, folded: bool) -> Node:
        if self.take("("):
            return self.group(folded)
        start = self.at
        if self.pattern[start] == "[":
            self.bracket()
        elif self.pattern[start] == "\\":
            if self.take("\\A"):
                return AtStart()
            if self.take("\\z"):
                return Ahead("", False, True)
            found = _ESCAPE.match(self.pattern, start)
            if not found:
                raise self.fail(f"the escape {self.pattern[start : start + 2]}")
            self.at = found.end()
        elif self.pattern[start] in "^$*+?{}":
            raise self.fail(f"a {self.pattern[start]}")
        else:
            self.at += 1
        key = self.pattern[start : self.at]
        return Characters(f"(?i:{key})" if folded and not key.startswith("\\") else key)

    def group(self, folded: bool) -> Node:
        for text, negated in (("?!", True), ("?=", False)):
            if self.take(text):
                inner = self.choice(folded)
                self.close()
                if not isinstance(inner, Characters):
                    raise self.fail("a lookahead of more than one character")
                return Ahead(inner.key, negated, negated)
        if self.take("?i:"):
            folded = True
        elif not self.take("?:") and self.pattern[self.at : self.at + 1] == "?":
            raise self.fail(f"the group ({self.pattern[self.at : self.at + 3]}")
        node = self.choice(folded)
        self.close()
        return node

    def close(self) -> None:
        if not self.take(")"):
            raise self.fail("an unmatched (")

    def bracket(self) -> None:
        depth, start = 0, self.at
        while self.at < len(self.pattern):
            c = self.pattern[self.at]
            if c == "\\":
                self.at += 1
            elif c == "[":
                if self.pattern.startswith("[:", self.at) and depth:
                    self.at = self.pattern.find(":]", self.at) + 1
                else:
                    depth += 1
            elif c == "]" and self.at > start + 1 and self.pattern[start : self.at] != "[^":
                depth -= 1
                if not depth:
                    self.at += 1
                    return
            self.at += 1
        raise self.fail("an unmatched [")


def parse(pattern: str) -> Node:
    """The structure of a pattern; raises TokenizerError, naming what cannot be compiled."""
    return _Parser(pattern).parse()


def literal(text: str) -> Node:
    """A text as it is."""
    return Series(tuple(Characters(re.escape(c) if not c.isalnum() and c.isascii() else c) for c in text))


def _characters(key: str) -> np.ndarray:
    if len(key) == 1 and key not in ".":
        found = np.zeros(0x110000, bool)
        found[ord(key)] = True
        return found
    return matching(key)


class _Program:
    """Instructions of a backtracking search: (what, operand, next...)."""

    def __init__(self, node: Node, sets: dict[str, int]):
        self.code: list[tuple[Node | str, tuple[int, ...]]] = []
        self.sets = sets
        self.begin = self.emit(node, self.add("match", ()))

    def add(self, what: Node | str, to: Iterable[int]) -> int:
        self.code.append((what, tuple(to)))
        if len(self.code) > 4096:
            raise TokenizerError("a pattern is too long")
        return len(self.code) - 1

    def emit(self, node: Node, then: int) -> int:
        """Instructions for a node, then on to `then`; the first one."""
        if isinstance(node, Series):
            for part in reversed(node.parts):
                then = self.emit(part, then)
            return then
        if isinstance(node, Choice):
            return self.add("fork", [self.emit(part, then) for part in node.parts])
        if isinstance(node, Repeat):
            order = (lambda a, b: (a, b)) if node.greedy else (lambda a, b: (b, a))
            if node.most is None:
                loop = self.add("fork", ())
                self.code[loop] = "fork", order(self.emit(node.part, loop), then)
                then = loop
            else:
                behind = then
                for _ in range(node.most - node.least):
                    then = self.add("fork", order(self.emit(node.part, then), behind))
            for _ in range(node.least):
                then = self.emit(node.part, then)
            return then
        return self.add(node, (then,))


def automaton(node: Node, named: dict[str, np.ndarray] | None = None) -> Automaton:
    """The automaton of a pattern. named: bool[0x110000] by key, instead of asking the library.

    Raises TokenizerError for a pattern that matches nothing at all, or that takes too many states.
    """
    sets: dict[str, int] = {}
    p = _Program(node, sets)
    for what, _ in p.code:
        if isinstance(what, (Characters, Ahead)) and what.key:
            sets.setdefault(what.key, len(sets))
    members = np.zeros(0x110000, np.uint64)
    for key, bit in sets.items():
        if bit >= 63:
            raise TokenizerError("a pattern has too many sets of characters")
        given = (named or {}).get(key)
        members |= (_characters(key) if given is None else given).astype(np.uint64) << np.uint64(bit)
    index, distinct = pages(members)
    kinds, numbers = np.unique(distinct, return_inverse=True)
    if len(kinds) > 255:
        raise TokenizerError("a pattern has too many classes of characters")
    symbols: list[int | None] = [int(k) for k in kinds]
    symbols.append(None)  # the end of the text

    def closure(threads: Sequence[int], symbol: int | None, at_start: bool) -> tuple[tuple[int, ...], bool]:
        """Threads behind the character, and whether a match ends before it."""
        seen: set[int] = set()
        after: list[int] = []
        pending = list(reversed(threads))
        while pending:
            i = pending.pop()
            if i in seen:
                continue
            seen.add(i)
            what, to = p.code[i]
            if what == "match":
                return tuple(after), True
            if what == "fork":
                pending += reversed(to)
            elif isinstance(what, AtStart):
                pending += to if at_start else ()
            elif isinstance(what, Ahead):
                holds = (
                    what.end
                    if symbol is None
                    else bool(what.key) and (symbol >> sets[what.key] & 1) != what.negated
                )
                pending += to if holds else ()
            elif isinstance(what, Characters) and symbol is not None and symbol >> sets[what.key] & 1:
                after += [] if to[0] in after else to
        return tuple(after), False

    states: dict[tuple[tuple[int, ...], bool], int] = {((), False): 0}
    pending: list[tuple[tuple[int, ...], bool]] = [((p.begin,), True), ((p.begin,), False)]
    start = []
    for state in pending:
        states[state] = len(states)
        start.append(states[state])
    rows = {0: [0] * len(symbols)}
    while pending:
        state = pending.pop()
        row = []
        for symbol in symbols:
            after, matched = closure(*((state[0], symbol, state[1])))
            if matched and state[0] == (p.begin,):
                raise TokenizerError("a pattern that matches the empty text")
            to = (after, False)
            if to not in states:
                states[to] = len(states)
                pending.append(to)
                if len(states) > MAX_STATES:
                    raise TokenizerError("a pattern that takes too many states")
            row.append(states[to] | (MATCH if matched else 0))
        rows[states[state]] = row
    table = np.array([rows[i] for i in range(len(states))], np.uint16)
    classes = numbers.astype(np.uint8).reshape(distinct.shape)[index].reshape(-1)
    return Automaton(classes, table, (start[0], start[1]))
