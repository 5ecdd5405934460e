"""Arguments that several commands share, and a parser whose errors are one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from halfbyte.formats.errors import UsageError

MAX_THREADS = 1024


class Parser(argparse.ArgumentParser):
    """argparse, with errors raised as UsageError instead of printed below a usage text."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"must be {limits}, not {value}")
        return value

    return parse


def number(text: str) -> float:
    """A parser of numbers; their range is checked where they are used."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def add_file(parser: argparse.ArgumentParser, **options: Any) -> None:
    """The model: `file`, which `main` makes a path."""
    parser.add_argument("file", help="a .hb file, or the name of a pulled model", **options)


def add_draft(parser: argparse.ArgumentParser) -> None:
    """--draft"""
    parser.add_argument(
        "--draft",
        metavar="FILE",
        help="a smaller model of the same tokenizer, which guesses: the same answer, sooner where it guesses well",
    )


def add_backend(parser: argparse.ArgumentParser, *threads: str) -> None:
    """--backend and --threads (with further spellings of it)."""
    parser.add_argument(
        "--backend", metavar="NAME", help="native, jit, reference or cuda (default: the best one here)"
    )
    parser.add_argument(
        *threads,
        "--threads",
        type=whole(1, MAX_THREADS),
        metavar="N",
        help="default: all processors this process may use",
    )


def add_kv(parser: argparse.ArgumentParser) -> None:
    """--kv"""
    parser.add_argument(
        "--kv",
        default="auto",
        metavar="MODE",
        help="stored keys and values: auto, f32, f16, k8v8, k8v4, k4v4, tq4, tq3.5, tq3, tq3-qjl, tq2.5 or tq2",
    )


def add_policy(parser: argparse.ArgumentParser, default: str) -> None:
    """--policy"""
    parser.add_argument(
        "--policy",
        metavar="NAME",
        help=f"arithmetic: f32 or i8g32; reference and cuda also bf16, f8 (default: {default})",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json"""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
