"""A conversation as one prompt: the model's own chat template, rendered in a sandbox.

Templates are written for Jinja as the transformers library sets it up: blocks trimmed, loop controls,
`tojson` that leaves non-ASCII text alone, `raise_exception`, `strftime_now`, and a `generation` block.
A template comes with the model file and is not trusted: it sees no attribute that starts with an
underscore, changes nothing, and its loops, repetitions and output are bounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from halfbyte.formats.errors import UsageError

MAX_TEMPLATE = 1 << 20
MAX_OUTPUT = 1 << 24
"""Characters that a template may have, and that it may render to."""

_MAX_LOOPS = 1 << 20  # items that all calls of range() in one rendering may give


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    tools: Sequence[Any] | None = None,
    **kw: Any,
) -> str:
    """The prompt for a conversation.

    template               Jinja source
    messages               dicts with role and content, and whatever else the template reads
    add_generation_prompt  end with the opening of the assistant's turn
    bos_token, eos_token   their text; a template may write them, so encode what comes out with
                           `Tokenizer.encode(text)`, which does not add a second BOS
    tools                  JSON schemas of functions, where the template knows of tools
    kw                     further variables of the template, such as enable_thinking

    A template that refuses or ignores a system message gets it at the head of the first user message.

    Raises UsageError, in one line, for a template that is broken, refuses the messages, or makes more
    than MAX_OUTPUT characters.
    """
    if len(template) > MAX_TEMPLATE:
        raise UsageError(f"the chat template has {len(template)} characters; {MAX_TEMPLATE} are possible")
    values = {
        "messages": _fold_system(template, list(messages)),
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token,
        "eos_token": eos_token,
        "tools": tools,
        "documents": None,
        **kw,
    }
    return _generate(template, values)


def _generate(template: str, values: dict[str, Any]) -> str:
    parts: list[str] = []
    length = 0
    try:
        for part in _compiled(template).generate(values, range=_bounded_range()):
            length += len(part)
            if length > MAX_OUTPUT:
                raise UsageError(f"the chat template makes more than {MAX_OUTPUT} characters")
            parts.append(part)
    except UsageError:
        raise
    except (MemoryError, RecursionError):
        raise UsageError("the chat template needs too much memory or recursion") from None
    except Exception as error:  # whatever a template does wrong, from syntax to a missing key
        raise UsageError(f"the chat template failed: {_one_line(error)}") from None
    return "".join(parts)


def _fold_system(template: str, messages: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if len(messages) < 2 or [m.get("role") for m in messages[:2]] != ["system", "user"]:
        return messages
    system, user = messages[0].get("content"), messages[1].get("content")
    if not isinstance(system, str) or not isinstance(user, str) or _takes_system(template):
        return messages
    return [{**messages[1], "content": f"{system}\n{user}"}, *messages[2:]]


@lru_cache(maxsize=16)
def _takes_system(template: str) -> bool:
    """Whether a system message shows in what the template makes; True where that cannot be told."""
    probe = "halfbyte-probe"
    user = {"role": "user", "content": "Hello"}
    values = {
        "add_generation_prompt": True,
        "bos_token": "",
        "eos_token": "",
        "tools": None,
        "documents": None,
    }
    try:
        system = {"role": "system", "content": probe}
        return probe in _generate(template, {**values, "messages": [system, user]})
    except UsageError:
        pass
    try:
        _generate(template, {**values, "messages": [user]})
    except UsageError:
        return True
    return False


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks text of the assistant for training; here it is only text."""

        tags = {"generation"}  # noqa: RUF012 (the name and type are jinja2's)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Sandbox(ImmutableSandboxedEnvironment):
        """Operators by which a short template could make a huge value are checked before they run."""

        intercepted_binops = frozenset(("*", "**", "+"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" and not _small_power(left, right):
                raise SecurityError("a power that is too large")
            if operator == "*" and _repeated_length(left, right) > MAX_OUTPUT:
                raise SecurityError("a repetition that is too long")
            if operator == "+" and _joined_length(left, right) > MAX_OUTPUT:
                raise SecurityError("a text that is too long")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: Any) -> None:
        raise TemplateError(str(message))

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja2's own filter would escape <, >, & and '."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _bounded_range() -> Any:
    left = _MAX_LOOPS

    def bounded(*limits: int) -> range:
        nonlocal left
        numbers = range(*limits)
        left -= len(numbers)
        if left < 0:
            raise UsageError(f"the chat template loops more than {_MAX_LOOPS} times")
        return numbers

    return bounded


def _small_power(base: Any, exponent: Any) -> bool:
    if isinstance(base, int) and isinstance(exponent, int):
        return abs(base).bit_length() * abs(exponent) <= 4096
    return True


def _repeated_length(left: Any, right: Any) -> int:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, (str, bytes, list, tuple)) and isinstance(times, int):
            return len(value) * times
    return 0


def _joined_length(left: Any, right: Any) -> int:
    if isinstance(left, (str, bytes, list, tuple)) and isinstance(right, type(left)):
        return len(left) + len(right)
    return 0


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    line = getattr(error, "lineno", None)
    return text[:300] + (f" (line {line})" if line else "")
