"""Stop strings in text that arrives piece by piece: what may be shown, and where the answer ends."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Holds back the end of a text while it could still be the start of a stop string."""

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(s for s in stops if s)
        self.found = False
        self._held = ""

    def push(self, text: str) -> str:
        """What may be shown now that `text` arrived; after a stop string was `found`, ''."""
        if self.found:
            return ""
        held = self._held + text
        cut = min((i for i in map(held.find, self.stops) if i >= 0), default=-1)
        if cut >= 0:
            self.found, self._held = True, ""
            return held[:cut]
        shown = len(held) - overlap(held, self.stops)
        self._held = held[shown:]
        return held[:shown]

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that a stop string starts with."""
    return max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
