"""The kernel table, the pool, the environment, and what the library refuses."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from halfbyte.formats import program
from halfbyte.formats.errors import UsageError
from halfbyte.formats.ops import BY_NAME
from halfbyte.runtime.backends import native
from halfbyte.runtime.kv import KV


def test_every_op_and_family_has_a_kernel_for_every_isa(rig):
    for limit in range(len(rig.ISAS)):
        chosen = [(k["op"], k["family"]) for k in native.kernels(limit) if k["chosen"]]
        assert len(set(chosen)) == len(chosen)
        assert {op for op, _ in chosen} == (set(BY_NAME) - {"pick"}) | {"quantize", "attend_merge"}


def test_the_first_supported_row_wins(rig):
    rows = native.kernels()
    for k in rows:
        same = [r for r in rows if (r["op"], r["family"]) == (k["op"], k["family"]) and r["supported"]]
        assert k["chosen"] == (same[0] is k)
        assert k["name"].endswith(k["isa"])


def test_a_limit_is_obeyed(rig):
    ascending = {  # numbers say nothing of the order
        "x86": ("scalar", "avx2", "avxvnni", "avx512vlvnni", "avx512vnni"),
        "arm": ("scalar", "neon", "dotprod", "i8mm"),
    }
    assert {n for names in ascending.values() for n in names} == set(rig.ISAS)
    usable = rig.usable()
    order = next(names for names in ascending.values() if set(usable) <= set(names))
    for place, name in enumerate(order):
        isas = {k["isa"] for k in native.kernels(rig.ISAS.index(name)) if k["chosen"]}
        assert isas <= set(order[: place + 1])
        if name in usable:
            assert name in isas
    best = [n for n in order if n in usable][-1]
    assert native.kernels() == native.kernels(rig.ISAS.index(best))


def test_a_set_without_kernels_for_an_op_leaves_it_to_the_next(rig):
    if "avx512vlvnni" not in rig.usable():
        pytest.skip("this machine lacks AVX-512-VNNI")
    isa = {
        (k["op"], k["family"]): k["isa"]
        for k in native.kernels(rig.ISAS.index("avx512vlvnni"))
        if k["chosen"] and k["isa"] != "scalar"
    }
    own = {("linear", f) for f in ("bits2", "bits3", "bits4", "bits5", "bits6", "bits8")}
    assert {key for key, name in isa.items() if name == "avx512vlvnni"} == own
    assert {name for key, name in isa.items() if key not in own} == {"avx2"}


@pytest.mark.parametrize("threads", range(1, 9))
def test_any_number_of_threads_gives_the_same_bits(rig, threads):
    rng = np.random.default_rng(threads)
    m = rig.random_matrix(rng, "q4", 300, 700)
    x = rng.standard_normal((40, 700)).astype(np.float32)
    one = rig.linear(m, x)
    rec = [program.record("linear", out=[1], ins=[0], weights=[0])]
    b = rig.Bound(rec, [700, 300], [m], threads=threads)
    assert b.lib.hb_pool_threads(b.pool) == threads
    for rows in (40, 1, 40, 3, 1, 1, 1, 17, 40):
        assert np.array_equal(b.run({0: x[:rows]}, 1, rows), one[:rows])


def test_many_short_loops_all_finish(rig):
    # 400 ops that each wake the pool: a lost wake-up or a missed index would hang or differ
    rng = np.random.default_rng(0)
    m = rig.random_matrix(rng, "q8", 512, 512)
    recs = [program.record("linear", out=[1 - i % 2], ins=[i % 2], weights=[0]) for i in range(400)]
    x = rng.standard_normal((1, 512)).astype(np.float32)
    want = rig.Bound(recs, [512, 512], [m]).run({0: x}, 0, 1)
    for threads in (2, 7):
        assert np.array_equal(rig.Bound(recs, [512, 512], [m], threads=threads).run({0: x}, 0, 1), want)


def test_views_of_slots_are_strided(rig):
    rng = np.random.default_rng(1)
    m = rig.random_matrix(rng, "q8", 24, 40)
    x = rng.standard_normal((5, 100)).astype(np.float32)
    rec = program.record("linear", out=[2], ins=[1], weights=[0])
    slots = [100, (40, 0, 30, 0), (24, 3, 8, 0), 64]
    b = rig.Bound([rec], slots, [m])
    y = b.run({0: x}, 3, 5)
    assert np.array_equal(y[:, 8:32], rig.linear(m, x[:, 30:70]))
    assert not y[:, :8].any() and not y[:, 32:].any()


def test_steps_out_of_range_are_refused(rig):
    rng = np.random.default_rng(2)
    m = rig.random_matrix(rng, "q8", 10, 16)
    shape = (1, 16, 16, 0)
    recs = [
        program.record("embed", out=[0], weights=[0]),
        program.record("kv_put", ins=[0, 0], cache=0),
        program.record("pick", out=[1], ins=[0]),
    ]
    b = rig.Bound(recs, [16, (16, 1, 0, 1)], [m], [shape])
    kv = KV(np.array([shape], program.CACHE_DTYPE), "f32")
    b.run({}, 1, 1, kvs=[kv])
    lib = b.lib
    for bad in ([10], [-1]):
        b.run({}, 1, 1, ids=bad, kvs=[kv], status=lib.HB_ERROR_ID)
    for bad in ([kv.capacity], [-1]):
        b.run({}, 1, 1, positions=bad, kvs=[kv], status=lib.HB_ERROR_POSITION)
    for bad in ([1], [-1]):
        b.run({}, 1, 1, sessions=bad, kvs=[kv], status=lib.HB_ERROR_SESSION)
        b.run({}, 1, 1, picks=bad, kvs=[kv], status=lib.HB_ERROR_PICK)
    kv = KV(np.array([shape], program.CACHE_DTYPE), "tq3-qjl")
    good, q3 = int(kv.words[0]), int(kv.words[0]) & 255
    b.run({}, 1, 1, kvs=[kv])
    # signs of values, or in the first page; a side that there is not; floats beside codes
    for bad in (good & ~0xFF00 | q3 << 8, good & ~0xFF0000 | q3 << 16, good | 0xFF, good & ~0xFF):
        kv.words[0] = bad
        b.run({}, 1, 1, kvs=[kv], status=lib.HB_ERROR_ARGUMENT)


def test_what_cannot_be_bound_is_refused_in_words(rig):
    rng = np.random.default_rng(3)
    m = rig.random_matrix(rng, "q4", 20, 64)
    rec = program.record("linear", out=[1], ins=[0], weights=[0])
    short = type(m)(m.tensor, m.data[:-1])
    with pytest.raises(ValueError, match="too few bytes"):
        rig.Bound([rec], [64, 20], [short])
    for encoding, group, scale_type in (
        ("q3", 32, ""),
        ("a5", 16, "k256"),
        ("i6", 32, "k256"),
        ("z2", 8, "f16"),
    ):
        m = rig.random_matrix(rng, encoding, 20, 300, group, scale_type)
        rig.Bound([rec], [300, 20], [m])
        with pytest.raises(ValueError, match="too few bytes"):
            rig.Bound([rec], [300, 20], [type(m)(m.tensor, m.data[:-1])])
    good = rig.random_matrix(rng, "z3", 20, 64, 32, "f16")
    for wrong in (
        {"group": 48},
        {"group": 64, "scale_type": "k256"},
        {"scale_type": ""},
        {"encoding": "u32"},
    ):
        with pytest.raises(ValueError, match="this library does not know"):
            rig.Bound([rec], [64, 20], [type(m)(dataclasses.replace(good.tensor, **wrong), good.data)])
    odd = program.record("hadamard", out=[0], ins=[0], dim=24)
    with pytest.raises(ValueError, match="dim of a hadamard is wrong"):
        rig.Bound([odd], [48])
    m = rig.random_matrix(rng, "q4", 20, 64)
    unknown = rec.copy()
    unknown["code"] = 99
    with pytest.raises(ValueError, match="does not know the op"):
        rig.Bound([unknown], [64, 20], [m])
    with pytest.raises(ValueError, match="record 1: a tensor does not exist"):
        rig.Bound([rec, program.record("linear", out=[1], ins=[0], weights=[5])], [64, 20], [m])


def test_the_environment_forces_an_isa(rig, monkeypatch):
    for name in rig.usable():
        monkeypatch.setenv("HALFBYTE_ISA", name)
        assert native.isa_number() == rig.ISAS.index(name)
    monkeypatch.setenv("HALFBYTE_ISA", "mmx")
    with pytest.raises(UsageError, match=r"mmx is not known; there are scalar, avx2, avx512vnni"):
        native.isa_number()
    monkeypatch.delenv("HALFBYTE_ISA")
    assert native.isa_number() == native.ISA_BEST


def test_library_path_needs_no_cffi(rig, tmp_path):
    code = "import sys, halfbyte.runtime.backends.native as n; print(n.library_path(), 'cffi' in sys.modules)"
    path = tmp_path / "elsewhere.so"
    env = {**os.environ, "HALFBYTE_LIBRARY": str(path)}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    ).stdout
    assert out.split() == [str(path), "False"]


def test_a_library_that_cannot_be_loaded_is_one_line(rig, tmp_path, monkeypatch):
    path = tmp_path / "libhalfbyte.so"
    path.write_bytes(b"not a library")
    monkeypatch.setenv("HALFBYTE_LIBRARY", str(path))
    with pytest.raises(UsageError, match="cannot load the native library"):
        native.load_library()
