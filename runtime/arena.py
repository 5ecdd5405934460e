"""One allocation that holds every activation slot of a program."""

from __future__ import annotations

import numpy as np

from halfbyte.formats.program import PICKS

_ALIGN = 64  # bytes, so that each slot starts on a cache line


class Arena:
    """Activation memory for steps of up to `tokens` rows and `picks` picked rows.

    `base(i)` is the float32[capacity, width] array of a base slot; `view(i, rows)` is any slot, a
    strided view of its base.
    """

    def __init__(self, slots: np.ndarray, tokens: int, picks: int):
        self.slots, self.tokens, self.picks = slots, tokens, picks
        self._views = [(int(s["base"]), int(s["offset"]), int(s["width"])) for s in slots]
        offsets: dict[int, int] = {}
        end = 0
        for i, s in enumerate(slots):
            if int(s["base"]) == i:
                offsets[i] = end
                end += -(-self._capacity(i) * int(s["width"]) * 4 // _ALIGN) * _ALIGN
        raw = np.zeros(end + _ALIGN, np.uint8)
        start = -raw.ctypes.data % _ALIGN
        self._memory = raw[start : start + end]
        self._bases: dict[int, np.ndarray] = {}
        for i, at in offsets.items():
            rows, width = self._capacity(i), int(slots[i]["width"])
            self._bases[i] = self._memory[at : at + rows * width * 4].view(np.float32).reshape(rows, width)

    def _capacity(self, i: int) -> int:
        return self.picks if int(self.slots[i]["rows"]) == PICKS else self.tokens

    def fits(self, tokens: int, picks: int) -> bool:
        """Whether a step of this size can run here."""
        return tokens <= self.tokens and picks <= self.picks

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._memory.nbytes

    def base(self, i: int) -> np.ndarray:
        """float32[capacity, width] of base slot i."""
        return self._bases[i]

    def view(self, i: int, rows: int) -> np.ndarray:
        """float32[rows, width] of slot i (a view)."""
        base, offset, width = self._views[i]
        return self._bases[base][:rows, offset : offset + width]
