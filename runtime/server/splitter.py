"""An answer that arrives in pieces, as what was thought, what is said, and calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from halfbyte.runtime.model import Model
from halfbyte.runtime.server.tools import Call, CallParser, Format, shown_ids
from halfbyte.runtime.thoughts import Thoughts, marks, thinks, thoughts_after


@dataclass
class Piece:
    """What became certain: all of `thought` comes before `text`, and `text` before `calls`."""

    thought: str = ""
    text: str = ""
    calls: list[Call] = field(default_factory=list)


class Splitter:
    """Splits one answer.

    thoughts  None where nothing is thought
    how       None where no tool may be called
    many      whether there may be more than one call; later ones are dropped
    """

    def __init__(self, thoughts: Thoughts | None = None, how: Format | None = None, many: bool = True):
        self._thoughts, self._parser, self._many = thoughts, CallParser(how) if how else None, many
        self.thought, self.text = "", ""
        self.calls: list[Call] = []

    @property
    def thinking(self) -> bool:
        """Whether a thought is open."""
        return self._thoughts is not None and self._thoughts.open

    def push(self, text: str) -> Piece:
        """Take a piece of the answer."""
        return self._taken(self._thoughts.push(text) if self._thoughts else [(False, text)])

    def flush(self) -> Piece:
        """What was held back, at the end."""
        piece = self._taken(self._thoughts.flush() if self._thoughts else [])
        if self._parser:
            text, calls = self._parser.flush()
            self._add(piece, text, calls)
        return piece

    def _taken(self, parts: list[tuple[bool, str]]) -> Piece:
        piece = Piece()
        for is_thought, text in parts:
            if is_thought:
                text = text if self.thought else text.lstrip()
                piece.thought, self.thought = piece.thought + text, self.thought + text
            elif self._parser:
                self._add(piece, *self._parser.push(text))
            else:
                self._add(piece, text, [])
        return piece

    def _add(self, piece: Piece, text: str, calls: list[Call]) -> None:
        if self.thought and not self.text:  # templates put empty lines after a thought
            text = text.lstrip()
        room = len(calls) if self._many else max(0, 1 - len(self.calls))
        piece.text, self.text = piece.text + text, self.text + text
        piece.calls, self.calls = piece.calls + calls[:room], self.calls + calls[:room]


@dataclass(frozen=True)
class Splitting:
    """How the answers to one request are split: make a `Splitter` for each.

    bound  whether a grammar binds the answer from its first token on, so that nothing is thought
    """

    model: Model
    prompt: Sequence[int]
    how: Format | None
    bound: bool
    many: bool

    def splitter(self) -> Splitter:
        """One for an answer."""
        return Splitter(
            thoughts_after(self.model, self.prompt) if self._thinks else None, self.how, self.many
        )

    @property
    def shown(self) -> frozenset[int]:
        """Special tokens that a splitter must see."""
        found = marks(self.model) if self._thinks else frozenset[int]()
        return found | (shown_ids(self.model, self.how) if self.how else frozenset())

    @property
    def _thinks(self) -> bool:
        return not self.bound and thinks(self.model.chat_template)
