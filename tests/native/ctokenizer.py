"""The tokenizer of the C library, and texts that are hard on tokenizers."""

from __future__ import annotations

import random
from collections.abc import Sequence

from halfbyte.runtime.backends.native import load_library

SPECIAL, ADD = 1, 2


class CError(Exception):
    """A negative status, with hb_last_error."""


class CTokenizer:
    """hb_tokenizer over a section VOCB; raises CError."""

    def __init__(self, section: bytes) -> None:
        self.ffi, self.lib = load_library()
        self._section = self.ffi.from_buffer(section)
        out = self.ffi.new("hb_tokenizer **")
        self.checked(self.lib.hb_tokenizer_open(self._section, len(section), self.ffi.NULL, out))
        self.handle = self.ffi.gc(out[0], self.lib.hb_tokenizer_free)
        self._ids = self.ffi.new("int32_t[]", 1 << 12)

    def checked(self, status: int) -> int:
        """The status, if it is no error."""
        if status < 0:
            raise CError(status, self.ffi.string(self.lib.hb_last_error()).decode())
        return status

    def encode(self, text: str, flags: int = SPECIAL) -> list[int]:
        """hb_tokenize, again with more room where the first was too little."""
        data = text.encode()
        for _ in range(2):
            count = self.checked(
                self.lib.hb_tokenize(self.handle, data, len(data), flags, self._ids, len(self._ids))
            )
            if count <= len(self._ids):
                break
            self._ids = self.ffi.new("int32_t[]", count)
        return list(self.ffi.unpack(self._ids, count)) if count else []

    def decode(self, ids: Sequence[int], flags: int = 0) -> str:
        """The text of a stream of ids."""
        stream = self.ffi.new("hb_detokenizer *")
        self.lib.hb_detokenize_start(stream, self.handle, flags)
        room = self.ffi.new("char[]", 16384)
        parts = []
        for i in [*ids, None]:
            call = [stream] if i is None else [stream, i]
            name = self.lib.hb_detokenize_finish if i is None else self.lib.hb_detokenize
            parts.append(self.ffi.buffer(room, self.checked(name(*call, room, len(room))))[:])
            parts[-1].decode()  # no half of a character is ever given
        return b"".join(parts).decode()

    def bytes_of(self, index: int) -> bytes:
        """hb_token_bytes."""
        text, size = self.ffi.new("char **"), self.ffi.new("size_t *")
        self.checked(self.lib.hb_token_bytes(self.handle, index, self.ffi.cast("const char **", text), size))
        return bytes(self.ffi.buffer(text[0], size[0])[:])


_LETTERS = (
    " \n\r\t"
    "'sStTlLdDaZ019.,!?-_/\u00e9\u4f60\u017f\u0301\u0323\u00a0\u2028\u2581\u1100\u1161\u11a8\uac00\u0130\u200d"
)
_WORDS = (
    "the",
    " of",
    "Hello",
    "world",
    " ",
    "  ",
    "123",
    "don't",
    "I'LL",
    "\n",
    "\r\n",
    "<|",
    "|>",
    "</s",
    "\u2581",
    "##",
)


def strings(seed: int, count: int, spelled: Sequence[str] = (), text: str = "") -> list[str]:
    """Random strings: of hard letters, of words and spelled tokens, of any characters, and parts of a text."""
    r = random.Random(seed)

    def anything() -> str:
        ranges = (
            (0x20, 0x7F),
            (0x20, 0x250),
            (0x300, 0x3000),
            (0x1E00, 0xD800),
            (0xE000, 0x20000),
            (0xE000, 0x110000),
        )
        return chr(r.randrange(*r.choice(ranges)))

    found = []
    for i in range(count):
        n = r.randrange(60)
        if i % 4 == 0:
            found.append("".join(r.choices(_LETTERS, k=n)))
        elif i % 4 == 1:
            found.append("".join(r.choices([*_WORDS, *spelled], k=n // 4)))
        elif i % 4 == 2 and text:
            at = r.randrange(len(text))
            found.append(text[at : at + 4 * n])
        else:
            found.append("".join(anything() for _ in range(n)))
    return [s.encode("utf-8", "ignore").decode() for s in found]
