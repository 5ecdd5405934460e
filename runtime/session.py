"""A session: one timeline of token ids with its keys and values."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from halfbyte.formats.container import sha256
from halfbyte.formats.errors import HalfbyteError, UsageError
from halfbyte.runtime.backends.backend import Step
from halfbyte.runtime.kv import KV, PAGE
from halfbyte.runtime.model import CHUNK, Model

_MAGIC = b"\x89hbs\r\n\x1a\n"
_HEAD = struct.Struct(
    "<8s32sIQI"
)  # magic, model digest, format version, position, bytes of the kv mode's name
_FIRST = struct.Struct("<Q")  # before the pages of a cache: the number of the first one held
_VERSION = 3


class Session:
    """Feed token ids, get logits; go back, branch, save.

    Sessions of one model may be used from different threads; one session from one thread at a time.
    """

    def __init__(self, model: Model, kv: str | None = None):
        self.model = model
        self.kv = model.new_kv(kv)
        self.ids: list[int] = []

    @property
    def position(self) -> int:
        """Tokens fed so far; the next one takes this position."""
        return len(self.ids)

    def feed(self, token_ids: Sequence[int], *, chunk: int = CHUNK) -> np.ndarray:
        """Append tokens; float32[vocab] logits after the last one. Results do not depend on `chunk`.

        Raises UsageError for no tokens, ids out of range, or more than the context holds; the session
        is then unchanged.
        """
        return self._run(token_ids, chunk, every=False)[-1]

    def feed_all(self, token_ids: Sequence[int], *, chunk: int = CHUNK) -> np.ndarray:
        """Like `feed`, but float32[len(token_ids), vocab]: the logits after each token."""
        return self._run(token_ids, chunk, every=True)

    def _run(self, token_ids: Sequence[int], chunk: int, every: bool) -> np.ndarray:
        ids = [int(i) for i in token_ids]
        if not ids:
            raise UsageError("feed needs at least one token id")
        if chunk < 1:
            raise UsageError(f"chunk must be at least 1, not {chunk}")
        if self.position + len(ids) > self.model.context_length:
            raise UsageError(
                f"{self.position + len(ids)} tokens do not fit the model's context of {self.model.context_length}"
            )
        if not all(0 <= i < self.model.vocab_size for i in ids):
            raise UsageError(f"token ids must lie in 0..{self.model.vocab_size - 1}")
        start, out = self.position, []
        for at in range(0, len(ids), chunk):
            part = np.asarray(ids[at : at + chunk], np.int32)
            rows = len(part)
            self.kv.reserve(start + at + rows, start + at)
            last = at + rows == len(ids)
            picks = (
                np.arange(rows, dtype=np.int32) if every else np.array([rows - 1] if last else [], np.int32)
            )
            positions = np.arange(start + at, start + at + rows, dtype=np.int32)
            step = Step(part, positions, np.zeros(rows, np.int32), picks, [self.kv])
            out.append(self.model.run(step))
        self.ids += ids
        return np.concatenate(out)

    def rewind(self, n: int) -> None:
        """Forget the last n tokens. Raises UsageError when there are fewer.

        Where a sliding window has already let go of what the earlier position saw, the tokens that remain
        are fed again, which gives the same keys and values.
        """
        if not 0 <= n <= self.position:
            raise UsageError(f"cannot rewind {n} tokens: {self.position} were fed")
        if n == 0:
            return
        ids = self.ids[: self.position - n]
        self.kv.truncate(len(ids))
        self.ids = ids
        if not self.kv.holds(len(ids)):
            self.ids, self.kv = [], self.model.new_kv(self.kv.mode)
            self.feed(ids)

    def fork(self) -> Session:
        """An independent session that continues from here; memory is shared until one of the two writes."""
        other = Session.__new__(Session)
        other.model, other.ids, other.kv = self.model, list(self.ids), self.kv.fork(self.position)
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `encode` to a file that only the same model can load.

        Written aside and renamed. Raises HalfbyteError when it cannot be written.
        """
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            partial.write_bytes(self.encode())
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise HalfbyteError(f"{path}: cannot write: {error.strerror}") from None

    def encode(self) -> bytes:
        """Ids and pages, as they are stored, and a SHA-256 of them all at the end."""
        body, mode = io.BytesIO(), self.kv.mode.encode()
        body.write(_HEAD.pack(_MAGIC, self.model.file.digest, _VERSION, self.position, len(mode)) + mode)
        body.write(np.asarray(self.ids, "<i4").tobytes())
        for c, pages in enumerate(self.kv.pages):
            first = self.kv.first(c, self.position) // PAGE
            body.write(_FIRST.pack(first))
            for i, page in enumerate(pages[first : -(-self.position // PAGE)], first):
                assert page is not None
                body.write(page.cleared(max(0, self.position - i * PAGE)))
        data = body.getvalue()
        return data + sha256(data)

    @classmethod
    def load(cls, model: Model, path: str | os.PathLike[str]) -> Session:
        """The session saved in a file. Raises HalfbyteError for damage or another model's session."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise HalfbyteError(f"{path}: {error.strerror}") from None
        if len(data) < _HEAD.size + 32 or data[:8] != _MAGIC:
            raise HalfbyteError(f"{path}: not a session file")
        _, digest, version, position, mode_bytes = _HEAD.unpack_from(data)
        if version != _VERSION:
            raise HalfbyteError(f"{path}: session version {version} is not readable by this halfbyte")
        if sha256(data[:-32]) != data[-32:]:
            raise HalfbyteError(f"{path}: the session is damaged (its digest does not match)")
        if digest != model.file.digest:
            raise HalfbyteError(f"{path}: the session belongs to another model file")
        at = _HEAD.size + mode_bytes
        kv_mode = data[_HEAD.size : at].decode("ascii", "replace")
        if kv_mode != model.kv_mode:
            raise HalfbyteError(f"{path}: saved with kv {kv_mode}, the model was loaded with {model.kv_mode}")
        session = cls(model)
        if position > model.context_length or at + 4 * position + 32 > len(data):
            raise HalfbyteError(f"{path}: the session does not fit the model")
        session.ids = np.frombuffer(data, "<i4", position, at).tolist()
        session.kv.reserve(position)
        at += 4 * position
        for c in range(len(session.kv.caches)):
            at = _read_pages(session.kv, c, data, at, position)
        if at + 32 != len(data) or not session.kv.holds(position):
            raise HalfbyteError(f"{path}: the session does not fit the model")
        return session


def _read_pages(kv: KV, c: int, data: bytes, at: int, position: int) -> int:
    """The pages of one cache from a session file; where the next cache starts, or -1."""
    if at < 0 or at + _FIRST.size > len(data):
        return -1
    (first,) = _FIRST.unpack_from(data, at)
    at += _FIRST.size
    if first > position // PAGE:
        return -1
    for page in kv.pages[c][first : -(-position // PAGE)]:
        assert page is not None
        if at + page.bytes.nbytes > len(data):
            return -1
        page.bytes[:] = np.frombuffer(data, np.uint8, page.bytes.nbytes, at)
        at += page.bytes.nbytes
    return at
