"""Messages as the tokens of a prompt: the chat template's own control tokens, and nobody else's.

What users, tools or an earlier answer wrote is encoded as plain text, so that it cannot open or end a turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.formats.errors import UsageError
from halfbyte.runtime import chat
from halfbyte.runtime.model import Model

PLAIN_TEMPLATE = "{{ messages | map(attribute='content') | join('\n') }}"
"""For a model without a chat template, which only continues text."""


def prompt_ids(
    model: Model, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, **variables: Any
) -> list[int]:
    """Token ids of a conversation, up to the opening of the assistant's turn.

    messages   dicts of role and content (text), and what else the template reads
    variables  further variables of the template

    Raises UsageError where the template refuses the messages, or where text that spells a control token cannot
    be told apart from the template's own.
    """
    tokenizer = model.tokenizer
    template = model.chat_template or PLAIN_TEMPLATE
    eos = tokenizer.eos_ids[:1]
    tokens: dict[str, Any] = {
        "bos_token": "" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(eos[0]) if eos else "",
    }

    def rendered(contents: Sequence[Any]) -> str:
        filled = [{**m, "content": c} if "content" in m else m for m, c in zip(messages, contents)]
        return chat.render(template, filled, tools=tools, **{**variables, **tokens})

    spellings = [tokenizer.piece(i) for i in tokenizer.special_ids]
    spellings = [s for s in spellings if s]

    def spells(value: Any) -> bool:
        return isinstance(value, str) and any(s in value for s in spellings)

    rest = [
        [{k: v for k, v in m.items() if k not in ("content", "role")} for m in messages],
        tools,
        variables,
    ]
    if any(spells(text) for text in _texts(rest)):
        raise UsageError("a tool, a name or a call spells a control token of this model; leave it out")
    contents = [m.get("content") for m in messages]
    text = rendered(contents)
    suspects = [i for i, content in enumerate(contents) if spells(content)]
    if not suspects:
        return tokenizer.encode(text)
    texts = {i: str(contents[i]) for i in suspects}
    marks = {i: f"\ue000halfbyte-{i}\ue001" for i in suspects}
    marked = rendered([marks.get(i, content) for i, content in enumerate(contents)])
    for trim in (False, True):  # many templates trim
        plain = {marks[i]: t.strip() if trim else t for i, t in texts.items()}
        pieces = _split(marked, plain)
        if "".join(plain.get(p, p) for p in pieces) == text:
            ids: list[int] = []
            for i, piece in enumerate(pieces):
                special = piece not in plain
                ids += tokenizer.encode(
                    plain.get(piece, piece), bos=None if i == 0 else False, special=special
                )
            return ids
    raise UsageError("a message spells a control token inside the chat template; leave it out")


def _split(text: str, marks: Mapping[str, str]) -> list[str]:
    """Text cut before and after every mark."""
    pieces = [text]
    for mark in marks:
        cut: list[str] = []
        for piece in pieces:
            first, *others = piece.split(mark) if piece not in marks else [piece]
            cut.append(first)
            for other in others:
                cut += [mark, other]
        pieces = [p for p in cut if p]
    return pieces


def _texts(value: Any) -> list[str]:
    """All strings in a value of lists and dicts, keys included."""
    found, pending = [], [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, Mapping):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            pending += item
    return found
