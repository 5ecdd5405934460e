"""The Numba backend against the reference: every encoding, tile remainders, threads, chunks, attention."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from halfbyte.formats import encodings, program, tiles
from halfbyte.formats.container import File
from halfbyte.formats.errors import UsageError
from halfbyte.formats.ops import FUNCTIONS
from halfbyte.formats.writer import TensorSpec, Writer
from halfbyte.runtime.backends.backend import Step
from halfbyte.runtime.backends.jit import Jit
from halfbyte.runtime.backends.reference import Reference
from halfbyte.runtime.kv import KV

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
        codes = rng.integers(0, 1 << e.bits, (rows, cols)).astype(np.uint8)
        if not e.is_integer:
            codes &= 0xBF  # 8-bit floats below 2: no infinities
        self.planes = tiles.pack_code_planes(codes.view(np.int8) if e.signed else codes, e.bits)
        if spec.scale_type == encodings.K256:
            blocks = encodings.group_count(cols, encodings.SUPER)
            pairs = (("scales", "super"), ("mins", "supermin"))[: 2 if e.offset == "min" else 1]
            for below, above in pairs:
                self.planes[below] = tiles.pack_groups(rng.integers(0, 256, (rows, n)).astype(np.uint8))
                wide = rng.uniform(scale / 8192, scale / 4096, (rows, blocks)).astype(np.float16)
                self.planes[above] = tiles.pack_groups(wide)
            return

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
            top = 256 if e.bits == 8 else (1 << e.bits) + 1
            self.planes["zeros"] = tiles.pack_groups(rng.integers(0, top, (rows, n)).astype(np.uint8))

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


def all_matrices(rng, rows, cols, isa, exact=False):
    """One matrix per encoding and two of the grouped ones, with varied groups and scale types.

    The generic code differs in the dot and the conversions only: one of each grouped encoding there.
    """
    out = [Matrix(rng, e, e, rows, cols, exact=exact) for e in ("f32", "f16", "bf16", "q8", "q4")]
    choices = [(0, "f32"), (32, "f16"), (64, "bf16"), (16, "f16"), (4, "f32"), (8, "bf16")]
    for i, e in enumerate(GROUPED):
        for group, kind in (choices[i], choices[(i + 3) % 6])[: 1 if isa == "scalar" else 2]:
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


@pytest.mark.parametrize("policy", ["i8g32", "f32"])
def test_linear_matches_reference(tmp_path, policy, isa):
    """Rows and columns that fill neither a panel nor a group; every remainder of the token tiles."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((33, 104)).astype(np.float32)
    x[3, 32:64] = 0
    matrices = all_matrices(rng, 37, 104, isa)
    file = linear_file(tmp_path / "m.hb", matrices, x)
    jit, reference = Jit(file, policy, 1), Reference(file, policy)
    for T in (1, 2, 3, 8, 33):
        step = step_of(np.arange(T))
        ours, theirs = run_slots(jit, step), run_slots(reference, step)
        for m, a, b in zip(matrices, ours[1:], theirs[1:]):
            bound = 2e-6 * max(1.0, float(np.abs(b).max()))
            np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=f"{m.spec} T={T}")
        np.testing.assert_array_equal(ours[0], theirs[0])


def test_integer_parts_are_exact(tmp_path, isa):
    """Powers of two as scales and integers as activations leave no rounding: the bits must agree."""
    rng = np.random.default_rng(2)
    x = rng.integers(-126, 127, (13, 104)).astype(np.float32)
    x[:, ::4] = 127 * np.sign(x[:, ::4] + 0.5)  # every group's amax is 127: its scale is one
    matrices = all_matrices(rng, 37, 104, isa, exact=True)[3:]
    file = linear_file(tmp_path / "m.hb", matrices, x, bias=False)
    step = step_of(np.arange(13))
    ours, theirs = (run_slots(b, step) for b in (Jit(file, "i8g32", 1), Reference(file, "i8g32")))
    for m, a, b in zip(matrices, ours[1:], theirs[1:]):
        np.testing.assert_array_equal(a, b, err_msg=str(m.spec))
        assert np.abs(b).max() > 1


# What the operands of a dot can come from: bytes, one plane or two, steps or a table of levels, either sign;
# blocks narrower than the columns of 64 bytes; two-level scales; and 8-bit floats, which have no dots.
VARIED = [
    *(("q8", 32, "f16"), ("a8", 8, "f16"), ("z4", 8, "f16"), ("m4", 4, "bf16"), ("n4", 32, "k256")),
    *(("q2", 32, ""), ("q3", 32, ""), ("q4", 32, ""), ("q5", 32, ""), ("q6", 32, "")),
    *(("i2", 4, "f32"), ("i6", 16, "k256"), ("a5", 16, "k256"), ("z3", 8, "f16"), ("a2", 0, "f32")),
    *(("f8e4m3", 0, "f32"), ("f8e5m2", 64, "bf16")),
]


@pytest.mark.parametrize("name", ["avx2", "avxvnni", "scalar"])
def test_other_instruction_sets(tmp_path, name, monkeypatch):
    """Other instructions and the generic code give the bits of this CPU's best, where this CPU has them."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((5, 304)).astype(np.float32)
    matrices = [Matrix(rng, f"{e}.{g}.{t}", e, 37, 304, g, t) for e, g, t in VARIED]
    file, step = linear_file(tmp_path / "m.hb", matrices, x), step_of(np.arange(5))
    monkeypatch.delenv("HALFBYTE_ISA", raising=False)
    best = run_slots(Jit(file, "i8g32", 1), step)
    monkeypatch.setenv("HALFBYTE_ISA", name)
    try:
        other = Jit(file, "i8g32", 1)
    except UsageError as error:
        pytest.skip(str(error))
    law = run_slots(Reference(file, "i8g32"), step)
    what = ["embed", *VARIED, "pick"]
    for name, a, b, c in zip(what, best, run_slots(other, step), law, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(name))
        np.testing.assert_allclose(a, c, rtol=0, atol=4e-6 * np.abs(c).max(), err_msg=str(name))


def test_extreme_codes_do_not_saturate(tmp_path, isa):
    """-128 and 127 against -127 and 127 everywhere."""
    x = np.where(np.arange(64) % 3, 127.0, -127.0).astype(np.float32)[None]
    m = Matrix(np.random.default_rng(0), "w", "q8", 16, 64)
    codes = np.full((16, 64), -128, np.int8)
    codes[8:] = 127
    m.planes["codes"] = tiles.pack_codes(codes, 8)
    m.planes["scales"] = tiles.pack_groups(np.ones((16, 2), np.float16))
    file = linear_file(tmp_path / "m.hb", [m], x, bias=False)
    y = run_slots(Jit(file, "i8g32", 1), step_of([0]))[1][0]
    np.testing.assert_array_equal(y, codes.astype(np.float32) @ x[0])


# ---- a whole program ----------------------------------------------------------------------------

WIDTH, HEADS, KV_HEADS, K_DIM, V_DIM, INNER, VOCAB = 48, 4, 2, 20, 24, 40, 37


def model_file(path: Path, encoding="q4", table="q8") -> File:
    """Two layers that use every op and every function; head sizes off the vector length, one window."""
    rng = np.random.default_rng(4)
    tensors, records, widths = [], [], []

    def matrix(name, rows, cols, kind=encoding):
        tensors.append(Matrix(rng, name, kind, rows, cols))
        if kind == "q4":  # weights below 1 / 4, as trained ones are
            tensors[-1].planes["row"][:] = 176
        return len(tensors) - 1

    def vector(name, values):
        tensors.append(Vector(name, values))
        return len(tensors) - 1

    def slot(width, rows=program.TOKENS, base=None, offset=0):
        widths.append((width, len(widths) if base is None else base, offset, rows))
        return len(widths) - 1

    def op(name, out=(), ins=(), weights=(), **attrs):
        records.append(program.record(name, out=out, ins=ins, weights=weights, **attrs))

    qk, kv = HEADS * K_DIM, KV_HEADS * K_DIM
    x, n, y = slot(WIDTH), slot(WIDTH), slot(WIDTH)
    qkv = slot(qk + kv + KV_HEADS * V_DIM)
    q, k = slot(qk, base=qkv), slot(kv, base=qkv, offset=qk)
    v = slot(KV_HEADS * V_DIM, base=qkv, offset=qk + kv)
    attended, gates, inner = slot(HEADS * V_DIM), slot(2 * INNER), slot(INNER)
    head, logits = slot(WIDTH, program.PICKS), slot(VOCAB, program.PICKS)
    embedding = matrix("embedding", VOCAB, WIDTH, table)
    freq = vector("inv_freq", 1.0 / 100.0 ** (np.arange(8) / 8))
    op("embed", [x], weights=[embedding])
    op("unary", [x], [x], function=FUNCTIONS["scale"], p=3.0)
    for layer in range(2):
        gain = vector(f"gain{layer}", rng.uniform(0.5, 1.5, WIDTH))
        op("rmsnorm", [n], [x], [gain if layer else None], eps=1e-5, dim=WIDTH)
        w = matrix(f"qkv{layer}", qk + kv + KV_HEADS * V_DIM, WIDTH)
        op("linear", [qkv], [n], [w, vector(f"bias{layer}", rng.standard_normal(widths[qkv][0]))])
        op("rmsnorm", [q], [q], [vector(f"qn{layer}", rng.uniform(0.5, 1.5, K_DIM))], eps=1e-6, dim=K_DIM)
        for part in (q, k):
            op("rope", [part], [part], [freq], head_dim=K_DIM, mscale=1.0 + 0.1 * layer)
        op("kv_put", ins=[k, v], cache=layer)
        op("attend", [attended], [q], cache=layer, scale=K_DIM**-0.5, softcap=5.0 * layer)
        op("linear", [y], [attended], [matrix(f"o{layer}", WIDTH, HEADS * V_DIM)])
        op("add", [x], [x, y], scale=0.7)
        gain, bias = (
            vector(f"ln{layer}", rng.uniform(0.5, 1.5, WIDTH)),
            vector(f"lb{layer}", np.ones(WIDTH) / 8),
        )
        op("layernorm", [n], [x], [gain, bias if layer else None], eps=1e-5, dim=WIDTH)
        op("linear", [gates], [n], [matrix(f"up{layer}", 2 * INNER, WIDTH)])
        op("glu", [inner], [gates], function=FUNCTIONS[("silu", "gelu_tanh")[layer]])
        op("linear", [y], [inner], [matrix(f"down{layer}", WIDTH, INNER)])
        for function in (("gelu", "tanh", "sigmoid"), ("relu", "silu", "gelu_tanh"))[layer]:
            op("unary", [n], [y], function=FUNCTIONS[function], p=0.0)
            op("add", [x], [x, n], scale=1.0)
        op("mul", [n], [x, y])
        op("add", [x], [x, n], scale=-0.25)
    op("pick", [head], [x])
    op("linear", [logits], [head], [embedding])
    op("unary", [logits], [logits], function=FUNCTIONS["softcap"], p=30.0)
    caches = [(KV_HEADS, K_DIM, V_DIM, 0), (KV_HEADS, K_DIM, V_DIM, 9)]
    return write_file(path, tensors, records, widths, VOCAB, caches)


IDS = np.random.default_rng(5).integers(0, VOCAB, 29)


def feed(backend, kv, start, stop):
    """Logits of every row of IDS[start:stop]."""
    kv.reserve(stop)
    T = stop - start
    return backend.run(step_of(IDS[start:stop], np.arange(start, stop), picks=np.arange(T), kvs=[kv]))


@pytest.mark.parametrize("mode", ["f16", "f32"])
def test_every_op_matches_reference(tmp_path, mode, isa):
    """Op by op from the same inputs: slots and caches."""
    file = model_file(tmp_path / "m.hb")
    jit, reference = Jit(file, "i8g32", 2), Reference(file, "i8g32")
    kvs = [KV(file.caches, mode), KV(file.caches, mode)]
    for start, stop in ((0, 27), (27, 28)):
        steps = []
        for backend, kv in zip((jit, reference), kvs):
            kv.reserve(stop)
            n = stop - start
            steps.append(step_of(IDS[start:stop], np.arange(start, stop), picks=np.arange(n), kvs=[kv]))
            backend.begin(steps[-1])
        for i, record in enumerate(file.program):
            jit.run_range(steps[0], i, i + 1)
            reference.run_range(steps[1], i, i + 1)
            what = f"record {i}, op {record['code']}"
            if int(record["out"][0]) == program.NONE:
                cache = int(record["attr"][0])
                for mine, theirs in zip(*(kv.read(cache, start, stop) for kv in kvs)):
                    np.testing.assert_array_equal(mine, theirs, err_msg=what)
                continue
            a, b = (s.slot(int(record["out"][0]), step) for s, step in zip((jit, reference), steps))
            bound = 2e-6 * max(1.0, float(np.abs(b).max()))
            np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=what)
            a[:] = b  # the next op starts from the same numbers
    assert np.abs(b).max() > 0.5


def test_rows_do_not_depend_on_threads_or_chunks(tmp_path):
    """One step of 29, two threads, chunks, and two sessions in one step: the same bits."""
    file = model_file(tmp_path / "m.hb")
    whole = feed(Jit(file, "i8g32", 1), KV(file.caches, "f16"), 0, 29)
    jit = Jit(file, "i8g32", 2)
    jit._row_work[:] = 1 << 20  # everything is worth several threads
    for cuts in ((0, 29), (0, 1, 2, 5, 28, 29), (0, 12, 24, 29), tuple(range(30))):
        kv = KV(file.caches, "f16")
        parts = [feed(jit, kv, a, b) for a, b in itertools.pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(parts), whole, err_msg=str(cuts))
    first, second = KV(file.caches, "f16"), KV(file.caches, "f16")
    feed(jit, first, 0, 14)
    rows = np.r_[14:20, 0:11]
    logits = jit.run(step_of(IDS[rows], rows, np.repeat([0, 1], (6, 11)), np.arange(17), kvs=[first, second]))
    np.testing.assert_array_equal(logits, whole[rows])


def test_float_policy_and_float_tables(tmp_path):
    """A program of f16 matrices under f32, against the reference."""
    file = model_file(tmp_path / "m.hb", "f16", "bf16")
    logits = [feed(b(file, "f32", 1), KV(file.caches, "f32"), 0, 13) for b in (Jit, Reference)]
    np.testing.assert_allclose(*logits, rtol=0, atol=2e-5)


def test_requests_out_of_range_are_refused(tmp_path, monkeypatch):
    """Compiled code never follows an id, position or pick out of bounds."""
    file = model_file(tmp_path / "m.hb")
    jit, kv = Jit(file, "i8g32", 1), KV(file.caches, "f16")
    for bad in (
        step_of([VOCAB], kvs=[kv]),
        step_of([-1], kvs=[kv]),
        step_of([0], positions=[kv.capacity], kvs=[kv]),
        step_of([0], sessions=[1], kvs=[kv]),
        step_of([0], picks=[1], kvs=[kv]),
        step_of([0, 1], sessions=[0, 1], kvs=[kv, KV(file.caches, "f32")]),
    ):
        with pytest.raises(UsageError):
            jit.run(bad)
    monkeypatch.setenv("HALFBYTE_ISA", "abacus")
    with pytest.raises(UsageError, match="abacus"):
        Jit(file, "i8g32", 1)


def test_more_threads_than_cpus_are_capped(tmp_path):
    """4096 threads are not started."""
    file = model_file(tmp_path / "m.hb")
    jit = Jit(file, "i8g32", 4096)
    assert 1 <= jit.threads < 4096
    assert np.isfinite(feed(jit, KV(file.caches, "f16"), 0, 3)).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own(tmp_path):
    """The threads stay behind in the parent; the child computes the same with new ones."""
    file = model_file(tmp_path / "m.hb")
    jit = Jit(file, "i8g32", 2)
    jit._row_work[:] = 1 << 20
    whole = feed(jit, KV(file.caches, "f16"), 0, 29)
    child = os.fork()
    if not child:
        same = np.array_equal(feed(jit, KV(file.caches, "f16"), 0, 29), whole)
        threads = sum(t.name.startswith("halfbyte-jit") for t in threading.enumerate())
        os._exit(0 if same and threads == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_importing_the_module_does_not_import_numba():
    """Numba takes half a second to import; only a Jit object pays it."""
    code = "import sys, halfbyte.runtime.backends.jit; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
