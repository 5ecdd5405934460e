"""Every backend against the reference, op by op: each case of `cases.py` under each arithmetic policy.

Tolerances, and why they are enough and no more:
  exact    the same bits: copies, and sums whose every partial result is representable
  ulp      4 units in the last place of the row's largest value, or 1e-6 relative: float32 elementary
           functions and reductions of one row against float64 ones
  integer  i8g32: integer dots are exact and the float sums are in a fixed order, so 4 ulp of the row's
           largest sum (the reference's fma rounds twice where a real one rounds once)
  sum      1e-5 of sum |x||w|: the error bound of a float32 sum of up to 160 terms, in any order
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from cases import ALL, FLOATING, Case

from halfbyte.formats.container import File
from halfbyte.formats.ops import BY_CODE
from halfbyte.runtime.backends import backend_class
from halfbyte.runtime.backends.backend import Backend, Step
from halfbyte.runtime.backends.reference import Reference
from halfbyte.runtime.kv import KV

TOKENS = (1, 2, 3, 8, 33)
FIRST_ID = 3


@pytest.fixture(scope="session", params=["jit", "native"])
def backend(request: pytest.FixtureRequest) -> type[Backend]:
    """The class of a backend that can run here."""
    name = request.param
    try:
        kind = backend_class(name)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"backend {name} is not there: {error}")
    if name == "native":
        from halfbyte.runtime.backends import native

        if not native.library_path():
            pytest.skip("the native library is not built")
    return kind


@pytest.fixture(scope="session")
def open_case(tmp_path_factory: pytest.TempPathFactory):
    """Case -> its file, written once."""
    folder: Path = tmp_path_factory.mktemp("ops")

    @cache
    def open_(case: Case) -> tuple[File, int]:
        tiny = case.tiny()
        return tiny.write(folder / f"{case}.hb"), tiny.tested

    return open_


@dataclass
class Timeline:
    """A backend with key/value arrays of its own."""

    backend: Backend
    kvs: list[KV]

    def step(self, ids, positions, sessions, picks) -> Step:
        """A step over these arrays, its positions reserved."""
        arrays = [np.asarray(a, np.int32) for a in (ids, positions, sessions, picks)]
        for p, s in zip(arrays[1], arrays[2]):
            if len(self.backend.file.caches):
                self.kvs[s].reserve(int(p) + 1)
        return Step(*arrays, self.kvs)


def timeline(
    kind: type[Backend], file: File, policy: str, sessions: int = 1, mode: str = "f32", threads=1
) -> Timeline:
    return Timeline(kind(file, policy, threads), [KV(file.caches, mode) for _ in range(sessions)])


def inputs(case: Case, T: int) -> tuple:
    """ids, positions, sessions, picks: ids out of order, picks reversed (or few, for picked rows)."""
    ids = FIRST_ID + (np.arange(T) * 7) % 41
    start = 100000 if case.op == "rope" else 0
    picks = sorted({T - 1, 0, T // 2}, reverse=True) if case.variant == "picked" else np.arange(T)[::-1]
    return ids, start + np.arange(T), np.zeros(T), picks


def magnitude(file: File, tested: int, reference: Backend, step: Step) -> np.ndarray | None:
    """Largest sum |x||w| of each row, for the record under test when it is linear."""
    record = file.program[tested]
    if BY_CODE[int(record["code"])].name != "linear":
        return None
    x = np.abs(reference.slot(int(record["in"][0]), step))
    return (x @ np.abs(file.dequantize(file.tensors[int(record["w"][0])])).T).max(axis=1)


def compare(case: Case, policy: str, got: np.ndarray, want: np.ndarray, size: np.ndarray | None) -> None:
    """Assert that two results [rows, columns] agree as the case demands."""
    assert got.shape == want.shape and np.isfinite(want).all()
    tolerance = case.tolerance
    if tolerance == "exact" and (policy == "i8g32" or case.op != "linear"):
        np.testing.assert_array_equal(got.view(np.uint32) & 0x7FFFFFFF, want.view(np.uint32) & 0x7FFFFFFF)
        np.testing.assert_array_equal(got, want)
        return
    error = np.abs(got.astype(np.float64) - want)
    row = np.abs(want).max(axis=1, initial=0)
    if tolerance == "ulp":
        allowed = np.maximum(4 * np.spacing(row)[:, None], 1e-6 * np.abs(want))
    elif tolerance == "sum":
        allowed = 1e-5 * np.linalg.norm(want, axis=1)[:, None]
    else:
        assert size is not None
        is_integer = policy == "i8g32" and case.covers not in FLOATING
        allowed = (4 * np.spacing(size.astype(np.float32)) if is_integer else 1e-5 * size)[:, None]
    worst = np.unravel_index(np.argmax(error - allowed), error.shape)
    assert (error <= allowed).all(), f"at {worst}: {got[worst]!r}, reference {want[worst]!r}"


def by_pick(size: np.ndarray | None, picks: np.ndarray, case: Case) -> np.ndarray | None:
    """Row sizes in the order of the logits."""
    return size if size is None or case.variant == "picked" else size[picks]


def policies(cases: list[Case]) -> list[tuple[Case, str]]:
    """Each case under i8g32, and LINEAR, the one op that the policy concerns, also under f32."""
    return [(c, "i8g32") for c in cases] + [(c, "f32") for c in cases if c.op == "linear"]


ROW_CASES = policies([c for c in ALL if c.op not in ("kv_put", "attend")])


@pytest.fixture(scope="session")
def law(open_case):
    """(case, policy) -> for each number of rows, the reference's result and row sizes; computed once."""

    @cache
    def results(case: Case, policy: str) -> list[tuple[np.ndarray, np.ndarray | None]]:
        file, tested = open_case(case)
        run = timeline(Reference, file, policy)
        out = []
        for T in TOKENS:
            step = run.step(*inputs(case, T))
            want = run.backend.run(step)
            out.append((want, by_pick(magnitude(file, tested, run.backend, step), step.picks, case)))
        return out

    return results


@pytest.mark.parametrize(("case", "policy"), ROW_CASES, ids=str)
def test_op(case: Case, policy: str, backend: type[Backend], open_case, law) -> None:
    """The result of the op, for several numbers of rows."""
    mine = timeline(backend, open_case(case)[0], policy)
    for T, (want, size) in zip(TOKENS, law(case, policy)):
        got = mine.backend.run(mine.step(*inputs(case, T)))
        compare(case, policy, got, want, size)


@pytest.mark.parametrize("case", [c for c in ALL if c.variant == "view"][::3], ids=str)
def test_lockstep_keeps_every_slot(case: Case, backend: type[Backend], open_case) -> None:
    """Record by record (as `halfbyte check` runs), slots that a record does not write keep their bits."""
    file, _ = open_case(case)
    mine = timeline(backend, file, "i8g32", mode="f32")
    step = mine.step(*inputs(case, 3))
    mine.backend.begin(step)
    bases = [i for i, s in enumerate(file.slots) if int(s["base"]) == i]
    for index, record in enumerate(file.program):
        before = {b: mine.backend.slot(b, step).copy() for b in bases}
        mine.backend.run_range(step, index, index + 1)
        outs = [int(o) for o in record["out"] if int(o) < len(file.slots)]
        for b in bases:
            same = np.ones(int(file.slots[b]["width"]), bool)
            for o in (file.slots[o] for o in outs):
                if int(o["base"]) == b:
                    same[int(o["offset"]) : int(o["offset"]) + int(o["width"])] = False
            after = mine.backend.slot(b, step)
            np.testing.assert_array_equal(
                after[:, same], before[b][:, same], err_msg=f"record {index} slot {b}"
            )


# Two sessions: a prompt of one, a prompt of the other, a mixed step, single tokens of both.
STEPS = [
    ([5, 6, 7, 8, 9], [0, 1, 2, 3, 4], [0] * 5),
    ([11, 12], [0, 1], [1] * 2),
    ([13, 14, 15, 16], [5, 2, 6, 3], [0, 1, 0, 1]),
    ([17], [7], [0]),
    (list(range(3, 36)), list(range(4, 37)), [1] * 33),
    ([18, 19], [37, 8], [1, 0]),
]


SIDES = (
    "f32",
    "f16",
    "k8v8",
    "k4v4",
    "tq4",
    "tq3",
    "tq2",
    "k8vt1",
    "tq3-qjl",
)  # every form of keys and of values


@pytest.mark.parametrize("mode", SIDES)
@pytest.mark.parametrize("case", [c for c in ALL if c.op in ("kv_put", "attend")], ids=str)
def test_cache_op(case: Case, mode: str, backend: type[Backend], open_case) -> None:
    """Several sessions in one step: what is stored is bit-identical, what is read agrees."""
    file, _ = open_case(case)
    law = timeline(Reference, file, "i8g32", 2, mode)
    mine = timeline(backend, file, "i8g32", 2, mode)
    for ids, positions, sessions in STEPS:
        picks = np.arange(len(ids))
        want = law.backend.run(law.step(ids, positions, sessions, picks))
        got = mine.backend.run(mine.step(ids, positions, sessions, picks))
        if mode in ("f32", "f16"):
            compare(case, "i8g32", got, want, None)
        else:  # weights may be rounded to 127 steps: 2^-8 of the largest value
            assert np.abs(got - want).max() <= np.abs(want).max() / 64
    for session in range(2):
        for c in range(len(file.caches)):
            for a, b in zip(*(run.kvs[session].pages[c] for run in (mine, law))):
                np.testing.assert_array_equal(a.bytes, b.bytes)


def all_rows(
    kind: type[Backend], case: Case, file: File, policy: str, threads: int, chunk: int
) -> np.ndarray:
    """Results of 33 rows of one session, fed `chunk` at a time."""
    run = timeline(kind, file, policy, 1, "f16", threads)
    out = []
    for a in range(0, 33, chunk):
        rows = np.arange(a, min(a + chunk, 33))
        out.append(run.backend.run(run.step(FIRST_ID + rows, rows, rows * 0, rows - a)))
    return np.concatenate(out)


PROMISED = policies([c for c in ALL if c.variant == "plain" and ".exact" not in c.name])


@pytest.mark.parametrize(("case", "policy"), PROMISED, ids=str)
def test_rows_depend_on_nothing_else(case: Case, policy: str, backend: type[Backend], open_case) -> None:
    """The promise: the same bits for any number of rows in a step and any number of threads."""
    file, _ = open_case(case)
    one = all_rows(backend, case, file, policy, 1, 1)
    for threads, chunk in ((1, 33), (2, 8), (3, 5)):
        np.testing.assert_array_equal(all_rows(backend, case, file, policy, threads, chunk), one)
