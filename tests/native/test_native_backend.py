"""The Native backend over a whole file: against the reference, and bit for bit against itself."""

from __future__ import annotations

import numpy as np
import pytest

from halfbyte.formats import encodings, program, tiles
from halfbyte.formats.container import File
from halfbyte.formats.errors import UsageError
from halfbyte.formats.writer import TensorSpec, Writer
from halfbyte.runtime.backends.backend import Step
from halfbyte.runtime.backends.native import Native
from halfbyte.runtime.backends.reference import Reference
from halfbyte.runtime.kv import KV

DIM, HEADS, KV_HEADS, HEAD, FF, VOCAB, LAYERS = 72, 6, 2, 12, 100, 90, 2


def quantized(rng, spec):
    """Planes of a random matrix under `spec`, codes and scales as a plain quantiser would choose them."""
    e = encodings.BY_NAME[spec.encoding]
    rows, cols = spec.shape
    n = encodings.group_count(cols, spec.group)
    low, high = (-128, 128) if e.signed else (0, 1 << e.bits)
    codes = rng.integers(low, high, spec.shape).astype(np.int8 if e.signed else np.uint8)
    out = tiles.pack_code_planes(codes, e.bits)
    if e.row_scale:
        out["scales"] = tiles.pack_groups(rng.integers(0, 256, (rows, n)).astype(np.uint8))
        out["row"] = tiles.pack_groups(np.full((rows, 1), 4 * (60 - 17), np.uint8))
    else:
        size = 0.1 * 2.0 / (high - low)
        scales = encodings.float_to_bits(
            rng.uniform(0.5, 1.5, (rows, n)).astype(np.float32) * size, spec.scale_type
        )
        out["scales"] = tiles.pack_groups(scales)
        if e.offset == "min":
            mins = encodings.float_to_bits(np.full((rows, n), -0.1, np.float32), spec.scale_type)
            out["mins"] = tiles.pack_groups(mins)
        if e.offset == "zero":
            out["zeros"] = tiles.pack_groups(np.full((rows, n), high // 2, np.uint8))
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory, rig):
    """A two-layer model with every kind of op, a different encoding in every matrix."""
    rng = np.random.default_rng(21)
    tensors, records = [], []

    def tensor(name, shape, encoding="f32", group=0, scale_type=""):
        tensors.append(TensorSpec(name, encoding, shape, group, scale_type).resolved())
        return len(tensors) - 1

    qkv = (HEADS + 2 * KV_HEADS) * HEAD
    slots = [(DIM, 0, 0, 0), (DIM, 1, 0, 0), (qkv, 2, 0, 0)]
    slots += [(HEADS * HEAD, 2, 0, 0), (KV_HEADS * HEAD, 2, HEADS * HEAD, 0)]
    slots += [(KV_HEADS * HEAD, 2, (HEADS + KV_HEADS) * HEAD, 0), (HEADS * HEAD, 6, 0, 0), (2 * FF, 7, 0, 0)]
    slots += [(FF, 8, 0, 0), (DIM, 9, 0, 1), (VOCAB, 10, 0, 1), (DIM, 11, 0, 0)]
    x, h, all3, q, k, v, attended, up, ff, last, logits, product = range(12)
    kinds = [("q4", 32, "f16"), ("q5", 32, "f16"), ("i6", 16, "bf16"), ("z3", 64, "f16"), ("a4", 8, "f32")]
    kinds += [("a8", 0, "f16"), ("z8", 32, "f32"), ("i8", 4, "f16")]
    matrices = iter(kinds)

    def add(op, layer, **kw):
        records.append(program.record(op, layer, **kw))

    def matrix(name, shape):
        return tensor(name, shape, *next(matrices))

    add("embed", program.NO_LAYER, out=[x], weights=[tensor("embed", (VOCAB, DIM), "f16")])
    freq = tensor("freq", (HEAD // 2,))
    for i in range(LAYERS):
        add("rmsnorm", i, out=[h], ins=[x], weights=[tensor(f"{i}.norm", (DIM,))], eps=1e-5, dim=DIM)
        ws = [matrix(f"{i}.qkv", (qkv, DIM)), tensor(f"{i}.bias", (qkv,))]
        add("linear", i, out=[all3], ins=[h], weights=ws)
        for s in (q, k):
            add("rope", i, out=[s], ins=[s], weights=[freq], head_dim=HEAD, mscale=1.0)
        add("kv_put", i, ins=[k, v], cache=i)
        add("attend", i, out=[attended], ins=[q], cache=i, scale=HEAD**-0.5, softcap=20.0 * i)
        add("linear", i, out=[h], ins=[attended], weights=[matrix(f"{i}.o", (DIM, HEADS * HEAD)), None])
        add("add", i, out=[x], ins=[x, h], scale=1.0)
        ws = [tensor(f"{i}.ln", (DIM,)), tensor(f"{i}.lnb", (DIM,))]
        add("layernorm", i, out=[h], ins=[x], weights=ws, eps=1e-5, dim=DIM)
        add("linear", i, out=[up], ins=[h], weights=[matrix(f"{i}.up", (2 * FF, DIM)), None])
        add("glu", i, out=[ff], ins=[up], function=3 if i else 5)
        add("linear", i, out=[h], ins=[ff], weights=[matrix(f"{i}.down", (DIM, FF)), None])
        add("unary", i, out=[h], ins=[h], function=2, p=30.0)
        add("mul", i, out=[product], ins=[h, h])
        add("add", i, out=[x], ins=[x, h], scale=0.5)
        add("add", i, out=[x], ins=[x, product], scale=0.1)
    add("pick", program.NO_LAYER, out=[last], ins=[x])
    add(
        "linear",
        program.NO_LAYER,
        out=[logits],
        ins=[last],
        weights=[tensor("head", (VOCAB, DIM), "bf16"), None],
    )

    path = tmp_path_factory.mktemp("native") / "tiny.hb"
    table = np.array(slots, program.SLOT_DTYPE)
    caches = np.array([(KV_HEADS, HEAD, HEAD, 0), (KV_HEADS, HEAD, HEAD, 11)], program.CACHE_DTYPE)
    meta = {"model.vocab_size": VOCAB, "model.context_length": 256}
    code = np.array(records, program.OP_DTYPE)
    with Writer(path, meta=meta, slots=table, caches=caches, program=code, tensors=tensors) as w:
        for i, t in enumerate(tensors):
            if len(t.shape) == 1:
                values = 0.3 ** np.arange(t.shape[0]) if t.name == "freq" else rng.uniform(0.5, 1.5, t.shape)
                w.write(i, "values", 0, values.astype(np.float32))
            elif encodings.BY_NAME[t.encoding].is_float:
                values = rng.standard_normal(t.shape).astype(np.float32)
                w.write(i, "values", 0, tiles.pack_groups(encodings.float_to_bits(values, t.encoding)))
            else:
                for plane, data in quantized(rng, t).items():
                    w.write(i, plane, 0, data)
    return File(path)


def feed(backend, ids, sizes, mode="f16"):
    """Logits of every row of a session fed in chunks."""
    kv = KV(backend.file.caches, mode)
    kv.reserve(len(ids))
    out, at = [], 0
    for n in sizes:
        rows = np.arange(at, at + n, dtype=np.int32)
        picks = np.arange(n, dtype=np.int32)
        out.append(backend.run(Step(ids[at : at + n], rows, np.zeros(n, np.int32), picks, [kv])))
        at += n
    return np.concatenate(out)


IDS = np.random.default_rng(5).integers(0, VOCAB, 70).astype(np.int32)


@pytest.mark.parametrize("mode", ["f32", "f16"])
@pytest.mark.parametrize("policy", ["f32", "i8g32"])
def test_op_by_op_as_the_reference(model, policy, mode):
    law, native = Reference(model, policy), Native(model, policy, threads=2)
    n = 40
    kvs = [KV(model.caches, mode) for _ in range(2)]
    steps = []
    for kv in kvs:
        steps.append(
            Step(IDS[:n], np.arange(n, dtype=np.int32), np.zeros(n, np.int32), np.array([n - 1, 0]), [kv])
        )
    law.begin(steps[0])
    native.begin(steps[1])
    for i, record in enumerate(model.program):
        law.run_range(steps[0], i, i + 1)
        native.run_range(steps[1], i, i + 1)
        if int(record["out"][0]) != program.NONE:
            o = int(record["out"][0])
            want, got = law.slot(o, steps[0]), native.slot(o, steps[1])
            assert np.abs(got - want).max() <= 4e-6 * np.abs(want).max(), model.explain()[i]
            got[:] = want  # lockstep: an op is judged on the reference's inputs
    for c in range(len(model.caches)):
        for a, b in zip(kvs[0].read(c, 0, n), kvs[1].read(c, 0, n)):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("policy", ["f32", "i8g32"])
def test_chunks_threads_and_isas(model, policy, rig, monkeypatch):
    whole = feed(Native(model, policy, threads=1), IDS, [70])
    for threads, sizes in ((2, [70]), (3, [1] * 70), (1, [13, 57]), (8, [64, 1, 1, 4])):
        assert np.array_equal(feed(Native(model, policy, threads=threads), IDS, sizes), whole), (
            threads,
            sizes,
        )
    assert np.isfinite(whole).all() and np.abs(whole).max() > 0
    for isa in rig.usable():
        monkeypatch.setenv("HALFBYTE_ISA", isa)
        assert np.array_equal(feed(Native(model, policy, threads=2), IDS, [70]), whole), isa


def test_caches_that_grow_are_found_again(model):
    backend = Native(model, threads=1)
    kv, want = KV(model.caches, "f16"), feed(backend, IDS, [70])
    for t in range(70):
        kv.reserve(t + 1)
        one = np.array([t], np.int32)
        y = backend.run(Step(IDS[t : t + 1], one, np.zeros(1, np.int32), np.zeros(1, np.int32), [kv]))
        assert np.array_equal(y[0], want[t])


def test_a_bad_id_is_one_line(model):
    kv = KV(model.caches, "f16")
    one = np.zeros(1, np.int32)
    with pytest.raises(UsageError, match="token id is outside the vocabulary"):
        Native(model, threads=1).run(Step(np.array([VOCAB], np.int32), one, one, one, [kv]))


def test_describe_names_the_kernels(model, monkeypatch):
    monkeypatch.setenv("HALFBYTE_ISA", "scalar")
    facts = Native(model, threads=1).describe()
    assert facts["isa"] == "scalar" and facts["backend"] == "native"
    assert facts["kernels"]["linear.bits4"] == "hb_linear_bits4_scalar"
