"""Annotations: optional sections that say something about a file and change nothing about how it runs.

Each is one JSON object in UTF-8 that lies after DATA, so that it can be added or replaced without touching what the
program needs. Normative with SPEC.md section 13.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from . import container, ops
from .container import SECTIONS
from .errors import FormatError, HalfbyteError
from .writer import TensorSpec, head, layout, lowest_minor

MAX_BYTES = 1 << 24  # of one annotation
COPY = 1 << 22  # bytes of DATA copied at once


def encode(value: dict[str, Any]) -> bytes:
    """The canonical JSON of an object: sorted keys, no spaces. ValueError for NaN, infinity or too many bytes."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    data = text.encode()
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes are too many for an annotation")
    return data


def decode(kind: str, data: bytes) -> dict[str, Any]:
    """The object in a section's bytes. Raises FormatError for anything that is not one JSON object."""

    def bad(why: str) -> FormatError:
        return FormatError(f"section {kind}: {why}")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            raise bad("a key appears twice")
        return out

    def constant(name: str) -> NoReturn:
        raise bad(f"{name} is not a number of JSON")

    def real(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise bad("a number is out of range")
        return value

    if len(data) > MAX_BYTES:
        raise bad(f"{len(data)} bytes are too many")
    try:
        value = json.loads(data.decode(), object_pairs_hook=pairs, parse_constant=constant, parse_float=real)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, an endless integer, brackets without end
        raise bad("it is not JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise bad("it is not an object")
    return value


def read(file: container.File, kind: str) -> dict[str, Any] | None:
    """An annotation of a file, None when it has none. Raises FormatError when it is damaged."""
    if not file.sections.get(kind, (0, 0))[1]:
        return None
    if file.sections[kind][1] > MAX_BYTES:
        raise FormatError(f"{file.path}: section {kind}: {file.sections[kind][1]} bytes are too many")
    data = file.section(kind)
    try:
        return decode(kind, data)
    except FormatError as error:
        raise FormatError(f"{file.path}: {error}") from None


def rewrite_section(path: str | os.PathLike[str], kind: str, data: bytes | None) -> None:
    """Replace, add or (None) remove the annotation `kind` of a file: a copy is written aside and renamed.

    Everything else keeps its bytes and digests; sections unknown here stay. Raises FormatError for a damaged file
    and HalfbyteError when it cannot be written; the file is then as it was.
    """
    if not SECTIONS[kind].annotation:
        raise ValueError(f"{kind} is not an annotation")
    file = container.File(path)
    order = [*SECTIONS, *(k for k in file.sections if k not in SECTIONS)]
    blobs = {k: None if k == "DATA" else file.section(k) for k in order if k in file.sections}
    flags = {bytes(s["kind"]).decode(): int(s["flags"]) for s in _table(file)}
    flags[kind] = 0
    blobs.pop(kind, None)
    if data is not None:
        blobs = {k: data if k == kind else blobs[k] for k in order if k in blobs or k == kind}
    base, size, data_digest = file.sections["DATA"]
    offsets = layout((k, size if b is None else len(b)) for k, b in blobs.items())
    last = list(blobs)[-1]
    length = offsets[last] + (size if blobs[last] is None else len(blobs[last] or b""))
    codes = {int(c) for c in file.program["code"]}
    specs = [TensorSpec(t.name, t.encoding, t.shape, t.group, t.scale_type) for t in file.tensors]
    minor = lowest_minor([ops.BY_CODE[c] for c in codes], specs, blobs)
    newer = file.version[1] if file.version[1] > container.VERSION[1] else 0
    rows = [
        (k, flags[k], offsets[k], *((size, data_digest) if b is None else (len(b), container.sha256(b))))
        for k, b in blobs.items()
    ]
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as f:
            f.write(head(max(minor, newer), length, rows))
            for k, b in blobs.items():
                f.seek(offsets[k])
                if b is not None:
                    f.write(b)
                    continue
                for start in range(base, base + size, COPY):
                    f.write(file.bytes[start : min(start + COPY, base + size)].data)
            f.truncate(length)
            f.flush()
            os.fsync(f.fileno())
        with contextlib.suppress(OSError):
            os.chmod(partial, os.stat(path).st_mode & 0o777)
        os.replace(partial, path)
    except OSError as error:
        raise HalfbyteError(f"{path}: cannot write: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _table(file: container.File) -> np.ndarray:
    return file.bytes[64 : 64 + 64 * len(file.sections)].view(container.SECTION_DTYPE)
