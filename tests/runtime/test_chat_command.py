"""`halfbyte chat`: by a pipe, on a pseudo-terminal, and the dialogue beneath."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_model import REFERENCE, checked_error, write_checkpoint
from story import story_folder

import halfbyte
from halfbyte.formats.errors import HalfbyteError, UsageError
from halfbyte.runtime.cli import main
from halfbyte.runtime.conversation import prompt_ids
from halfbyte.runtime.dialogue import Dialogue
from halfbyte.runtime.model import Model
from halfbyte.runtime.thoughts import Thoughts

MAIN = "import sys; from halfbyte.runtime.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    return halfbyte.convert(write_checkpoint(folder / "c", template=True), folder / "chatty.hb", recipe="f32")


@pytest.fixture(scope="module")
def model(file: Path) -> Model:
    return halfbyte.load(file, backend="reference")


def asked(dialogue: Dialogue, text: str) -> tuple[str, Any]:
    """(all the text, the turn)."""
    turn, found = dialogue.ask(text), []
    while True:
        try:
            found.append(next(turn)[1])
        except StopIteration as done:
            return "".join(found), done.value


# ---- the dialogue -------------------------------------------------------------------------------


def test_each_answer_is_that_of_the_whole_conversation(model: Model) -> None:
    dialogue = Dialogue(model, "be good", max_tokens=6)
    for text in ("once upon", "a little dog", "the end"):
        said = [
            {"role": "system", "content": "be good"},
            *dialogue.messages,
            {"role": "user", "content": text},
        ]
        got, turn = asked(dialogue, text)
        assert got == "".join(model.generate(prompt_ids(model, said), max_tokens=6))
        assert turn.dropped == 0
    assert turn.reused > 20  # the turns before were not fed again
    assert [m["role"] for m in dialogue.messages] == ["user", "assistant"] * 3


def test_the_oldest_turns_are_dropped_and_told(model: Model) -> None:
    dialogue = Dialogue(model, "be good", max_tokens=8)
    dropped = 0
    for i in range(12):
        _, turn = asked(dialogue, f"once upon a time there was a little dog {'abcdefghijkl'[i]}")
        dropped += turn.dropped
        assert turn.prompt_tokens + 8 <= model.context_length
    assert dropped and dropped % 2 == 0 and len(dialogue.messages) == 24 - dropped
    assert dialogue.messages[-2]["content"].endswith(" l")
    alone = [{"role": "system", "content": "be good"}, *dialogue.messages[:-1]]
    assert turn.prompt_tokens == len(prompt_ids(model, alone))


def test_a_message_that_never_fits_changes_nothing(model: Model) -> None:
    dialogue = Dialogue(model, max_tokens=4)
    asked(dialogue, "once")
    before = list(dialogue.messages)
    with pytest.raises(UsageError, match="the context is 128"):
        asked(dialogue, "dog " * 500)
    assert dialogue.messages == before
    assert asked(dialogue, "again")[0]


def test_an_answer_that_is_closed_is_kept(model: Model) -> None:
    dialogue = Dialogue(model, max_tokens=30)
    turn = dialogue.ask("once upon a time")
    said = "".join(next(turn)[1] for _ in range(5))
    turn.close()
    assert dialogue.messages[-1] == {"role": "assistant", "content": said.strip()}
    whole = [*dialogue.messages, {"role": "user", "content": "and"}]
    dialogue.max_tokens = 6
    assert asked(dialogue, "and")[0] == "".join(model.generate(prompt_ids(model, whole), max_tokens=6))


def test_nothing_answered_is_nothing_said(model: Model) -> None:
    dialogue = Dialogue(model, max_tokens=0)
    asked(dialogue, "once")
    assert dialogue.messages == []


def test_undo_save_and_load(model: Model, tmp_path: Path) -> None:
    dialogue = Dialogue(model, "be good", max_tokens=3)
    asked(dialogue, "once")
    asked(dialogue, "twice")
    dialogue.save(tmp_path / "chat.json")
    other = Dialogue(model)
    other.load(tmp_path / "chat.json")
    assert (other.system, other.messages) == (dialogue.system, dialogue.messages)
    assert other.undo() == "twice" and other.undo() == "once"
    with pytest.raises(UsageError, match="nothing was said"):
        other.undo()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"system": 1, "messages": []}',
        '{"system": "", "messages": [{"role": "user", "content": "x"}]}',
        '{"system": "", "messages": [{"role": "user"}, {"role": "assistant"}]}',
        '{"system": "", "messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": ""}]}',
        '{"system": "", "messages": 5}',
    ],
)
def test_what_is_no_saved_chat(model: Model, tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(UsageError, match="not a saved chat"):
        Dialogue(model).load(tmp_path / "x")
    with pytest.raises(HalfbyteError, match="No such file"):
        Dialogue(model).load(tmp_path / "none")


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("prompt", "text", "thought", "said"),
    [
        ("", "<think>hmm</think>yes", "hmm", "yes"),
        ("a <think>\n", "hmm</think>yes", "hmm", "yes"),
        ("", "1 < 2 <thinking>x</thinking> <thin", "x", "1 < 2  <thin"),
        ("", "[THINK]a<think>b[/THINK]c", "a<think>b", "c"),
        ("", "<think>never ends </thi", "never ends </thi", ""),
        ("", "<think></think>a<think>b</think>", "b", "a"),
    ],
)
def test_thoughts(prompt: str, text: str, thought: str, said: str, size: int) -> None:
    thoughts = Thoughts(prompt)
    found = [part for i in range(0, len(text), size) for part in thoughts.push(text[i : i + size])]
    found += thoughts.flush()
    assert "".join(t for is_thought, t in found if is_thought) == thought
    assert "".join(t for is_thought, t in found if not is_thought) == said


# ---- by a pipe ----------------------------------------------------------------------------------


def piped(monkeypatch: Any, capsys: Any, text: str | bytes, *argv: object) -> tuple[int, str, str]:
    data = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
    status = main(["chat", *map(str, argv), *REFERENCE])
    return status, *capsys.readouterr()


def test_a_pipe_gets_the_answers_and_nothing_else(model, file, monkeypatch, capsys):
    options = (file, "--temp", 0, "-n", 6)
    status, out, err = piped(
        monkeypatch, capsys, 'once\\\nupon\n\n"""\na\n\nb\n"""\n//dog\n/stats\n', *options
    )
    assert status == 0, err
    dialogue = Dialogue(model, max_tokens=6)
    expected = [asked(dialogue, text)[0].strip() for text in ("once\nupon", "a\n\nb", "/dog")]
    assert [line.strip() for line in out.splitlines()] == [e for e in expected if e]
    assert "answers   3" in err and "\x1b" not in out + err


def test_a_draft_model_changes_no_answer(file, monkeypatch, capsys, tmp_path):
    text, options = "once\nand then\n", (file, "--temp", 0.8, "--seed", 3, "-n", 12)
    plain = piped(monkeypatch, capsys, text, *options)
    drafted = piped(monkeypatch, capsys, text, *options, "--draft", file)
    assert plain[0] == drafted[0] == 0 and plain[1] == drafted[1] and plain[1].strip()
    other = halfbyte.convert(story_folder(tmp_path / "c"), tmp_path / "other.hb", recipe="q8")
    for draft, said in ((other, "another tokenizer"), (tmp_path / "none", "such")):
        assert said in checked_error(*piped(monkeypatch, capsys, "", file, "--draft", draft))


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_signal_while_another_is_answered_leaves_no_traceback(file, monkeypatch, capsys):
    import halfbyte.runtime.cli as cli

    said: list[str] = []

    def twice(message: str, status: int = 2, kind: str = "error: ") -> int:
        said.append(message)
        if len(said) == 1:
            signal.raise_signal(signal.SIGINT)
        return status

    monkeypatch.setattr(cli, "_fail", twice)
    monkeypatch.setattr(cli, "_run", lambda _: signal.raise_signal(signal.SIGTERM))
    assert cli.main(["chat", str(file)]) == 128 + signal.SIGINT


def test_errors_in_a_pipe_are_one_line(file, monkeypatch, capsys, tmp_path):
    for text, said in (
        ("/nonsense\n", "no command /nonsense"),
        ("/load\n", "needs a file"),
        (f"/load {tmp_path}/none\n", "No such file"),
        ("/params heat 3\n", "no parameter 'heat'"),
        ("/params temperature hot\n", "not a number"),
        ("/params temperature -1\n", "temperature"),
        ("/params max_tokens 0\n", "at least 1"),
        ("/undo\n", "nothing was said"),
        (b"\xff\xfe\n", "not valid Unicode"),
    ):
        assert said in checked_error(*piped(monkeypatch, capsys, text, file))
    for option in (("--temp", "-1"), ("--load", tmp_path / "none"), ("--top-p", "2")):
        checked_error(*piped(monkeypatch, capsys, "", file, *option))


def test_every_command(file, monkeypatch, capsys, tmp_path):
    chat = tmp_path / "chat.json"
    lines = [
        "/help",
        "/system be good",
        "once",
        f"/save {chat}",
        "/retry",
        "/undo",
        "/params temperature 0.5",
    ]
    lines += [
        "/params thinking off",
        "/params lookup 0",
        "/reset",
        f"/load {chat}",
        "/stats",
        "/exit",
        "/nonsense",
    ]
    status, _, err = piped(monkeypatch, capsys, "\n".join(lines), file, "-n", 5, "--seed", 1)
    assert status == 0, err
    saved = json.loads(chat.read_text())
    assert saved["system"] == "be good" and saved["messages"][0] == {"role": "user", "content": "once"}
    for said in ("/retry", "(system prompt: be good)", "(saved 2 messages", "(forgotten: once)", "0.5",
                 "(a new chat)", "(loaded 2 messages)", "answers   2, 10 tokens"):  # fmt: skip
        assert said in err, said


def test_seeds(file, monkeypatch, capsys):
    def talk(*options: object) -> str:
        return piped(monkeypatch, capsys, "once\n/retry\n", file, "-n", 12, "--temp", 1, *options)[1]

    assert talk("--seed", 3) == talk("--seed", 3)
    first, second = talk("--seed", 3).splitlines()[:2]
    assert first != second
    assert talk() != talk()


# ---- on a terminal ------------------------------------------------------------------------------


class Terminal:
    """The command on a pseudo-terminal."""

    def __init__(self, fd: int, pid: int):
        self.fd, self.pid, self.seen = fd, pid, ""

    def until(self, pattern: str, timeout: float = 60) -> str:
        """Read on until the pattern was seen; all up to its end."""
        deadline = time.monotonic() + timeout
        while not (found := re.search(pattern, self.seen)):
            if not select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"no {pattern!r} in {self.seen!r}")
            try:
                self.seen += os.read(self.fd, 4096).decode()
            except OSError:
                raise AssertionError(f"it ended without {pattern!r}: {self.seen!r}") from None
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def send(self, text: str) -> None:
        """Type."""
        os.write(self.fd, text.encode())

    def status(self) -> int:
        """Wait for the end; its exit status."""
        try:
            while os.read(self.fd, 4096):
                pass
        except OSError:
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextmanager
def terminal(home: Path, *argv: object, main: str = MAIN) -> Iterator[Terminal]:
    """Run `halfbyte chat` on a pseudo-terminal."""
    pty = pytest.importorskip("pty")
    command = [sys.executable, "-c", main, "chat", *map(str, argv)]
    pid, fd = pty.fork()
    if pid == 0:
        env = {
            **os.environ,
            "TERM": "xterm",
            "HALFBYTE_HOME": str(home),
            "INPUTRC": "/dev/null",
            "COLUMNS": "200",
        }
        os.execvpe(command[0], command, env)
    try:
        yield Terminal(fd, pid)
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(fd)


THINKING = (
    "{% for m in messages %}<|turn|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|><think>{% endif %}"
)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a large context that thinks without an end."""
    folder = tmp_path_factory.mktemp("endless")
    write_checkpoint(folder / "c", template=True, config={"max_position_embeddings": 100_000})
    (folder / "c" / "chat_template.jinja").write_text(THINKING)
    return halfbyte.convert(folder / "c", folder / "endless.hb", recipe="f32")


def test_an_interrupt_stops_the_answer_and_keeps_the_chat(endless, tmp_path):
    with terminal(tmp_path, endless, "-n", 90_000, "--seed", 1, "--lookup", 0) as chat:
        chat.until("> ")
        chat.send("once\n")
        assert "\x1b[2m" in chat.until(r"\x1b\[2m[^\x1b]{40}")  # a thought, dimmed
        chat.send("\x03")
        assert "\x1b[0m" in chat.until(r"\(stopped\)\s+> ")
        chat.send("/stats\n")
        chat.until(r"answers   1, [0-9]+ tokens")
        chat.until("> ")
        chat.send("/nonsense\n")
        chat.until(r"\(there is no command /nonsense[^\n]*\s+> ")
        chat.send('"""\none\n')
        chat.until(r"\. ")
        chat.send('two"""\n')
        chat.until(r"\x1b\[2m[^\x1b]{10}")
        chat.send("\x03")
        chat.until(r"\r\n> ")  # this answer depends on where the first was stopped, and may end by itself
        chat.send("\x04")
        assert chat.status() == 0
    history = tmp_path / "history"
    assert history.read_text().splitlines()[:2] == ["once", "/stats"]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_lines_of_earlier_chats_come_back(file, tmp_path):
    for line in ("/system one", "\x1b[A\x1b[A"):  # the second time: arrow up, past /exit
        with terminal(tmp_path, file) as chat:
            chat.until("> ")
            chat.send(line + "\n")
            chat.until(r"\(system prompt: one\)\s+> ")
            chat.send("/exit\n")
            assert chat.status() == 0


def test_a_terminating_signal_ends_it(file, tmp_path):
    with terminal(tmp_path, file) as chat:
        chat.until("> ")
        os.kill(chat.pid, signal.SIGTERM)
        chat.until("terminated")
        assert chat.status() == 128 + signal.SIGTERM


# Notes that signals came, as the C handler does, but interrupts no wait: as if they had come just before it.
UNHEARD = """
import _thread, builtins, signal, threading, time
from halfbyte.runtime.cli import main
read, missed = builtins.input, [signal.SIGINT, signal.SIGTERM]
def after(prompt):
    number = missed.pop(0)
    threading.Thread(target=lambda: (time.sleep(0.5), _thread.interrupt_main(number)), daemon=True).start()
    return read(prompt)
builtins.input = after
raise SystemExit(main())
"""


def test_a_signal_just_before_the_wait_for_a_key_is_seen(file, tmp_path):
    with terminal(tmp_path, file, main=UNHEARD) as chat:
        chat.until(r"\(/exit or Ctrl-D ends the chat\)\s+> ")
        chat.until("terminated")
        assert chat.status() == 128 + signal.SIGTERM


def test_an_answer_cannot_steer_the_terminal(capsys):
    from halfbyte.runtime.cli.chat import Screen

    screen = Screen(drawn=True)
    for thought, text in ((True, " a\x1b[31m"), (False, "\n\nb\x9b2J\x07\tc\nd \u200d e")):
        screen.show(thought, text)
    screen.end()
    assert capsys.readouterr().out == "\x1b[2ma[31m\x1b[0m\nb2J\tc\nd \u200d e\n"


def test_the_command_itself(file):
    command = [sys.executable, "-c", MAIN, "chat", str(file), "-n", "4", "--temp", "0"]
    done = subprocess.run(command, input="once\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("\n") and "cut off after 4" in done.stderr
