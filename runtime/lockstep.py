"""Lockstep comparison: a backend against the reference, record by record, on the same inputs.

Before every record the backend's input slots and caches are set to the reference's, so errors do not
add up and the record that is wrong is the one that is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from halfbyte.formats import encodings
from halfbyte.formats.container import File
from halfbyte.formats.ops import BY_CODE
from halfbyte.runtime.backends import backend_class
from halfbyte.runtime.backends.backend import GPU_POLICIES, Backend, Step, operands
from halfbyte.runtime.backends.reference import Reference
from halfbyte.runtime.kv import KV

ROWS = (1, 2, 3, 8, 33)  # rows of the steps that are compared
MORE_ROWS = (33, 1)  # and of those beyond the first page, which packed modes store in another way

# Largest allowed difference, relative to the largest magnitude of the row. Elementwise ops and
# integer dots differ by a few roundings; float sums of K terms by about sqrt(K) roundings.
TOLERANCE = {"linear": 1e-5, "attend": 1e-5, "rmsnorm": 2e-6, "layernorm": 4e-6}
ELEMENTWISE = 1e-6
PACKED_ATTEND = 2.0**-6  # weights of a page may be rounded to 127 steps of the largest (SPEC.md section 10.5)
BF16 = 2.0**-8  # results are rounded to bf16, and sums in another order may round the other way
INTEGER_DOT = 2.0**-22  # exact sums: only the last rounding of an emulated fma can differ


@dataclass
class Outcome:
    """The worst case of one op (and, for matrices, one encoding) over all records and steps."""

    op: str
    encoding: str
    records: int
    worst: float  # max |difference| / max |row of the reference|
    tolerance: float
    where: int  # the record of the worst case
    ok: bool

    def as_dict(self) -> dict[str, object]:
        """For --json."""
        return asdict(self)


def lockstep(
    file: File,
    backend: str,
    policy: str,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    kv: str = "f32",
    against: Backend | None = None,
    by_record: dict[int, float] | None = None,
    rows_of: Sequence[int] = ROWS,
) -> list[Outcome]:
    """Compare on seeded random token ids, for steps of `rows_of` rows in sequence, or beyond the first page.

    Returns one outcome an (op, encoding), in order of first appearance. progress: called before every
    record with (op, records done, records in all). against: what to compare with, by default the reference under
    the same policy; by_record: gets the worst error of every record.
    """
    reference = against or Reference(file, policy)
    other = backend_class(backend)(file, policy, threads)
    rng = np.random.default_rng(seed)
    vocab, context = int(file.metadata["model.vocab_size"]), int(file.metadata["model.context_length"])  # type: ignore[arg-type]
    kvs = KV(file.caches, kv), KV(file.caches, kv)
    found: dict[tuple[str, str], Outcome] = {}
    position = 0
    for rows in (*rows_of, *MORE_ROWS) if kvs[0].modes and kvs[0].modes[0].packed else rows_of:
        if position + rows > context:
            break
        ids = rng.integers(0, vocab, rows).astype(np.int32)
        positions = np.arange(position, position + rows, dtype=np.int32)
        steps = []
        for caches in kvs:
            caches.reserve(position + rows)
            steps.append(
                Step(ids, positions, np.zeros(rows, np.int32), np.arange(rows, dtype=np.int32), [caches])
            )
        _step(file, reference, other, steps[0], steps[1], found, policy, progress, by_record)
        position += rows
    return list(found.values())


def _step(
    file: File,
    reference: Backend,
    other: Backend,
    ours: Step,
    theirs: Step,
    found: dict[tuple[str, str], Outcome],
    policy: str,
    progress: Callable[[str, int, int], None] | None,
    by_record: dict[int, float] | None,
) -> None:
    reference.begin(ours)
    other.begin(theirs)
    for i, record in enumerate(file.program):
        op = BY_CODE[int(record["code"])]
        if progress:
            progress(op.name, sum(o.records for o in found.values()), len(ROWS) * len(file.program))
        for s in operands(record, "in"):
            if s is not None:
                other.slot(s, theirs)[:] = reference.slot(s, ours)
        reference.run_range(ours, i, i + 1)
        other.run_range(theirs, i, i + 1)
        if op.name == "kv_put":
            c = int(record["attr"][0])
            start, end = int(ours.positions[0]), int(ours.positions[-1]) + 1
            want, got = (
                np.concatenate([a.reshape(-1) for a in step.kvs[0].read(c, start, end)])[None]
                for step in (ours, theirs)
            )
        else:
            o = int(record["out"][0])
            want, got = reference.slot(o, ours), other.slot(o, theirs)
        matrix = operands(record, "w")[0] if op.name in ("linear", "embed") else None
        encoding = "" if matrix is None else file.tensors[matrix].encoding
        error = relative_error(got, want)
        if by_record is not None:
            by_record[i] = max(error, by_record.get(i, 0.0))
        limit = tolerance(op.name, encoding, policy)
        if op.name == "attend":
            mode = ours.kvs[0].modes[int(record["attr"][0])]
            limit = PACKED_ATTEND if mode.packed else limit
        known = found.setdefault((op.name, encoding), Outcome(op.name, encoding, 0, 0.0, limit, i, True))
        known.records += 1
        if known.worst == known.worst and not error <= known.worst:  # NaN is the worst, and stays
            known.worst, known.where, known.ok = error, i, bool(error <= limit)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """max |got - want| over a row, relative to the row's largest |want|; the worst row. NaN if any is."""
    scale = np.abs(want).max(axis=1, keepdims=True)
    difference = np.abs(got.astype(np.float64) - want.astype(np.float64))
    return float((difference / np.where(scale > 0, scale, 1)).max()) if got.size else 0.0


def tolerance(op: str, encoding: str, policy: str) -> float:
    """The largest relative error that rounding explains."""
    if op in ("embed", "pick", "kv_put", "gather"):
        return 0.0  # copies and exact conversions
    if op == "linear" and policy in GPU_POLICIES:
        return BF16
    if op == "linear" and policy == "i8g32" and encodings.BY_NAME[encoding].is_integer:
        return INTEGER_DOT
    return TOLERANCE.get(op, ELEMENTWISE)
