"""A log of answers that anyone with the model can check: who said what, from which numbers, bit for bit.

One JSON object a line. `model` is the digest of the file, `state` the SHA-256 of the session after the answer (its
tokens and every key and value, as a session file holds them: runtime/session.py), so that equal states mean equal
arithmetic and not only equal tokens. `chain`, the last key, is the SHA-256 of the chain of the line before (64 zeros
for the first) followed by the line's own bytes up to `,"chain"`: a line that is changed, moved or taken out breaks it.
What is cut off at the end it cannot show; keep the last chain elsewhere for that. native/examples/assistant.c writes
the same lines.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from halfbyte.formats.errors import HalfbyteError, UsageError
from halfbyte.runtime.generate import Generation
from halfbyte.runtime.model import Model
from halfbyte.runtime.sampler import Sampling
from halfbyte.runtime.session import Session

VERSION = 1
START = "0" * 64
_MARK = b',"chain":"'
_MOST = 1 << 26  # bytes of a line


def describe(generation: Generation, answer: str = "") -> dict[str, Any]:
    """What a line says of a finished answer to a fresh session. Raises UsageError for any other."""
    model, sampling = generation.model, generation.sampler.sampling
    if generation.finish_reason is None:
        raise UsageError("only finished answers can be logged")
    defaults = Sampling()
    how = {
        f.name: getattr(sampling, f.name)
        for f in fields(Sampling)
        if getattr(sampling, f.name) != getattr(defaults, f.name)
    }
    facts = model.backend.describe()
    return {
        "version": VERSION, "model": model.file.digest.hex(), "file": str(model.file.path),
        "policy": model.policy, "kv": generation.session.kv.mode, "backend": facts["backend"],
        "isa": facts.get("isa", ""), "sampling": how, "stop": list(generation.stop),
        "max_tokens": generation.max_tokens, "prompt": generation.prompt_ids, "answer": generation.ids,
        "text": answer, "finish": generation.finish_reason, "state": state(generation.session),
    }  # fmt: skip


def state(session: Session) -> str:
    """The digest at the end of the session's file, in hexadecimal."""
    return session.encode()[-32:].hex()


def append(path: str | os.PathLike[str], record: dict[str, Any]) -> str:
    """Add a line to a log, which is made where there is none; the line's chain.

    Raises HalfbyteError for a log that cannot be read or written, or whose last line is not whole.
    """
    path = Path(path)
    try:
        with open(path, "a+b") as f:
            last = _last_line(f, path)
            before = START if last is None else _split(last, path, "its last line")[1]
            body = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()[
                :-1
            ]
            chain = hashlib.sha256(before.encode() + body).hexdigest()
            f.write(body + _MARK + chain.encode() + b'"}\n')
    except OSError as error:
        raise HalfbyteError(f"{path}: {error.strerror}") from None
    return chain


def _last_line(f: Any, path: Path) -> bytes | None:
    end, size = f.seek(0, os.SEEK_END), 1 << 12
    while end:
        f.seek(max(0, end - size))
        tail = f.read()
        if not tail.endswith(b"\n"):
            raise HalfbyteError(f"{path}: its last line is not whole")
        at = tail.rfind(b"\n", 0, len(tail) - 1)
        if at >= 0 or size >= end:
            return tail[at + 1 : -1]
        size *= 8
    return None


def _split(line: bytes, path: Path, where: str) -> tuple[bytes, str]:
    """What the chain covers, and the chain."""
    body, mark, rest = line.rpartition(_MARK)
    if not mark or len(rest) != 66 or rest[64:] != b'"}':
        raise HalfbyteError(f"{path}: {where} is not one of an answer log")
    return body, rest[:64].decode("ascii", "replace")


@dataclass
class Outcome:
    """One line: `same` when tokens and state are; `why` says what differs, or what the machines differ in."""

    line: int
    same: bool
    tokens: int
    why: str = ""


def replay(
    path: str | os.PathLike[str],
    load: Callable[[dict[str, Any]], Model],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Outcome], str]:
    """Answer every line of a log again; the outcomes, and the last chain.

    load(record): the model of a line, whose digest is compared. progress: lines done, lines in all.
    Raises HalfbyteError for what is not an answer log.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise HalfbyteError(f"{path}: {error.strerror}") from None
    if lines[-1]:
        raise HalfbyteError(f"{path}: its last line is not whole")
    out, before = list[Outcome](), START
    for number, line in enumerate(lines[:-1], 1):
        body, chain = _split(line, path, f"line {number}")
        if hashlib.sha256(before.encode() + body).hexdigest() != chain:
            out.append(
                Outcome(
                    number, False, 0, "the line, or one before it, was changed (its chain does not match)"
                )
            )
        else:
            out.append(_replay_line(number, _record(body, path, number), load))
        before = chain
        if progress:
            progress(number, len(lines) - 1)
    return out, before


def _record(body: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads((body + b"}").decode())
        if record["version"] != VERSION:
            raise HalfbyteError(f"{path}: line {number} is of version {record['version']}, not {VERSION}")
        ids = [*record["prompt"], *record["answer"]]
        if not all(isinstance(i, int) for i in ids) or not isinstance(record["sampling"], dict):
            raise ValueError
        return {"max_tokens": len(record["answer"]), "stop": [], **record}
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise HalfbyteError(f"{path}: line {number} is not one of an answer log") from None


def _replay_line(number: int, record: dict[str, Any], load: Callable[[dict[str, Any]], Model]) -> Outcome:
    from halfbyte.runtime.generate import generate

    model = load(record)
    if model.file.digest.hex() != record["model"]:
        return Outcome(number, False, 0, "the model is another file than the one that answered")
    again = generate(
        model, record["prompt"], max_tokens=record["max_tokens"], stop=record["stop"], **record["sampling"]
    )
    for _ in again:
        pass
    want = record["answer"]
    if again.ids != want:
        at = next(
            (i for i, (a, b) in enumerate(zip(again.ids, want)) if a != b), min(len(again.ids), len(want))
        )
        return Outcome(number, False, at, f"the answer differs from token {at} on")
    if state(again.session) == record["state"]:
        return Outcome(number, True, len(want))
    isa = str(model.backend.describe().get("isa", ""))
    if (model.backend.name, isa) != (record["backend"], record["isa"]):
        here, there = (
            f"{b} {i}".strip() for b, i in ((model.backend.name, isa), (record["backend"], record["isa"]))
        )
        return Outcome(number, True, len(want), f"the same tokens; other roundings on {here} than on {there}")
    return Outcome(number, False, len(want), "the same tokens from other keys and values")
