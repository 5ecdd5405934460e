"""The activations of all calibration tokens between two matrices: in memory as far as a limit allows, then on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from halfbyte.formats.errors import HalfbyteError


class Activations:
    """Arrays float32[tokens, width] by name. A context manager; where an array lies changes no value.

    limit: bytes to hold in memory. An array that does not fit beside the others goes to a file in `folder` that has no
    name, so nothing remains of it however the process ends. HalfbyteError when the disk is full.
    """

    def __init__(self, tokens: int, folder: Path | None, limit: int):
        self.tokens, self.folder, self.limit = tokens, folder, limit
        self._held: dict[object, np.ndarray] = {}
        self._files: dict[object, BinaryIO] = {}

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *exc: object) -> None:
        for name in (*self._held, *self._files):
            self.drop(name)

    def store(self, name: object, span: slice, values: np.ndarray) -> None:
        """Rows `span` of an array, which is made when its first rows come; values [rows, width]."""
        width = values.shape[1]
        if name not in self._held and name not in self._files:
            held = sum(a.nbytes for a in self._held.values())
            if held + 4 * self.tokens * width <= self.limit:
                self._held[name] = np.empty((self.tokens, width), np.float32)
            else:
                self._files[name] = self._open()
        if name in self._held:
            self._held[name][span] = values
            return
        file, data = self._files[name], np.ascontiguousarray(values, np.float32).data.cast("B")
        try:
            file.seek(4 * span.start * width)
            while len(data):
                data = data[file.write(data) :]
        except OSError as error:
            raise self._failed(error) from None

    def load(self, name: object, span: slice, out: np.ndarray) -> None:
        """Rows `span` that were stored, into out[rows, width]."""
        if name in self._held:
            out[:] = self._held[name][span]
            return
        values = np.empty(out.shape, np.float32)
        file, data = self._files[name], values.data.cast("B")
        try:
            file.seek(4 * span.start * out.shape[1])
            while len(data):
                n = file.readinto(data)  # type: ignore[attr-defined]
                if not n:
                    raise HalfbyteError("activations put aside are gone")
                data = data[n:]
        except OSError as error:
            raise self._failed(error) from None
        out[:] = values

    def drop(self, name: object) -> None:
        """Forget an array."""
        self._held.pop(name, None)
        file = self._files.pop(name, None)
        if file is not None:
            file.close()

    def _open(self) -> BinaryIO:
        try:
            return tempfile.TemporaryFile(dir=self.folder, buffering=0)
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> HalfbyteError:
        where = self.folder or tempfile.gettempdir()
        return HalfbyteError(f"{where}: cannot put activations aside: {error.strerror or error}")
