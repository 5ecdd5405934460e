"""What long work says on stderr: a bar on a terminal, a line now and then in a pipe, nothing when told so."""

from __future__ import annotations

import io
import sys
import time

import pytest

from halfbyte.runtime.cli import terminal
from halfbyte.runtime.cli.terminal import Progress, duration


class Clock:
    """Time that passes when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr(terminal.time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59, "59 s"), (61, "1 min"), (1500, "25 min"), (5900, "98 min"), (12000, "3 h 20 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def run(clock: Clock, progress: Progress) -> None:
    """Ten minutes in which a third of the work was done before and the rest goes evenly."""
    with progress:
        for i in range(601):
            progress(f"layer {i // 100}", 300 + i, 900)
            clock.now += 1


def test_a_line_now_and_then_in_a_pipe(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    """With the time left at the pace of this run, not at that of what was done before it."""
    run(clock, Progress("converting", lines=True))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 20
    assert lines[0] == "layer 0: 37 %, 10 min left"
    assert lines[-1] == "layer 6: 100 %, 0 s left"
    assert lines[9] == "layer 3: 67 %, 5 min left"


def test_short_work_says_nothing_in_a_pipe(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    with Progress("converting", lines=True) as progress:
        for i in range(30):
            progress("x", i, 30)
            clock.now += 0.9
    with Progress("checking") as progress:
        progress("x", 0, 2)
        clock.now += 1000
        progress("x", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_quiet(clock: Clock, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither lines nor remarks, on a terminal or not."""
    run(clock, Progress("converting", lines=True, quiet=True))
    Progress("converting", quiet=True).note("continuing")
    assert capsys.readouterr() == ("", "")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    run(clock, Progress("converting", lines=True, quiet=True))
    assert stream.getvalue() == ""


def test_a_stretch_of_other_work_is_reckoned_by_itself(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    with Progress("converting", lines=True) as progress:
        for i in range(11):
            progress("slow", i, 10)
            clock.now += 31
        capsys.readouterr()
        progress("quick", 50, 100)
        assert capsys.readouterr().err == "quick: 50 %\n"
        clock.now += 31
        progress("quick\x1b[2J", 81, 100)
        assert capsys.readouterr().err == "quick\\x1b[2J: 81 %, 19 s left\n"


def test_a_bar_and_remarks_on_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Progress("converting", lines=True) as progress:
        progress("a", 0, 100)
        clock.now += 60
        progress("a", 25, 100)
        progress.note("continuing: 1 of 2 [matrices] are done")
        time.sleep(0.2)
    said = stream.getvalue()
    assert "25%" in said and "3 min left" in said and "continuing: 1 of 2 [matrices] are done" in said
