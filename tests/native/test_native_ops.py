"""Every other op in C against the reference's functions, for every instruction set."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from halfbyte.formats import kv_modes, program
from halfbyte.formats.encodings import K256, MATRIX_ENCODINGS
from halfbyte.formats.ops import FUNCTIONS
from halfbyte.runtime.backends.backend import Step
from halfbyte.runtime.backends.reference import Reference, apply_function
from halfbyte.runtime.kv import KV
from halfbyte.runtime.kv_page import rotate

RNG = np.random.default_rng(11)


def law(weights=(), caches=()):
    """The reference's op functions over these weights."""
    r = object.__new__(Reference)
    r._memo = lambda i, what: weights[i].values
    r.file = SimpleNamespace(caches=np.array(list(caches), program.CACHE_DTYPE))
    return r


def step_of(rows, ids=None, positions=None, kvs=(), sessions=None):
    """A Step of one session unless told."""
    zeros = np.zeros(rows, np.int32)
    return Step(
        zeros if ids is None else np.asarray(ids, np.int32),
        np.arange(rows, dtype=np.int32) if positions is None else np.asarray(positions, np.int32),
        zeros if sessions is None else np.asarray(sessions, np.int32),
        np.array([rows - 1], np.int32),
        list(kvs),
    )


def ulps(got, want, slack=0.0):
    """Largest distance beyond `slack` in units in the last place of `want` (2^-100 and below count as 2^-100)."""
    spacing = np.spacing(np.maximum(np.abs(want), np.float32(2.0**-100)))
    distance = np.abs(got.astype(np.float64) - want.astype(np.float64))
    return float(np.max(np.maximum(distance - slack, 0) / spacing))


@pytest.mark.parametrize("encoding", [e.name for e in MATRIX_ENCODINGS])
def test_embed(rig, encoding):
    for rows, cols, group, scale_type in (
        (37, 33, 4, "f16"),
        (16, 64, 0, "bf16"),
        (5, 100, 32, "f32"),
        (20, 300, 16, K256),
        (20, 300, 32, K256),
    ):
        m = rig.random_matrix(RNG, encoding, rows, cols, group, scale_type)
        ids = RNG.integers(0, rows, 9)
        b = rig.Bound([program.record("embed", out=[0], weights=[0])], [cols], [m])
        assert np.array_equal(b.run({}, 0, 9, ids=ids), m.values[ids])


def test_pick_takes_rows_in_order(rig):
    x = RNG.standard_normal((5, 7)).astype(np.float32)
    b = rig.Bound([program.record("pick", out=[1], ins=[0])], [7, (7, 1, 0, 1)])
    assert np.array_equal(b.run({0: x}, 1, 5, picks=[4, 0, 4]), x[[4, 0, 4]])


def test_gather_takes_columns_in_order(rig):
    x = RNG.standard_normal((5, 40)).astype(np.float32)
    index = RNG.integers(0, 40, 77)
    record = program.record("gather", out=[1], ins=[0], weights=[0])
    assert np.array_equal(
        rig.Bound([record], [40, 77], [rig.index_vector(index)]).run({0: x}, 1, 5), x[:, index]
    )
    index[5] = 40
    with pytest.raises(ValueError, match="an index is beyond the input"):
        rig.Bound([record], [40, 77], [rig.index_vector(index)])
    for wrong in (rig.index_vector(index[:-1] % 40), rig.vector(index % 40)):
        with pytest.raises(ValueError, match="not a u32 vector of the width of the output"):
            rig.Bound([record], [40, 77], [wrong])


@pytest.mark.parametrize("dim", [1, 2, 4, 8, 16, 32, 128, 1024])
def test_hadamard(rig, dim):
    x = RNG.standard_normal((3, 3 * dim)).astype(np.float32)
    want = law().hadamard(step_of(3), x, dim)
    results = []
    for isa in rig.usable():
        for out in (0, 1):
            record = program.record("hadamard", out=[out], ins=[0], dim=dim)
            y = rig.Bound([record], [3 * dim] * 2, isa=isa).run({0: x}, out, 3)
            # each of the log2(dim) steps rounds to half a unit in the last place
            assert np.abs(y - want).max() <= (np.log2(dim) + 1) * 2.0**-24 * np.abs(want).max(), isa
            results.append(y)
    assert all(np.array_equal(y, results[0]) for y in results)


@pytest.mark.parametrize("dim", [1, 7, 16, 33, 96])
def test_norms(rig, dim):
    x = RNG.standard_normal((4, 2 * dim)).astype(np.float32)
    w, bias = (rig.vector(RNG.standard_normal(dim)) for _ in range(2))
    for isa in rig.usable():
        for weights in ((w, None), (None, None)):
            ws = [0 if weights[0] else None]
            rec = program.record("rmsnorm", out=[1], ins=[0], weights=ws, eps=1e-5, dim=dim)
            y = rig.Bound([rec], [2 * dim, 2 * dim], [w], isa=isa).run({0: x}, 1, 4)
            assert ulps(y, law([w]).rmsnorm(step_of(4), x, ws[0], 1e-5, dim)) <= 1
        for ws in ([0, 1], [0, None], [None, None]):
            rec = program.record("layernorm", out=[1], ins=[0], weights=ws, eps=1e-5, dim=dim)
            y = rig.Bound([rec], [2 * dim, 2 * dim], [w, bias], isa=isa).run({0: x}, 1, 4)
            want = law([w, bias]).layernorm(step_of(4), x, *ws, 1e-5, dim)
            assert np.abs(y - want).max() <= 2.0**-22 * np.abs(want).max()


def test_add_and_mul_are_exact_and_work_in_place(rig):
    a, b = (RNG.standard_normal((3, 37)).astype(np.float32) for _ in range(2))
    for isa in rig.usable():
        add = program.record("add", out=[0], ins=[0, 1], scale=0.3)
        mul = program.record("mul", out=[2], ins=[0, 1])
        y = rig.Bound([add, mul], [37, 37, 37], isa=isa).run({0: a, 1: b}, 2, 3)
        assert np.array_equal(y, (a + np.float32(0.3) * b) * b)


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_functions(rig, function):
    x = np.concatenate([np.linspace(-12, 12, 1501), RNG.standard_normal(500) * 0.02, [0, 60, -60, 300]])
    x = x.astype(np.float32)[None]
    up = RNG.standard_normal(x.shape).astype(np.float32)
    p = 1.7
    want = apply_function(function, x, p)
    allowed = 3 if function == "silu" else 1
    # the reference's 1 + tanh(u) and 1 + erf(u) lose everything below 2^-53 of 1
    slack = np.abs(x.astype(np.float64)) * 2.0**-52 if function.startswith("gelu") else 0.0
    for isa in rig.usable():
        n = x.shape[1]
        rec = program.record("unary", out=[1], ins=[0], function=FUNCTIONS[function], p=p)
        assert ulps(rig.Bound([rec], [n, n], isa=isa).run({0: x}, 1, 1), want, slack) <= 1, isa
        if function in ("scale", "softcap"):
            continue
        rec = program.record("glu", out=[1], ins=[0], function=FUNCTIONS[function])
        y = rig.Bound([rec], [2 * n, n], isa=isa).run({0: np.concatenate([x, up], axis=1)}, 1, 1)
        assert ulps(y, want * up, slack * np.abs(up)) <= allowed + 1, isa


def test_rope(rig):
    for heads, head_dim, n in ((3, 8, 4), (2, 20, 5), (1, 128, 64)):
        freq = rig.vector(10000.0 ** (-np.arange(n) / n))
        x = RNG.standard_normal((4, heads * head_dim)).astype(np.float32)
        positions = [0, 1, 77, 100000]
        want = law([freq]).rope(step_of(4, positions=positions), x, 0, head_dim, 1.25)
        for isa in rig.usable():
            for out in (0, 1):
                rec = program.record("rope", out=[out], ins=[0], weights=[0], head_dim=head_dim, mscale=1.25)
                b = rig.Bound([rec], [x.shape[1], x.shape[1]], [freq], isa=isa)
                got = b.run({0: x}, out, 4, positions=positions)
                assert np.abs(got - want).max() <= 2.0**-23 * 4, isa


def kv_program(rig, shape, heads, isa="best", threads=1, softcap=0.0, scale=0.3):
    """kv_put then attend over one cache of `shape` = (kv_heads, k_dim, v_dim, window)."""
    kv_heads, k_dim, v_dim, _ = shape
    records = [
        program.record("kv_put", ins=[1, 2], cache=0),
        program.record("attend", out=[3], ins=[0], cache=0, scale=scale, softcap=softcap),
    ]
    slots = [heads * k_dim, kv_heads * k_dim, kv_heads * v_dim, heads * v_dim]
    return rig.Bound(records, slots, [], [shape], isa=isa, threads=threads)


def kv_inputs(shape, heads, rows, size=1.0):
    kv_heads, k_dim, v_dim, _ = shape
    widths = (heads * k_dim, kv_heads * k_dim, kv_heads * v_dim)
    return {i: (RNG.standard_normal((rows, w)) * size).astype(np.float32) for i, w in enumerate(widths)}


def rounding_of_packed(x, shape, scale, mode):
    """What rounding queries and weights to integers may change, relative to the largest value.

    Queries have 127 * 128 steps up to the largest of a head, weights as many, or 127 for codes below 8 bits.
    """
    _, k_dim, _, _ = shape
    q, k = (rotate(x[i].reshape(len(x[i]), -1, k_dim)) for i in (0, 1))
    score = scale * np.abs(q).max() / (2 * 127 * 128) * np.abs(k).sum(axis=2).max()
    weight = 1 / (2 * 127) if kv_modes.mode(mode).v.bits < 8 else 1 / (2 * 127 * 128)
    return 2 * score + 2 * weight  # errors of a page's positions have either sign: far below 64 of them


@pytest.mark.parametrize("mode", [*kv_modes.MODES, "k8vt1", "kt1v8", "kq2v8", "kq4v8"])
@pytest.mark.parametrize(
    ("shape", "heads"),
    [((2, 16, 16, 0), 2), ((2, 64, 64, 0), 8), ((1, 40, 24, 0), 5), ((3, 5, 7, 9), 3), ((1, 128, 96, 70), 7)],
)
def test_kv_put_and_attend(rig, shape, heads, mode):
    rows = 150
    x = kv_inputs(shape, heads, rows)
    for softcap in (0.0, 5.0):
        results = []
        for isa in rig.usable():
            kv, mine = (KV(np.array([shape], program.CACHE_DTYPE), mode) for _ in range(2))
            kv.reserve(rows)
            mine.reserve(rows)
            ref = law(caches=[shape])
            ref.kv_put(step_of(rows, kvs=[kv]), x[1], x[2], 0)
            want = ref.attend(step_of(rows, kvs=[kv]), x[0], 0, 0.3, softcap)
            got = kv_program(rig, shape, heads, isa, softcap=softcap).run(x, 3, rows, kvs=[mine])
            for a, b in zip(mine.pages[0], kv.pages[0]):
                assert np.array_equal(a.bytes, b.bytes), isa
            bound = 3e-6 if mode in ("f32", "f16") else rounding_of_packed(x, shape, 0.3, mode)
            assert np.abs(got - want).max() <= bound * np.abs(x[2]).max(), isa
            results.append(got)
        assert all(np.array_equal(r, results[0]) for r in results)


def test_half_conversion_rounds_to_nearest_even(rig):
    special = [
        0.0,
        -0.0,
        65504,
        65519.9,
        65520,
        1e9,
        -1e9,
        np.inf,
        5.96e-8,
        2.98e-8,
        2.9802322e-8,
        2.99e-8,
        6.1e-5,
    ]
    ties = (1 + (np.arange(40) + 0.5) / 1024) * 2.0 ** RNG.integers(-20, 10, 40)
    x = np.concatenate([special, ties, RNG.standard_normal(203)]).astype(np.float32)
    shape = (1, 256, 256, 0)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    for isa in rig.usable():
        kv = KV(np.array([shape], program.CACHE_DTYPE), "f16")
        b = rig.Bound([program.record("kv_put", ins=[0, 0], cache=0)], [256], [], [shape], isa=isa)
        b.run({0: x[None, :256]}, 0, 1, kvs=[kv])
        for stored in kv.read(0, 0, 1):
            assert np.array_equal(stored[0, 0].view(np.uint16), want[:256].view(np.uint16)), isa


@pytest.mark.parametrize("mode", ["f16", "k8v8", "tq3", "tq3-qjl"])
@pytest.mark.parametrize(
    ("shape", "heads"), [((2, 32, 32, 0), 6), ((1, 24, 40, 1300), 4), ((4, 16, 16, 0), 4)]
)
def test_long_contexts_by_segments(rig, shape, heads, mode):
    """With two threads a task has several heads of keys and values, of the third shape."""
    rows = 2200  # three segments of 1024 positions
    x = kv_inputs(shape, heads, rows)
    kv, ref = KV(np.array([shape], program.CACHE_DTYPE), mode), law(caches=[shape])
    kv.reserve(rows)
    step = step_of(rows, kvs=[kv])
    ref.kv_put(step, x[1], x[2], 0)
    for last in ([rows - 1], [1023], [1024], [2047, 2048]):
        cut = {i: v[last] for i, v in x.items()}
        want = ref.attend(step_of(len(last), positions=last, kvs=[kv]), cut[0], 0, 0.3, 0.0)
        results = [
            kv_program(rig, shape, heads, isa, threads).run(cut, 3, len(last), positions=last, kvs=[kv])
            for isa in rig.usable()
            for threads in (1, 2, 5)
        ]
        bound = 3e-6 if mode == "f16" else rounding_of_packed(x, shape, 0.3, mode)
        assert np.abs(results[0] - want).max() <= bound * np.abs(x[2]).max()
        assert all(np.array_equal(r, results[0]) for r in results)
    whole = kv_program(rig, shape, heads, threads=2).run(x, 3, rows, kvs=[kv])
    assert np.array_equal(whole[last], results[0])


@pytest.mark.parametrize("mode", ["f32", "f16"])
def test_attention_of_a_row_does_not_depend_on_its_company(rig, mode):
    shape, heads, rows = (2, 48, 48, 100), 6, 200
    x = kv_inputs(shape, heads, rows)
    whole = None
    for threads, size in ((1, 200), (3, 200), (2, 1), (1, 37), (2, 64)):
        kv = KV(np.array([shape], program.CACHE_DTYPE), mode)
        kv.reserve(rows)
        b = kv_program(rig, shape, heads, threads=threads)
        parts = []
        for a in range(0, rows, size):
            cut = {i: v[a : a + size] for i, v in x.items()}
            n = len(cut[0])
            parts.append(b.run(cut, 3, n, positions=np.arange(a, a + n), kvs=[kv]))
        got = np.concatenate(parts)
        whole = got if whole is None else whole
        assert np.array_equal(got, whole), (threads, size)


def test_rows_of_several_sessions_share_a_step(rig):
    shape, heads = (2, 32, 32, 0), 4
    x = kv_inputs(shape, heads, 30)
    alone = []
    for s in range(3):
        kv = KV(np.array([shape], program.CACHE_DTYPE), "f16")
        cut = {i: v[s::3] for i, v in x.items()}
        alone.append(kv_program(rig, shape, heads).run(cut, 3, 10, kvs=[kv]))
    kvs = [KV(np.array([shape], program.CACHE_DTYPE), "f16") for _ in range(3)]
    kvs[1].reserve(500)
    sessions, positions = np.arange(30) % 3, np.arange(30) // 3
    got = kv_program(rig, shape, heads, threads=2).run(
        x, 3, 30, positions=positions, sessions=sessions, kvs=kvs
    )
    for s in range(3):
        assert np.array_equal(got[s::3], alone[s])


def test_large_scores_do_not_overflow(rig):
    shape, heads, rows = (1, 16, 16, 0), 1, 100
    x = kv_inputs(shape, heads, rows, 30.0)
    ref = law(caches=[shape])
    for isa in rig.usable():
        kv, mine = (KV(np.array([shape], program.CACHE_DTYPE), "f32") for _ in range(2))
        kv.reserve(rows)
        mine.reserve(rows)
        ref.kv_put(step_of(rows, kvs=[kv]), x[1], x[2], 0)
        want = ref.attend(step_of(rows, kvs=[kv]), x[0], 0, 1.0, 0.0)
        got = kv_program(rig, shape, heads, isa, scale=1.0).run(x, 3, rows, kvs=[mine])
        # a score of 10^4 has a float32 spacing of 10^-3, which is the relative error of a weight
        assert np.abs(got - want).max() <= 3e-3 * np.abs(x[2]).max(), isa
