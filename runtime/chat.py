"""A conversation as one prompt: the model's own chat template, rendered in a sandbox.

Templates are written for Jinja as the transformers library sets it up: blocks trimmed, loop controls,
`tojson` that leaves non-ASCII text alone, `raise_exception`, `strftime_now`, and a `generation` block.
A template comes with the model file and is not trusted: it sees no attribute that starts with an
underscore, changes nothing, and its steps, its values and its output are bounded (`runtime.template_sandbox`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.template_sandbox import Budget, environment

MAX_TEMPLATE = 1 << 20
MAX_OUTPUT = 1 << 24
"""Characters that a template may have, and that it may render to."""


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
        compiled = _compiled(template)
        with Budget(len(template)):
            for part in compiled.generate(values):
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
    return environment().from_string(template)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    line = getattr(error, "lineno", None)
    return text[:300] + (f" (line {line})" if line else "")
