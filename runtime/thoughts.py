"""What a model thinks before it answers, told apart from the answer while both stream."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.runtime.model import Model
from halfbyte.runtime.stopping import overlap

THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""How families mark what a model thinks before it answers."""


class Thoughts:
    """Splits text that arrives piece by piece into (is a thought, text); the marks are in neither.

    prompt  the end of the prompt, which may have opened a thought
    """

    def __init__(self, prompt: str = ""):
        self._held = ""
        self._close = next((end for start, end in THINKING if prompt.rstrip().endswith(start)), "")

    @property
    def open(self) -> bool:
        """Whether a thought is open."""
        return bool(self._close)

    def push(self, text: str) -> list[tuple[bool, str]]:
        """What became certain."""
        found, self._held = [], self._held + text
        while True:
            marks = (self._close,) if self._close else tuple(start for start, _ in THINKING)
            at, mark = min(((i, m) for m in marks if (i := self._held.find(m)) >= 0), default=(-1, ""))
            if at < 0:
                shown = len(self._held) - overlap(self._held, marks)
                found.append((bool(self._close), self._held[:shown]))
                self._held = self._held[shown:]
                return [part for part in found if part[1]]
            found.append((bool(self._close), self._held[:at]))
            self._held = self._held[at + len(mark) :]
            self._close = "" if self._close else dict(THINKING)[mark]

    def flush(self) -> list[tuple[bool, str]]:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        return [(bool(self._close), held)] if held else []


def thoughts_after(model: Model, prompt: Sequence[int]) -> Thoughts:
    """A splitter of the answer to these token ids."""
    return Thoughts("".join(model.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in prompt[-8:]))


def marks(model: Model) -> frozenset[int]:
    """Special tokens that mark thoughts, which the splitter must see."""
    ids = (model.tokenizer.id_of(mark) for pair in THINKING for mark in pair)
    return frozenset(i for i in ids if i is not None)


def thinks(template: str) -> bool:
    """Whether a chat template knows thoughts."""
    return any(end in template for _, end in THINKING)
