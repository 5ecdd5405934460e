"""The section CHAT: what a chat template does to plain conversations, as texts between messages (SPEC.md 15)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from .errors import FormatError, UsageError

VERSION = 1
START, SYSTEM, USER, ASSISTANT = range(4)
END = START  # as a column
ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
FOLD, EMPTY_IS_NONE, AFTER_THOUGHT, KEEP_NEWLINES = 1, 2, 4, 8
AS_IS, NO_SPACE, NO_NEWLINE = range(3)
THOUGHT_ENDS = "</think>"
MAX_TEXT = 1 << 16
_ABSENT = (0xFFFFFFFF, 0)
_HEAD = struct.Struct("<4I34I")


@dataclass
class Chat:
    """joints: (row, column) -> text; trims: how system, user, assistant start, then how they end."""

    joints: dict[tuple[int, int], str] = field(default_factory=dict)
    flags: int = 0
    trims: tuple[int, ...] = (0,) * 6
    fold: str = ""

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The prompt for (role, content) messages, up to the opening of the assistant's turn.

        Raises UsageError for an order of messages that the template was not stored for.
        """
        left = list(messages)
        if self.flags & EMPTY_IS_NONE and left and left[0] == ("system", ""):
            left = left[1:]
        if self.flags & FOLD and [role for role, _ in left[:2]] == ["system", "user"]:
            left = [("user", left[0][1] + self.fold + left[1][1]), *left[2:]]
        parts, last = [], START
        for role, content in left:
            to = ROLES.get(role, START)
            parts += [self._joint(last, to), self._trimmed(to, content)]
            last = to
        return "".join([*parts, self._joint(last, END)])

    def _joint(self, last: int, to: int) -> str:
        try:
            return self.joints[last, to]
        except KeyError:
            names = {n: role for role, n in ROLES.items()}
            raise UsageError(
                f"this model's chat has no {names.get(to, 'end')} after {names.get(last, 'its start')}"
            ) from None

    def _trimmed(self, role: int, content: str) -> str:
        if role == ASSISTANT and self.flags & AFTER_THOUGHT and THOUGHT_ENDS in content:
            content = content.split(THOUGHT_ENDS)[-1]
            content = content if self.flags & KEEP_NEWLINES else content.lstrip("\n")
        cuts = (None, None, "\n")
        start, end = self.trims[role - 1], self.trims[role + 2]
        content = content.lstrip(cuts[start]) if start else content
        return content.rstrip(cuts[end]) if end else content


def encode(c: Chat) -> bytes:
    """The section."""
    texts = b""
    rows: list[int] = []
    for row in range(4):
        for column in range(4):
            text = c.joints.get((row, column))
            data = b"" if text is None else text.encode()
            rows += _ABSENT if text is None else (_HEAD.size + len(texts), len(data))
            texts += data
    fold = c.fold.encode()
    trims = sum(t << 2 * i for i, t in enumerate(c.trims))
    return _HEAD.pack(VERSION, c.flags, trims, 0, *rows, _HEAD.size + len(texts), len(fold)) + texts + fold


def decode(data: bytes) -> Chat:
    """The texts of a section; FormatError, in one line, for anything that section 15 forbids."""
    if len(data) < _HEAD.size:
        raise FormatError("the section CHAT is damaged: it is cut off")
    version, flags, trims, zero, *spans = _HEAD.unpack_from(data)
    if version != VERSION:
        raise FormatError(f"the section CHAT has version {version}; a newer halfbyte may know it")
    split = tuple(trims >> 2 * i & 3 for i in range(6))
    if flags >= 16 or trims >= 1 << 12 or max(split) > NO_NEWLINE or zero:
        raise FormatError("the section CHAT is damaged: unknown flags")
    texts: list[str | None] = []
    for at, length in zip(spans[::2], spans[1::2]):
        if (at, length) == _ABSENT:
            texts.append(None)
            continue
        if at < _HEAD.size or length > MAX_TEXT or at + length > len(data):
            raise FormatError("the section CHAT is damaged: a text is out of place")
        try:
            texts.append(data[at : at + length].decode("utf-8"))
        except UnicodeDecodeError:
            raise FormatError("the section CHAT is damaged: a text is not UTF-8") from None
    joints = {(i // 4, i % 4): t for i, t in enumerate(texts[:16]) if t is not None}
    return Chat(joints, flags, split, texts[16] or "")
