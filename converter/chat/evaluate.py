"""A chat template as the section CHAT: evaluated on probe conversations, and compared on others.

Only plain conversations are covered: an optional system message, then user and assistant in turn, then the opening of
the assistant's turn. What a template does with tools, images or a thinking switch stays with the template.
"""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.formats import chat
from halfbyte.formats.chat import ASSISTANT, END, START, SYSTEM, USER, Chat
from halfbyte.formats.errors import TokenizerError, UsageError
from halfbyte.runtime.chat import render

Messages = Sequence[tuple[str, str]]
_SPACE = "\n \t\n"
_CONTENTS = (
    "Hello there!", "two\nlines\n\nof text", "  spaces around  ", "\n\nnewlines around\n\n", "x", "{{ braces }} {% %}",
    "<|im_end|> </s> [INST] markup", '{"name": "f", "arguments": {}}', "\u4f60\u597d \u00e9\u0301 \U0001f999", "1", "#",
    "\u3000wide \u00a0", "```python\nprint(1)\n```", "tab\tand trailing\t", "\u2028", "system", "user: hi\nassistant:",
)  # fmt: skip
_THOUGHTS = ("<think>\nplan\n</think>\n\nanswer", "</think>", "a</think>\n\n b</think> \n c")


class _Template:
    def __init__(self, template: str, bos: str, eos: str) -> None:
        self.template, self.bos, self.eos = template, bos, eos

    def render(self, messages: Messages, **kw: object) -> str:
        listed = [{"role": role, "content": content} for role, content in messages]
        return render(self.template, listed, bos_token=self.bos, eos_token=self.eos, **kw)  # type: ignore[arg-type]

    def between(self, roles: Sequence[str]) -> list[str]:
        """What the template puts before, between and behind messages of these roles."""
        names = [f"halfbyte{role}{i}probe" for i, role in enumerate(roles)]
        text = self.render(list(zip(roles, names)))
        found = []
        for name in names:
            if text.count(name) != 1:
                raise TokenizerError("messages that are shown twice, changed or not at all")
            before, text = text.split(name)
            found.append(before)
        return [*found, text]


def compile_chat(template: str, bos: str, eos: str) -> bytes:
    """The section CHAT of a template; `bos` and `eos` are the texts of those tokens.

    Raises TokenizerError, which names why the template is not of the shape.
    """
    t = _Template(template, bos, eos)
    try:
        mark = "halfbytedate"
        if mark in t.render([("user", "x")], strftime_now=lambda _: mark):
            raise TokenizerError("the date")
        found = Chat(_joints(t))
        found.trims = _trims(t, found)
        _check(t, found, _conversations())
        thoughts = [
            [("user", "a"), ("assistant", x), ("user", "b"), *last]
            for x in _THOUGHTS
            for last in ([], [("assistant", x), ("user", "c")])
        ]
        for flags in (0, chat.AFTER_THOUGHT, chat.AFTER_THOUGHT | chat.KEEP_NEWLINES):
            found.flags = flags
            if not _differs(t, found, thoughts):
                break
        _check(t, found, thoughts)
    except UsageError as error:
        raise TokenizerError(f"more than a plain conversation: {error}") from None
    return chat.encode(_with_system(t, found))


def _joints(t: _Template) -> dict[tuple[int, int], str]:
    start, end = t.between(["user"])
    first, ask, answer, *others, last = t.between(["user", "assistant", "user", "assistant", "user"])
    if [first, ask, answer, last] != [start, *others, end]:
        raise TokenizerError("to know where a turn stands")
    return {(START, USER): start, (USER, ASSISTANT): ask, (ASSISTANT, USER): answer, (USER, END): end}


def _trims(t: _Template, c: Chat) -> tuple[int, ...]:
    before = {_SPACE: chat.AS_IS, "": chat.NO_SPACE, _SPACE.lstrip("\n"): chat.NO_NEWLINE}
    behind = {_SPACE: chat.AS_IS, "": chat.NO_SPACE, _SPACE.rstrip("\n"): chat.NO_NEWLINE}

    def kind(messages: Messages, name: str, first: str, last: str) -> tuple[int, int]:
        left, _, right = t.render(messages).partition(name)
        own = left.removeprefix(first), right.removesuffix(last)
        if own[0] not in before or own[1] not in behind:
            raise TokenizerError("rules of its own for white space")
        return before[own[0]], behind[own[1]]

    j, spaced = c.joints, f"{_SPACE}x9x{_SPACE}"
    user = kind([("user", spaced)], "x9x", j[START, USER], j[USER, END])
    asked, answered = j[START, USER] + "a" + j[USER, ASSISTANT], j[ASSISTANT, USER] + "b" + j[USER, END]
    assistant = kind([("user", "a"), ("assistant", spaced), ("user", "b")], "x9x", asked, answered)
    system = (0, 0)
    if (SYSTEM, USER) in j:
        system = kind(
            [("system", spaced), ("user", "a")], "x9x", j[START, SYSTEM], j[SYSTEM, USER] + "a" + j[USER, END]
        )
    return (system[0], user[0], assistant[0], system[1], user[1], assistant[1])


def _with_system(t: _Template, c: Chat) -> Chat:
    """The same with a system message, if the template takes one in this shape."""
    try:
        start, first, ask, answer, end = t.between(["system", "user", "assistant", "user"])
        j = c.joints
        if [ask, answer, end] != [j[USER, ASSISTANT], j[ASSISTANT, USER], j[USER, END]]:
            return c
        whole = Chat({**j, (START, SYSTEM): start, (SYSTEM, USER): first}, c.flags)
        ways = []
        if start == j[START, USER]:
            ways.append(Chat(j, c.flags | chat.FOLD, c.trims, first))
        try:
            whole.trims = _trims(t, whole)
            ways.append(whole)
        except TokenizerError:
            pass
        some = _conversations()
        for way in ways:
            with_system = [[("system", x), *m] for x, m in zip([*_CONTENTS, *_CONTENTS], some)]
            if _differs(t, way, with_system):
                continue
            empty = [("system", ""), ("user", "a"), ("assistant", "b"), ("user", "c")]
            if _differs(t, way, [empty]):
                way.flags |= chat.EMPTY_IS_NONE
            if not _differs(t, way, [empty]):
                return way
    except (TokenizerError, UsageError):
        pass
    return c


def _conversations() -> list[Messages]:
    """Conversations of one to seven messages, user first and last."""
    n = len(_CONTENTS)
    return [
        [("assistant" if k % 2 else "user", _CONTENTS[(i + 5 * k) % n]) for k in range(1 + 2 * (i % 4))]
        for i in range(n)
    ]


def _differs(t: _Template, c: Chat, conversations: Sequence[Messages]) -> bool:
    for m in conversations:
        try:
            if c.render(m) != t.render(m):
                return True
        except UsageError:
            return True
    return False


def _check(t: _Template, c: Chat, conversations: Sequence[Messages]) -> None:
    if _differs(t, c, conversations):
        raise TokenizerError("to read what messages say")
