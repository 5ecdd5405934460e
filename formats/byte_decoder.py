"""The decoder of a tokenizer.json as a map from a vocabulary's spelling to bytes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from halfbyte.formats.errors import TokenizerError


class ByteDecoder:
    """What each token says, alone and as a text's first.

    byte_level  the spelling is in GPT-2's alphabet, one printable character a byte
    replaced    (from, to) pairs applied to the spelling, such as U+2581 to a space
    fallback    '<0xNN>' is that byte
    strip       characters cut from the start of the whole text, if they are `strip_text`
    metaspace   the first token loses its U+2581 altogether, as the library's Metaspace does
    """

    def __init__(self) -> None:
        self.byte_level = False
        self.fallback = False
        self.replaced: list[tuple[str, str]] = []
        self.strip = 0
        self.strip_text = b" "
        self.metaspace: str | None = None

    @staticmethod
    def of(entry: Mapping[str, Any]) -> ByteDecoder:
        """Read the `decoder` of a tokenizer.json. Raises TokenizerError if it does more than map tokens to bytes."""
        steps = entry["decoders"] if entry.get("type") == "Sequence" else [entry]
        rules = ByteDecoder()
        fused = False
        for step in steps:
            kind = step.get("type")
            if kind == "ByteLevel" and len(steps) == 1:
                rules.byte_level = True
            elif kind == "ByteFallback":
                rules.fallback = True
            elif kind == "Fuse":
                fused = True
            elif kind == "Replace" and "String" in step["pattern"] and not fused and not rules.fallback:
                rules.replaced.append((step["pattern"]["String"], step["content"]))
            elif kind == "Strip" and fused and not step["stop"]:
                rules.strip, rules.strip_text = step["start"], step["content"].encode("utf-8")
            elif kind == "Metaspace" and not fused and not rules.fallback:
                rules.replaced.append((step["replacement"], " "))
                if step.get("prepend_scheme", "always") != "never":
                    rules.metaspace = step["replacement"]
            else:
                raise TokenizerError(f"the decoder {kind}")
        return rules

    def bytes_of(self, piece: str) -> bytes:
        """What a token says."""
        if self.byte_level:
            alphabet = byte_alphabet()
            if all(character in alphabet for character in piece):
                return bytes([alphabet[character] for character in piece])
            return piece.encode("utf-8")
        if self.fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return bytes([int(piece[3:5], 16)])
            except ValueError:
                pass
        for old, new in self.replaced:
            piece = piece.replace(old, new)
        return piece.encode("utf-8")

    def first_bytes(self, piece: str, raw: bytes) -> bytes:
        """The bytes of a text's first token, without the space that encoding put in front."""
        if self.metaspace is not None:
            return piece.replace(self.metaspace, "").encode("utf-8") if self.metaspace in piece else raw
        for _ in range(self.strip):
            raw = raw.removeprefix(self.strip_text)
        return raw


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones are themselves, the rest count up from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters.update({chr(0x100 + rank): byte for rank, byte in enumerate(others)})
    return letters
