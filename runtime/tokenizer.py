"""Text to token ids and back, by the Hugging Face `tokenizers` library.

Encoding never runs the tokenizer's post-processor: BOS is put in front here, once, and nothing is ever
appended. Decoding goes byte by byte, so that text which arrives one token at a time and text which is
decoded at once are the same, and no half of a UTF-8 character is ever shown.
"""

from __future__ import annotations

import codecs
import json as json_module
import threading
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from halfbyte.formats.byte_decoder import ByteDecoder
from halfbyte.formats.errors import TokenizerError, UsageError

_MAX_HELD = 16  # tokens that a stream without a byte table holds back for a character to become whole


class Tokenizer:
    """A tokenizer of a model file; safe to share between threads.

    json     a `tokenizers` tokenizer (tokenizer.json), UTF-8; TokenizerError if it cannot be read
    bos_id   id put in front of a text, or None
    eos_ids  ids that end a generation
    add_bos  whether `encode` puts BOS in front unless told otherwise
    """

    def __init__(self, json: bytes, bos_id: int | None, eos_ids: Iterable[int], add_bos: bool) -> None:
        self._library = _load(json)
        self._lock = threading.Lock()
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.add_bos = add_bos and bos_id is not None
        self._bytes: dict[int, bytes] = {}
        self._decoder = _byte_decoder(self._library)

    @cached_property
    def vocab_size(self) -> int:
        """The highest id + 1."""
        return max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens: those that a text cannot contain."""
        return frozenset(index for index, token in self._added.items() if token.special)

    @cached_property
    def _added(self) -> dict[int, Any]:
        return self._library.get_added_tokens_decoder()

    def same_tokens(self, other: Tokenizer) -> bool:
        """Whether both know the same tokens by the same ids, and end answers alike."""
        mine, theirs = (t._library.get_vocab(with_added_tokens=True) for t in (self, other))
        return self is other or (mine == theirs and set(self.eos_ids) == set(other.eos_ids))

    def id_of(self, piece: str) -> int | None:
        """The id of a token by its exact spelling in the vocabulary, or None."""
        return self._library.token_to_id(piece)

    def piece(self, id: int) -> str:
        """A token as the vocabulary spells it; '' for an id that has no token (padding of the embedding)."""
        if id in self._added:  # the library may know it by a normalised spelling
            return self._added[id].content
        return self._library.id_to_token(id) or "" if id >= 0 else ""

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token adds to a text, special tokens as they are spelled; b'' for no token.

        For the rare tokenizer without a byte alphabet these are the bytes of the token decoded alone.
        """
        known = self._bytes.get(id)
        if known is None:
            if self._decoder is not None:
                known = self._decoder.bytes_of(self.piece(id))
            else:
                known = self._library.decode([id], skip_special_tokens=False).encode("utf-8")
            self._bytes[id] = known
        return known

    def encode(self, text: str, bos: bool | None = None, special: bool = True) -> list[int]:
        """Ids of a text.

        bos      put BOS in front; None does as the model was trained. A text that already starts with
                 BOS, as a rendered chat template may, does not get a second one.
        special  recognise control tokens spelled in the text. False takes them as plain text, so that
                 what a user types cannot open a turn or end one.

        Raises UsageError for text that is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError("the text holds characters that are not valid Unicode") from None
        try:
            with self._lock:
                # The flag is part of the library's object; the lock keeps it and its use together.
                if self._library.encode_special_tokens is special:
                    self._library.encode_special_tokens = not special
                ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic in the Rust library is not an Exception
            raise TokenizerError(f"the tokenizer cannot encode this text: {_one_line(error)}") from None
        if not special and not self._control_ids.isdisjoint(ids):
            ids = self._encode_plain(text)
        if bos is None:
            bos = self.add_bos
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of a sequence of ids: what a stream of them would give."""
        stream = self.stream(skip_special)
        return "".join([stream.push(id) for id in ids]) + stream.flush()

    def stream(self, skip_special: bool = True, shown: frozenset[int] = frozenset()) -> TextStream:
        """A decoder for ids that arrive one after the other; `shown` are special ids not to skip."""
        return TextStream(self, skip_special, shown)

    def _encode_plain(self, text: str) -> list[int]:
        """Encode where the model itself knows a control token's spelling: cut such spellings in two."""
        library = self._library
        spellings = sorted((self.piece(i) for i in self.special_ids), key=len, reverse=True)
        normalized = library.normalizer.normalize_str(text) if library.normalizer else text
        words = [normalized]
        if library.pre_tokenizer:
            words = [word for word, _ in library.pre_tokenizer.pre_tokenize_str(normalized)]
        ids: list[int] = []
        for word in words:
            parts = [word]
            for spelling in spellings:
                cut = [half for part in parts for half in _halves(part, spelling)]
                parts = [part for part in cut if part]
            ids += [token.id for part in parts for token in library.model.tokenize(part)]
        if not self._control_ids.isdisjoint(ids):
            raise UsageError("the text spells a control token that this tokenizer cannot take as plain text")
        return ids

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        """Special ids but the unknown token, which any strange character may become."""
        unknown = {token.id for token in self._library.model.tokenize("\U0010ffff")}
        return self.special_ids - unknown


class TextStream:
    """Text of one sequence of ids, piece by piece; constant work per token."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, shown: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids - shown if skip_special else frozenset()
        self._rules = tokenizer._decoder
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True
        self._window: list[int] = []
        self._shown = 0

    def push(self, id: int) -> str:
        """The text that is certain once this id is known; '' while a character is incomplete."""
        if id in self._skipped:
            return ""
        if self._rules is None:
            return self._push_window(id)
        raw = self._tokenizer.token_bytes(id)
        if self._at_start and raw:
            self._at_start = False
            raw = self._rules.first_bytes(self._tokenizer.piece(id), raw)
        return self._utf8.decode(raw)

    def flush(self) -> str:
        """What is held back, an incomplete character as U+FFFD; the stream starts anew."""
        if self._rules is None:
            text = self._window_text(self._window)[self._shown :]
        else:
            text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._at_start, self._window, self._shown = True, [], 0
        return text

    def _window_text(self, ids: list[int]) -> str:
        return self._tokenizer._library.decode(ids, skip_special_tokens=False)

    def _push_window(self, id: int) -> str:
        """Decode a short window of the last tokens again: for decoders that are not a map of bytes."""
        self._window.append(id)
        text = self._window_text(self._window)
        if text.endswith("\ufffd") and len(self._window) < _MAX_HELD:
            return ""
        new = text[self._shown :]
        self._window = self._window[-1:] if len(self._window) >= _MAX_HELD else self._window[-4:]
        self._shown = len(self._window_text(self._window))
        return new


def _byte_decoder(library: Any) -> ByteDecoder | None:
    """The library's decoder; None if it does anything else than map tokens to bytes."""
    if library.decoder is None:
        return None
    try:
        return ByteDecoder.of(json_module.loads(library.decoder.__getstate__()))
    except TokenizerError:
        return None


def _halves(text: str, spelling: str) -> list[str]:
    """Cut a text after the first character of each occurrence of a spelling."""
    if len(spelling) < 2:
        return [text]
    parts = text.split(spelling)
    halves = [parts[0]]
    for part in parts[1:]:
        halves[-1] += spelling[0]
        halves.append(spelling[1:] + part)
    return halves


def _load(json: bytes) -> Any:
    import tokenizers

    try:
        library = tokenizers.Tokenizer.from_str(json.decode("utf-8"))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in the Rust library is not an Exception
        raise TokenizerError(f"the file's tokenizer cannot be read: {_one_line(error)}") from None
    # Either would silently shorten or lengthen a prompt.
    library.no_truncation()
    library.no_padding()
    return library


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
