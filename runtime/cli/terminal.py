"""What commands print: tables, JSON, sizes, and progress on a terminal."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any


def one_line(message: object) -> str:
    """The text of a message in one line; control characters, which could steer a terminal, are escaped."""
    return printable(re.sub(r"\s*[\r\n]\s*", " ", str(message)).strip())


def printable(value: object) -> str:
    """Text from a file, safe for a terminal: what is not printable is escaped."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_table(rows: Sequence[Sequence[object]], header: Sequence[str], right: str = "") -> None:
    """Columns under a header; `right` has an 'r' at each column that is aligned to the right."""
    text = [list(header), *([printable("" if v is None else v) for v in row] for row in rows)]
    widths = [max(len(row[i]) for row in text) for i in range(len(header))]
    for row in text:
        cells = [
            v.rjust(w) if right[i : i + 1] == "r" else v.ljust(w) for i, (v, w) in enumerate(zip(row, widths))
        ]
        print("  ".join(cells).rstrip())


def print_json(value: Any) -> None:
    """One JSON object; numbers that JSON lacks (NaN, infinity) become null."""
    print(json.dumps(_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False))


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_jsonable(v) for v in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "item"):  # a NumPy scalar
        return _jsonable(value.item())
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def size(nbytes: float) -> str:
    """Bytes in decimal units: 1234567 is '1.23 MB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.3g} {unit}"


def duration(seconds: float) -> str:
    """About how long: '40 s', '12 min', '3 h 20 min'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Progress:
    """A bar with the time left on a terminal's stderr. Call it with (what is done now, done, total).

    In a pipe it is silent, or with `lines` says a line every PAUSE seconds, none in the first. quiet: never a word.
    """

    PAUSE = 30.0

    def __init__(self, title: str, *, quiet: bool = False, lines: bool = False):
        self.title, self.quiet, self.lines = title, quiet, lines
        self._bar: Any = None
        self._task: Any = None
        self._start = (0, 0.0, -1)  # done and time when a stretch of work began, and its total
        self._said = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and not self.quiet:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[left]}", markup=False),
                TextColumn("{task.fields[now]}", markup=False),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self.title, total=None, now="", left="")
            self._bar.start()
        return self

    def __call__(self, now: str, done: int, total: int) -> None:
        left = self._left(done, total)
        if self._bar is not None:
            shown = printable(now)[:40]
            self._bar.update(self._task, completed=done, total=total, now=shown, left=left)
        elif self.lines and not self.quiet and time.monotonic() - self._said >= self.PAUSE:
            self._said = time.monotonic()
            share = f"{100 * done / total:.0f} %" if total else ""
            print(", ".join(filter(None, (f"{printable(now)}: {share}", left))), file=sys.stderr, flush=True)

    def _left(self, done: int, total: int) -> str:
        """The time left at the pace since this stretch of work began."""
        at, since, known = self._start
        now = time.monotonic()
        if total != known or done < at:
            self._start = (done, now, total)
            return ""
        if done == at or now - since < 1:
            return ""
        return duration((total - done) * (now - since) / (done - at)) + " left"

    def note(self, line: str) -> None:
        """A line that stays, above the bar."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(printable(line), markup=False, highlight=False)
        else:
            print(printable(line), file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
