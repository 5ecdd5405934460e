"""A conversion that is not finished: the folder that it lives in, and which of its tensors are whole.

`.model.hb.part/` beside `model.hb` holds the file as far as it is written, a journal, and what the conversion puts
aside. The first line of the journal names what is converted and how; then comes a line a tensor, with the SHA-256 of
its bytes. Whatever stopped a conversion, the same command continues it: tensors whose bytes still are what the
journal says are not computed again. A line that was cut off counts for nothing, so a kill needs no preparation, and
neither does a power failure: what never reached the disk has another digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from halfbyte.formats.errors import CheckpointError, HalfbyteError, UsageError

Note = Callable[[str], None]  # called with one line for the user

MAX_JOURNAL = 1 << 26  # bytes that are read of a journal


def identity(*parts: object) -> str:
    """SHA-256 (hex) of values that JSON can hold."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def files_in(paths: Iterable[Path], out: Path) -> list[tuple[str, int, int]]:
    """(path, bytes, nanoseconds of the last change) of files and of the files in folders, to see whether they change.

    What may be an output, `.hb` files, hidden ones and `out`, is left out.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += [p for p in path.iterdir() if p.suffix != ".hb" and not p.name.startswith(".")]
        else:
            found.append(path)
    facts = []
    for p in sorted(found):
        with contextlib.suppress(OSError):  # what cannot be read is complained about by whoever needs it
            s = p.stat()
            if not p.is_dir() and p.resolve() != out.resolve():
                facts.append((str(p.resolve()), s.st_size, s.st_mtime_ns))
    return facts


class Unfinished:
    """Context manager around a conversion to `out`; nothing exists before `begin`.

    When the conversion ends, the folder goes. After a failure it stays if it is worth something, unless what is
    converted is at fault (CheckpointError, UsageError).
    """

    def __init__(self, out: Path):
        self.out = out
        self.folder = out.with_name(f".{out.name}.part")
        self.file = self.folder / "model.hb"
        self._journal = self.folder / "journal"
        self._lock = -1
        self._entries: list[dict[str, Any]] = []

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock < 0:
            return
        faulty = kind is not None and issubclass(kind, (CheckpointError, UsageError))
        if kind is None or faulty or not (self.tensors() or self.fact("plan")):
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self._clear(self.file, self._journal)
        os.close(self._lock)
        self._lock = -1

    def begin(self, what: str, note: Note | None = None) -> None:
        """Take the folder for a conversion of this identity, with what an earlier one left of it.

        Raises UsageError while another process converts to the same file, HalfbyteError if the disk refuses.
        """
        try:
            self._take()
            self._entries = self._read()
            if self._entries and self._entries[0] != {"conversion": what}:
                if note:
                    note("starting again: the unfinished file has another source, options or version")
                self._entries = []
            if not self._entries:
                self._clear()
                self._append({"conversion": what})
            else:
                self._clear(self.file, self._journal)
        except OSError as error:
            raise HalfbyteError(f"{self.folder}: cannot write: {error.strerror or error}") from None

    def _take(self) -> None:
        """Create the folder and lock it; the lock falls when the process ends, however it does."""
        while self._lock < 0:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / "lock"
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # removed in between by one that finished
                continue
            try:
                _lock(fd)
                if os.path.samestat(os.fstat(fd), path.stat()):
                    self._lock = fd
            except FileNotFoundError:
                pass
            except OSError:
                raise UsageError(f"{self.out} is being written by another conversion") from None
            finally:
                if self._lock < 0:
                    os.close(fd)

    def _clear(self, *keep: Path) -> None:
        """Remove what a killed process left, but for some files."""
        for path in self.folder.iterdir():
            if path.name == "lock" or path in keep:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _read(self) -> list[dict[str, Any]]:
        """The journal up to the first line that is not whole; the rest is cut off."""
        try:
            with self._journal.open("rb") as file:
                data = file.read(MAX_JOURNAL)
        except FileNotFoundError:
            return []
        entries: list[dict[str, Any]] = []
        good = 0
        for line in data.splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not line.endswith(b"\n") or not isinstance(entry, dict):
                break
            entries.append(entry)
            good += len(line)
        os.truncate(self._journal, good)
        return entries

    def _append(self, entry: dict[str, Any]) -> None:
        self._entries.append(entry)
        try:
            with self._journal.open("ab") as file:
                file.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
        except OSError as error:
            raise HalfbyteError(f"{self._journal}: cannot write: {error.strerror or error}") from None

    # ---- what is in the journal -----------------------------------------------------------------

    def fact(self, key: str) -> Any:
        """What was last remembered under a name, None if nothing was."""
        return next((e[key] for e in reversed(self._entries) if key in e), None)

    def remember(self, key: str, value: Any) -> None:
        """Keep something that JSON can hold for a conversion that continues this one."""
        self._append({key: value})

    def lay_out(self, layout: str) -> None:
        """Tensors of a file of another layout are forgotten."""
        if self.fact("layout") != layout:
            self.remember("layout", layout)

    def tensors(self) -> dict[int, str]:
        """Index -> SHA-256 (hex) of the tensors that were whole, in the present layout."""
        out: dict[int, str] = {}
        for e in self._entries:
            if "layout" in e:
                out = {}
            elif isinstance(e.get("tensor"), int) and isinstance(e.get("sha256"), str):
                out[e["tensor"]] = e["sha256"]
        return out

    def add(self, index: int, name: str, digest: bytes) -> None:
        """A tensor is whole."""
        self._append({"tensor": index, "name": name, "sha256": digest.hex()})


def _lock(fd: int) -> None:
    """Raises OSError if another process holds the lock; systems without flock are trusted not to try."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
