"""A file read in pieces, none of which may reach past its end."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np

from halfbyte.formats.errors import CheckpointError


class BoundedFile:
    """Random access to a file whose every read is checked against its size before memory is taken.

    Plain reads, not a mapping: a mapped page of a file that shrinks meanwhile kills the process, and
    mapped pages would count towards the memory of a conversion.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by close())
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror or error}") from None
        self._lock = threading.Lock()

    def read(self, offset: int, count: int) -> np.ndarray:
        """`count` bytes from `offset` as uint8. Raises CheckpointError past the end of the file."""
        if offset < 0 or count < 0 or count > self.size - offset:
            raise CheckpointError(
                f"{self.path.name} is truncated: {count} bytes at {offset} reach past its {self.size} bytes"
            )
        data = np.empty(count, np.uint8)
        view = data.data
        try:
            with self._lock:
                self._file.seek(offset)
                done = 0
                while done < count:
                    got = self._file.readinto(view[done:])
                    if not got:
                        raise CheckpointError(f"{self.path.name} became shorter while it was read")
                    done += got
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {self.path}: {error}") from None
        return data

    def close(self) -> None:
        """Close the file; later reads raise CheckpointError."""
        self._file.close()


def checked_product(values: tuple[int, ...], limit: int) -> int | None:
    """The product of sizes >= 0, or None if it exceeds `limit` (no number grows past limit * 2^64)."""
    if any(v < 0 for v in values):
        return None
    if 0 in values:
        return 0
    product = 1
    for v in values:
        product *= v
        if product > limit:
            return None
    return product
