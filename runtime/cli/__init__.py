"""The `halfbyte` command: one module a subcommand, each with HELP, add_arguments(parser) and run(args) -> status.

Exit status: 0 done; 1 `check` found a difference; 2 an error the user or the machine caused, said in one
line; 70 a bug; 128 + n stopped by signal n. Command modules import what is heavy when they run, so that
`--help` is immediate.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

import halfbyte
from halfbyte.formats.errors import HalfbyteError, KvWarning
from halfbyte.runtime.cli.arguments import Parser
from halfbyte.runtime.cli.terminal import one_line
from halfbyte.runtime.library import find

COMMANDS = (
    *("pull", "list", "rm", "convert", "train-qat", "report"),
    *("run", "chat", "serve"),
    *("info", "explain", "check", "parity", "replay", "eval", "kv", "bench", "fit", "demo", "doctor"),
)
ERROR, BUG = 2, 70


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, raised where an interrupt would be, so that half-written files are removed alike."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: sys.argv) and return its exit status."""
    try:
        return _main(argv)
    except Terminated as stop:  # while handlers changed, or while another signal was answered
        return _fail("terminated", 128 + stop.number, "")
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT, "")
    finally:
        if argv is None:  # the process ends: from here on a signal does so at once, without a traceback
            _let_go()


def _main(argv: Sequence[str] | None) -> int:
    with _signals(), warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")  # NumPy's notes on overflow are not for users
            warnings.simplefilter("always", KvWarning)
            warnings.showwarning = _warn
        try:
            for stream in (sys.stdout, sys.stderr):  # text that the terminal's encoding lacks is escaped
                if hasattr(stream, "reconfigure"):
                    stream.reconfigure(errors="backslashreplace")
            status = _run(argv)
            sys.stdout.flush()
            return status
        except HalfbyteError as error:
            return _fail(one_line(error))
        except Terminated as stop:
            return _fail("terminated", 128 + stop.number, "")
        except KeyboardInterrupt:
            return _fail("interrupted", 128 + signal.SIGINT, "")
        except BrokenPipeError:  # the reader of a pipe has seen enough
            _drop_output()
            return 128 + getattr(signal, "SIGPIPE", 13)
        except MemoryError:
            return _fail("out of memory")
        except OSError as error:
            _drop_output()
            where = f"{error.filename}: " if error.filename is not None else ""
            return _fail(one_line(f"{where}{error.strerror or error}"))
        except Exception:
            traceback.print_exc()
            return _fail("this is a bug in halfbyte; please report it with the lines above", BUG, "")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = Parser(prog="halfbyte", description="Convert trained models to one small file, and run them.")
    top.add_argument("--version", action="version", version=f"halfbyte {halfbyte.__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name in COMMANDS:
        module = importlib.import_module(f"halfbyte.runtime.cli.{name.replace('-', '_')}")
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


def _run(argv: Sequence[str] | None) -> int:
    top = parser()
    try:
        args = top.parse_args(argv)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    if args.command is None:
        top.print_help(sys.stderr)
        return ERROR
    for name in ("file", "draft"):  # of a model: a path, or the name of one that was pulled
        if getattr(args, name, None) is not None:
            setattr(args, name, find(getattr(args, name)))
    return args.run(args)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"halfbyte: warning: {one_line(str(message))}", file=sys.stderr, flush=True)


def _fail(message: str, status: int = ERROR, kind: str = "error: ") -> int:
    # Whatever was streamed so far comes before the message; a stdout that is broken too has nothing to say.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(f"halfbyte: {kind}{message}", file=sys.stderr, flush=True)
    return status


def _drop_output() -> None:
    """Keep the interpreter from failing a second time on what is left in stdout's buffer."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError:
        pass


def _let_go() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `Terminated` for the duration, unless someone else handles them."""

    def stop(number: int, _frame: object) -> None:
        raise Terminated(number)

    previous = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            with contextlib.suppress(ValueError):  # not in the main thread
                previous[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
