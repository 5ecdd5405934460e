"""The Numba backend against the reference: every encoding, tile remainders, threads, chunks, attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from halfbyte.formats import encodings, program, tiles
from halfbyte.formats.container import File
from halfbyte.formats.writer import TensorSpec, Writer
from halfbyte.runtime.backends.backend import Step
from halfbyte.runtime.backends.jit import Jit
from halfbyte.runtime.backends.reference import Reference

GROUPED = ("i8", "i4", "a8", "a4", "z8", "z4")


class Matrix:
    """A random matrix of an encoding: planes ready for the writer."""

    def __init__(self, rng, name, encoding, rows, cols, group=0, scale_type="", exact=False):
        self.spec = TensorSpec(name, encoding, (rows, cols), group, scale_type).resolved()
        e, spec = encodings.BY_NAME[encoding], self.spec
        scale = 1.0 / np.sqrt(cols)
        if e.is_float:
            values = rng.standard_normal((rows, cols), np.float32) * np.float32(scale)
            self.planes = {"values": tiles.pack_groups(encodings.float_to_bits(values, encoding))}
            return
        n = encodings.group_count(cols, spec.group)
        if e.bits == 4:
            codes = rng.integers(0, 16, (rows, cols)).astype(np.uint8)
        else:
            codes = rng.integers(0, 256, (rows, cols)).astype(np.uint8)
            codes = codes.view(np.int8) if e.signed else codes
        self.planes = {"codes": tiles.pack_codes(codes, e.bits)}

        def floats(low, high):
            v = 2.0 ** rng.integers(-9, -6, (rows, n)) if exact else rng.uniform(low, high, (rows, n))
            return tiles.pack_groups(encodings.float_to_bits(v.astype(np.float32), spec.scale_type))

        if e.row_scale:
            sub = (64 * 2 + rng.integers(0, 2, (rows, n))) if exact else rng.integers(0, 256, (rows, n))
            row = np.full((rows, 1), 200) if exact else rng.integers(180, 210, (rows, 1))
            self.planes["scales"] = tiles.pack_groups(sub.astype(np.uint8))
            self.planes["row"] = tiles.pack_groups(row.astype(np.uint8))
        else:
            self.planes["scales"] = floats(-scale / 64, scale / 64)
        if e.offset == "min":
            self.planes["mins"] = floats(-scale, scale)
        if e.offset == "zero":
            self.planes["zeros"] = tiles.pack_groups(
                rng.integers(0, 17 if e.bits == 4 else 256, (rows, n)).astype(np.uint8)
            )

    def write(self, writer, index):
        """Store every plane."""
        for plane, data in self.planes.items():
            writer.write(index, plane, 0, data)


class Vector:
    """An f32 vector."""

    def __init__(self, name, values):
        self.values = np.asarray(values, np.float32)
        self.spec = TensorSpec(name, "f32", self.values.shape)

    def write(self, writer, index):
        """Store it."""
        writer.write(index, "values", 0, self.values)


def write_file(path: Path, tensors, records, widths, vocab, caches=()) -> File:
    """A `.hb` file; `widths` maps a slot to (width, base, offset, rows)."""
    slots = np.array(widths, program.SLOT_DTYPE)
    meta = {"model.vocab_size": vocab, "model.context_length": 4096}
    with Writer(
        path,
        meta=meta,
        slots=slots,
        caches=np.array(list(caches), program.CACHE_DTYPE),
        program=np.array(records, program.OP_DTYPE),
        tensors=[t.spec for t in tensors],
    ) as writer:
        for i, t in enumerate(tensors):
            t.write(writer, i)
    return File(path)


def linear_file(path: Path, matrices, x, bias=True) -> File:
    """embed (rows of x) -> one linear per matrix -> pick of the last."""
    rows = np.zeros((max(len(x), *(m.spec.shape[0] for m in matrices), 1), x.shape[1]), np.float32)
    rows[: len(x)] = x  # a table has a row for every id of the vocabulary
    table = Matrix(np.random.default_rng(0), "x", "f32", *rows.shape)
    table.planes["values"] = tiles.pack_groups(rows)
    tensors, records = [table], [program.record("embed", out=[0], weights=[0])]
    widths = [(x.shape[1], 0, 0, program.TOKENS)]
    for i, m in enumerate(matrices):
        rows = m.spec.shape[0]
        tensors += [m, Vector(f"b{i}", np.linspace(-1, 1, rows) if bias else np.zeros(rows))]
        records.append(program.record("linear", out=[i + 1], ins=[0], weights=[2 * i + 1, 2 * i + 2]))
        widths.append((rows, i + 1, 0, program.TOKENS))
    last = len(matrices)
    records.append(program.record("pick", out=[last + 1], ins=[last]))
    widths.append((matrices[-1].spec.shape[0], last + 1, 0, program.PICKS))
    return write_file(path, tensors, records, widths, matrices[-1].spec.shape[0])


def step_of(ids, positions=None, sessions=None, picks=None, kvs=()):
    """A step of one session over `ids`."""
    T = len(ids)
    return Step(
        np.asarray(ids, np.int32),
        np.asarray(np.arange(T) if positions is None else positions, np.int32),
        np.asarray(np.zeros(T) if sessions is None else sessions, np.int32),
        np.asarray([T - 1] if picks is None else picks, np.int32),
        list(kvs),
    )


def all_matrices(rng, rows, cols, exact=False):
    """One matrix per encoding, with varied groups and scale types."""
    out = [Matrix(rng, e, e, rows, cols, exact=exact) for e in ("f32", "f16", "bf16", "q8", "q4")]
    choices = [(0, "f32"), (32, "f16"), (64, "bf16"), (16, "f16"), (4, "f32"), (8, "bf16")]
    for i, e in enumerate(GROUPED):
        for group, kind in (choices[i % 6], choices[(i + 3) % 6]):
            out.append(Matrix(rng, f"{e}.{group}", e, rows, cols, group, kind, exact))
    return out


@pytest.fixture(params=["native", "scalar"])
def isa(request, monkeypatch):
    """This CPU's best instructions and the generic code."""
    if request.param == "scalar":
        monkeypatch.setenv("HALFBYTE_ISA", "scalar")
    else:
        monkeypatch.delenv("HALFBYTE_ISA", raising=False)
    return request.param


def run_slots(backend, step):
    """Every slot after the step."""
    backend.run(step)
    return [backend.slot(i, step).copy() for i in range(len(backend.file.slots))]


@pytest.mark.parametrize("rows,cols", [(37, 104)])
@pytest.mark.parametrize("policy", ["i8g32", "f32"])
def test_linear_matches_reference(tmp_path, policy, rows, cols, isa):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((33, cols)).astype(np.float32)
    x[3, 32:64] = 0
    matrices = all_matrices(rng, rows, cols)
    file = linear_file(tmp_path / "m.hb", matrices, x)
    jit, reference = Jit(file, policy, 1), Reference(file, policy)
    for T in (1, 2, 3, 8, 33):
        step = step_of(np.arange(T))
        ours, theirs = run_slots(jit, step), run_slots(reference, step)
        for m, a, b in zip(matrices, ours[1:], theirs[1:]):
            bound = 2e-6 * max(1.0, float(np.abs(b).max()))
            np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=f"{m.spec} T={T}")
        np.testing.assert_array_equal(ours[0], theirs[0])
