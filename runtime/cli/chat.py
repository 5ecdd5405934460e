"""Talk with a model. Ctrl-C stops an answer, Ctrl-D ends the chat, /help tells the rest.

A line that ends in a backslash goes on in the next one; a line of three quotes opens a message of several lines, and
another closes it. Without a terminal every message is read from stdin the same way, and stdout has the answers only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.formats.errors import HalfbyteError, UsageError
from halfbyte.runtime.cli.arguments import add_backend, add_draft, add_file, add_kv, add_policy, number, whole
from halfbyte.runtime.cli.terminal import one_line, printable
from halfbyte.runtime.library import home

if TYPE_CHECKING:
    from halfbyte.runtime.dialogue import Dialogue

HELP = "talk with a model in the terminal"
QUOTES = '"""'
HISTORY = 1000  # lines that are kept
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what could steer a terminal
_SWITCH = {"on": True, "off": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `chat`."""
    add_file(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    parser.add_argument("--load", metavar="CHAT", help="go on with a chat that was saved")
    parser.add_argument(
        "-n", "--max-tokens", type=whole(1), default=1024, metavar="N", help="of an answer (default: 1024)"
    )
    parser.add_argument("--temp", type=number, default=0.7, metavar="T", help="0 is greedy (default: 0.7)")
    parser.add_argument("--top-k", type=whole(0), default=0, metavar="K")
    parser.add_argument("--top-p", type=number, default=0.95, metavar="P", help="default: 0.95")
    parser.add_argument("--min-p", type=number, default=0.0, metavar="P")
    parser.add_argument("--repeat-penalty", type=number, default=1.0, metavar="X")
    parser.add_argument(
        "--seed", type=whole(0), metavar="N", help="of the draws (default: another each time)"
    )
    parser.add_argument(
        "--lookup", type=whole(0, 64), default=8, metavar="N", help="guess up to N tokens a step (default: 8)"
    )
    parser.add_argument(
        "--thinking",
        choices=sorted(_SWITCH),
        help="for templates with such a switch (default: the template's)",
    )
    parser.add_argument("--verify", action="store_true", help="check every byte of the file first")
    add_draft(parser)
    add_backend(parser)
    add_kv(parser)
    add_policy(parser, "i8g32")


def run(args: argparse.Namespace) -> int:
    """Load, then answer until the end of the input."""
    from halfbyte.runtime.dialogue import Dialogue
    from halfbyte.runtime.model import load
    from halfbyte.runtime.sampler import Sampling

    options = {"temperature": args.temp, "top_k": args.top_k, "top_p": args.top_p, "min_p": args.min_p}
    options |= {"repetition_penalty": args.repeat_penalty, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    options |= {"seed": args.seed or 0}
    Sampling(**options)
    model = load(args.file, args.backend, args.threads, args.kv, args.policy, args.verify)
    _ = model.tokenizer  # a model without one cannot be spoken to
    draft = None if args.draft is None else load(args.draft, args.backend, args.threads, args.kv, args.policy)
    dialogue = Dialogue(model, args.system, args.max_tokens, options, lookup=args.lookup, draft=draft)
    if args.thinking:
        dialogue.variables["enable_thinking"] = _SWITCH[args.thinking]
    if args.load:
        dialogue.load(Path(args.load))
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 is refused where it is encoded
    chat = Chat(dialogue, args.seed is not None)
    with history() if chat.interactive else contextlib.nullcontext():
        chat.talk()
    return 0


class Chat:
    """The loop: read, obey or answer."""

    def __init__(self, dialogue: Dialogue, seeded: bool):
        self.dialogue, self.seeded = dialogue, seeded
        self.interactive = sys.stdin.isatty()
        self.drawn = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.open = True
        self.reason: str | None = None  # why the last answer ended

    def talk(self) -> None:
        """Until the input ends. In a pipe an error ends it too; on a terminal it is said and the chat goes on."""
        if self.interactive:
            name = self.dialogue.model.file.path.stem
            note(f"{name}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the chat")
        while self.open:
            try:
                text = self.read()
                if text is None:
                    return
                if text.startswith("/") and not text.startswith("//"):
                    self.obey(text)
                elif text.strip():
                    self.answer(text.removeprefix("/") if text.startswith("//") else text)
            except KeyboardInterrupt as stop:
                if not self.interactive or type(stop) is not KeyboardInterrupt:
                    raise
                note("\n(/exit or Ctrl-D ends the chat)")
            except HalfbyteError as error:
                if not self.interactive:
                    raise
                note(f"({one_line(error)})")

    def read(self) -> str | None:
        """The next message, or None at the end of the input."""
        first = self._line("> ")
        if first is None:
            return None
        if first.lstrip().startswith(QUOTES):
            return self._quoted(first.lstrip().removeprefix(QUOTES))
        lines = [first]
        while lines[-1].endswith("\\"):
            more = self._line(". ")
            lines[-1] = lines[-1][:-1]
            if more is None:
                break
            lines.append(more)
        return "\n".join(lines)

    def _quoted(self, first: str) -> str:
        lines = []
        line: str | None = first
        while line is not None:
            if line.rstrip().endswith(QUOTES):
                lines.append(line.rstrip().removesuffix(QUOTES))
                break
            lines.append(line)
            line = self._line(". ")
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str | None:
        if not self.interactive:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        try:
            with woken():
                return input(prompt)
        except EOFError:
            print()
            return None

    def answer(self, text: str) -> None:
        """Stream an answer; an interrupt stops it, a second one without waiting for the step."""
        dialogue, screen = self.dialogue, Screen(self.drawn)
        seed = dialogue.options["seed"] + dialogue.turns if self.seeded else random.getrandbits(63)
        kept, dialogue.options = dialogue.options, {**dialogue.options, "seed": seed}
        turn = dialogue.ask(text)
        self.reason = None
        stopped = False
        try:
            with interrupts(self.interactive) as interrupted:
                while not (stopped := interrupted()):
                    screen.show(*next(turn))
        except StopIteration as done:
            self._ended(done.value)
        except KeyboardInterrupt:
            if self.interactive:
                dialogue.renew()
            raise
        finally:
            dialogue.options = kept
            turn.close()
            screen.end()
        if stopped:
            note("(stopped)")

    def _ended(self, turn: Any) -> None:
        self.reason = turn.generation.finish_reason
        if turn.dropped:
            note(f"(the context is full: the first {turn.dropped} messages were dropped)")
        if self.reason == "length":
            note(f"(cut off after {self.dialogue.max_tokens} tokens: /params max_tokens N allows more)")
        if self.reason == "context":
            note("(cut off: the context is full; /reset starts anew)")
        if not turn.text.strip():
            note("(nothing was answered; the message is forgotten)")

    # ---- commands ---------------------------------------------------------------------------------

    def obey(self, line: str) -> None:
        """Run a command. Raises UsageError for one that does not exist."""
        name, _, rest = line[1:].strip().partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            raise UsageError(f"there is no command /{name}; /help lists them, and // sends a slash")
        command[1](self, rest.strip())

    def help(self, _: str) -> None:
        """List the commands."""
        for name, (about, _act) in COMMANDS.items():
            note(f"/{name:<8} {about}")
        note('A line that ends in \\ goes on in the next; """ opens and closes a longer message.')

    def leave(self, _: str) -> None:
        """End the chat."""
        self.open = False

    def reset(self, _: str) -> None:
        """Forget what was said."""
        self.dialogue.reset()
        note("(a new chat)")

    def system(self, text: str) -> None:
        """Show or set the system prompt."""
        if text:
            self.dialogue.system = "" if text == "-" else text
        note(f"(system prompt: {printable(self.dialogue.system) or 'none'})")

    def save(self, file: str) -> None:
        """Write the chat to a file."""
        if not file:
            raise UsageError("/save needs a file")
        self.dialogue.save(Path(file))
        note(f"(saved {len(self.dialogue.messages)} messages to {printable(file)})")

    def load(self, file: str) -> None:
        """Take a chat from a file."""
        if not file:
            raise UsageError("/load needs a file")
        self.dialogue.load(Path(file))
        note(f"(loaded {len(self.dialogue.messages)} messages)")

    def undo(self, _: str) -> None:
        """Forget the last message and its answer."""
        note(f"(forgotten: {printable(self.dialogue.undo())[:60]})")

    def retry(self, _: str) -> None:
        """Answer the last message again."""
        self.answer(self.dialogue.undo())

    def params(self, text: str) -> None:
        """Show or set how answers are drawn."""
        from halfbyte.runtime.sampler import Sampling

        dialogue = self.dialogue
        name, _, value = text.partition(" ")
        if name in ("max_tokens", "lookup"):
            setattr(dialogue, name, _parsed(name, value, whole(*((1,) if name == "max_tokens" else (0, 64)))))
        elif name == "thinking":
            if value not in _SWITCH:
                raise UsageError("thinking is on or off")
            dialogue.variables["enable_thinking"] = _SWITCH[value]
        elif name in dialogue.options:
            kind: Callable[[str], Any] = whole(0) if name in ("top_k", "seed") else number
            changed = {**dialogue.options, name: _parsed(name, value, kind)}
            Sampling(**changed)
            dialogue.options = changed
            self.seeded = self.seeded or name == "seed"
        elif name:
            raise UsageError(f"there is no parameter {name!r}; /params lists them")
        shown = {**dialogue.options, "max_tokens": dialogue.max_tokens, "lookup": dialogue.lookup}
        shown["seed"] = dialogue.options["seed"] if self.seeded else "another each time"
        thinking = dialogue.variables.get("enable_thinking")
        shown["thinking"] = "as the template has it" if thinking is None else ("off", "on")[thinking]
        for key, now in shown.items():
            note(f"{key:<20} {now}")

    def stats(self, _: str) -> None:
        """Tokens, speed and memory so far."""
        d = self.dialogue
        speed = f" at {d.answer_tokens / d.seconds:.1f} tokens/s" if d.seconds > 0 else ""
        note(f"answers   {d.turns}, {d.answer_tokens} tokens{speed}")
        note(f"prompts   {d.prompt_tokens} tokens, {d.reused_tokens} of them known already")
        note(f"context   {d.session.position} of {d.model.context_length} tokens")


COMMANDS: dict[str, tuple[str, Callable[[Chat, str], None]]] = {
    "help": ("this list", Chat.help),
    "reset": ("forget what was said; the system prompt stays", Chat.reset),
    "undo": ("forget the last message and its answer", Chat.undo),
    "retry": ("answer the last message again", Chat.retry),
    "system": ("[TEXT] show or set the system prompt; - removes it", Chat.system),
    "params": ("[NAME VALUE] show or set how answers are drawn", Chat.params),
    "save": ("FILE write the chat", Chat.save),
    "load": ("FILE take up a chat", Chat.load),
    "stats": ("tokens and speed so far", Chat.stats),
    "exit": ("end the chat, as Ctrl-D does", Chat.leave),
    "quit": ("the same", Chat.leave),
}


class Screen:
    """Answers on stdout: thoughts dimmed on a terminal, left out elsewhere; nothing can steer a terminal."""

    def __init__(self, drawn: bool):
        self.drawn = drawn
        self._dim = self._any = False
        self._last = "\n"

    def show(self, thought: bool, text: str) -> None:
        """A piece."""
        if not text or (thought and not self.drawn):
            return
        if thought is not self._dim:
            self._out("\x1b[2m" if thought else "\x1b[0m\n")
            self._dim, self._any = thought, False
        if not self._any:
            text = text.lstrip()
        if text:
            self._any, self._last = True, text[-1]
            self._out(_CONTROL.sub("", text) if self.drawn else text)

    def end(self) -> None:
        """End the line, with the terminal as it was."""
        self._out(("\x1b[0m" if self._dim else "") + ("" if self._last == "\n" else "\n"))
        self._dim = False

    def _out(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def note(text: str) -> None:
    """What is not an answer goes to stderr."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def interrupts(interactive: bool) -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag, which is what is given, so that a step ends in order; a second one interrupts at once."""
    pressed = False

    def press(_number: int, _frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if not interactive:
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def woken() -> Iterator[None]:
    """Five times a second, while a line is typed: a signal that comes just before the line editor's wait is otherwise
    seen with the next key only."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Line editing, with the lines of earlier chats."""
    try:
        import readline

        from halfbyte.runtime.dialogue import history_path

        path = history_path(home())
        readline.read_history_file(path)
        readline.set_history_length(HISTORY)
    except (ImportError, OSError):  # no such library here, or no folder to write to
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)


def _parsed(name: str, text: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{name}: {error}") from None
