"""Answers that match a JSON schema, a regular expression or a grammar, by the llguidance library.

A grammar is compiled once for a tokenizer; each answer has a matcher of its own, which says before every draw
what tokens may come next. What llguidance does not implement is refused with its words, never ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.formats.errors import HalfbyteError, UsageError
from halfbyte.runtime.json_schema import rewritten
from halfbyte.runtime.model import Model

if TYPE_CHECKING:
    from halfbyte.runtime.tokenizer import Tokenizer

SYNTAXES = ("json_schema", "regex", "lark", "gbnf")
MAX_SOURCE = 1 << 20  # characters of a grammar
_SPACE = r"[ \n\r\t]{1,20}"  # between tokens of JSON; without a bound a model may write nothing else
_MAX_DEPTH = 64  # levels of a JSON schema


class Guide:
    """A model's vocabulary as the grammars need it; make one and keep it. Raises UsageError without llguidance."""

    def __init__(self, model: Model):
        try:
            import llguidance
        except ImportError:
            raise UsageError("constrained output needs llguidance: pip install 'halfbyte[server]'") from None
        if not model.eos_ids:
            raise UsageError("constrained output needs a model with an end token")
        self._library = llguidance
        self.vocab_size = model.vocab_size
        self.eos_ids = tuple(model.eos_ids)
        tokenizer = model.tokenizer

        class Vocabulary:
            """What llguidance asks of a tokenizer."""

            eos_token_id = self.eos_ids[0]
            bos_token_id = tokenizer.bos_id
            tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]  # noqa: RUF012
            special_token_ids = sorted(tokenizer.special_ids)

            def __call__(self, text: str) -> list[int]:
                return _spelling(tokenizer, text) or guide._tokenizer.greedy_tokenize(text)

        guide = self
        wrapper = llguidance.TokenizerWrapper(Vocabulary())
        self._tokenizer = llguidance.LLTokenizer(wrapper, eos_token=list(self.eos_ids))
        self._limits = llguidance.LLParserLimits(max_grammar_size=200_000)

    def compile(self, syntax: str, source: Any) -> Grammar:
        """A grammar. source: an object for json_schema, else text. Raises UsageError, in one line."""
        if syntax not in SYNTAXES:
            raise UsageError(f"unknown grammar syntax {syntax!r}; there are {', '.join(SYNTAXES)}")
        if syntax == "json_schema":
            return self._schema(source)
        if not isinstance(source, str):
            raise UsageError(f"a {syntax} grammar must be text")
        return self._compiled(syntax, source)

    def _schema(self, source: Any) -> Grammar:
        if _depth(source) > _MAX_DEPTH:
            raise UsageError(f"the JSON schema is nested more than {_MAX_DEPTH} levels deep")
        try:
            return self._compiled("json_schema", _text(rewritten(source)))
        except UsageError as error:
            if "oneOf" not in str(error):
                raise
            try:
                return self._compiled("json_schema", _text(rewritten(source, one_of=True)))
            except UsageError:
                raise error from None

    def _compiled(self, syntax: str, source: str) -> Grammar:
        matcher = self._library.LLMatcher
        if len(source) > MAX_SOURCE:
            raise UsageError(f"the grammar has {len(source)} characters; {MAX_SOURCE} are possible")
        try:
            source.encode("utf-8")
            if syntax == "json_schema":
                grammar = matcher.grammar_from_json_schema(source, defaults={"whitespace_pattern": _SPACE})
            elif syntax == "gbnf":
                from llguidance.gbnf_to_lark import gbnf_to_lark

                grammar = matcher.grammar_from_lark(_single_repeats(gbnf_to_lark(source)))
            else:
                grammar = getattr(matcher, f"grammar_from_{syntax}")(source)
            compiled = matcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic in the Rust library is not an Exception
            raise UsageError(f"the {syntax} grammar cannot be used: {_one_line(error)}") from None
        if compiled.is_error():
            raise UsageError(f"the {syntax} grammar cannot be used: {_one_line(compiled.get_error())}")
        return Grammar(self, compiled)


class Grammar:
    """A compiled grammar; safe to share, as each `matcher` is a copy."""

    def __init__(self, guide: Guide, compiled: Any):
        self._guide, self._compiled = guide, compiled

    def matcher(self) -> Matcher:
        """A matcher at the start of an answer."""
        return Matcher(self._guide, self._compiled.deep_copy())


class Matcher:
    """How far one answer matches its grammar."""

    def __init__(self, guide: Guide, inner: Any):
        self._guide, self._inner = guide, inner

    @property
    def stopped(self) -> bool:
        """Whether only the end can follow."""
        return self._inner.is_stopped()

    @property
    def accepting(self) -> bool:
        """Whether the answer may end here."""
        return self._inner.is_accepting()

    def masked(self, logits: np.ndarray) -> np.ndarray:
        """A copy of float32[vocab] with -inf where a token must not come next."""
        row = np.full_like(logits, -np.inf)
        if self._inner.is_stopped():
            self._checked()
            row[self._guide.eos_ids[0]] = 0.0
            return row
        bits = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        self._checked()
        allowed = np.unpackbits(bits, bitorder="little", count=min(8 * len(bits), len(logits))).view(bool)
        np.copyto(row[: len(allowed)], logits[: len(allowed)], where=allowed)
        return row

    def consume(self, token: int) -> bool:
        """Go on by a token that was allowed; whether only the end can follow now."""
        if not self._inner.consume_token(token):
            raise HalfbyteError(f"the grammar broke off: {_one_line(self._inner.get_error())}")
        return self._inner.is_stopped()

    def count_valid(self, tokens: Sequence[int]) -> int:
        """How many of these could come next, one after the other."""
        return 0 if self._inner.is_stopped() else self._inner.validate_tokens(list(tokens))

    def _checked(self) -> None:
        if self._inner.is_error():
            raise HalfbyteError(f"the grammar became too complex: {_one_line(self._inner.get_error())}")


def _spelling(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens that spell a text and nothing else, as many tokenizers put a space in front; [] where none are found."""
    for start in ("", "\n"):
        before = tokenizer.encode(start, bos=False, special=False)
        ids = tokenizer.encode(start + text, bos=False, special=False)
        rest = ids[len(before) :]
        if ids[: len(before)] == before and b"".join(map(tokenizer.token_bytes, rest)) == text.encode():
            return rest
    return []


def _text(schema: Any) -> str:
    try:
        text = json.dumps(schema, allow_nan=False)
        text.encode("utf-8")
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the JSON schema cannot be read: {_one_line(error)}") from None


def _depth(value: Any) -> int:
    """Levels of nesting, without recursion."""
    level, depth = [value], 0
    while level and depth <= _MAX_DEPTH:
        depth += 1
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [item for group in inner for item in group]
    return depth


_LARK_LITERAL = re.compile(r'("(?:\\.|[^"\\])*"|/(?:\\.|[^/\\])+/)')


def _single_repeats(lark: str) -> str:
    """`x**` as `x*`: the library's translation of GBNF drops the brackets of (x*)*."""
    parts = _LARK_LITERAL.split(lark)
    parts[::2] = [
        re.sub(r"([*+?])[*+?]+", lambda m: m[1] if len(set(m[0])) == 1 else "*", p) for p in parts[::2]
    ]
    return "".join(parts)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300] or "unknown reason"
