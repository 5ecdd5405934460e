"""The C library on instruction sets that this machine lacks: AArch64 under qemu-user, and its own, by one driver.

`native/tests/parity.c` needs no Python, so it runs where Python does not: it is given recorded programs with the
reference's output and this machine's own, and tries every kernel of the machine it finds itself on.
"""

from __future__ import annotations

import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from targets import AARCH64, QEMU, ROOT, SYSROOT

from halfbyte.formats import encodings, kv_modes, program
from halfbyte.formats.encodings import K256, MATRIX_ENCODINGS, parameters_are_valid
from halfbyte.formats.ops import FUNCTIONS
from halfbyte.runtime.backends import native
from halfbyte.runtime.backends.backend import Step
from halfbyte.runtime.backends.reference import Reference, apply_function, linear_i8g32
from halfbyte.runtime.kv import KV

TOKENS = (1, 2, 3, 8, 33)
# What qemu calls the machine, and the instruction sets that the library must find there.
MACHINES = {
    "cortex-a72": ["scalar", "neon"],
    "cortex-a76": ["scalar", "neon", "dotprod"],
    "max": ["scalar", "neon", "dotprod", "i8mm"],
}


@dataclass
class Vectors:
    """The file of native/tests/parity.c in the making."""

    rig: type
    data: bytearray = field(default_factory=lambda: bytearray(64))
    cases: int = 0

    def put(self, data: bytes) -> None:
        """Append an array where the next multiple of 64 is."""
        self.data += bytes(-len(self.data) % 64) + data

    def case(
        self, name, records, slots, inputs, out, rows, want, bound, *, weights=(), caches=(), family="", exact=True,
        policy="i8g32", kv_mode="f32", ids=None, positions=None, picks=None,
    ) -> np.ndarray:  # fmt: skip
        """Run a program here and record it with its result and the reference's; returns the former.

        exact: only operations that the kernels share decide the output, so that every bit is promised.
        """
        b = self.rig.Bound(records, slots, weights, caches, policy=policy)
        kvs = [KV(b.caches, kv_mode)] if caches else []
        for kv in kvs:
            kv.reserve(rows if positions is None else max(positions) + 1)
        got = b.run(inputs, out, rows, ids=ids, positions=positions, picks=picks, kvs=kvs)
        assert np.abs(got - want).max() <= bound, name
        picks = [rows - 1] if picks is None else picks
        self.put(
            struct.pack(
                "<64s16s13I2f", name.encode(), family.encode(), {"f32": 0, "i8g32": 1}[policy], len(b.records),
                len(b.slots), len(b.caches), len(weights), len(inputs), rows, len(picks), len(kvs),
                kvs[0].capacity if kvs else 0, kv_modes.mode(kv_mode).word, out, exact, bound, bound,
            )
        )  # fmt: skip
        for table in (b.records, b.slots, b.caches):
            self.put(table.tobytes())
        table = b""
        for m in weights:
            t = m.tensor
            shape = t.shape if len(t.shape) == 2 else (1, t.shape[0])
            scale = encodings.SCALE_TYPES[t.scale_type]
            e = encodings.BY_NAME[t.encoding].code
            table += struct.pack("<2Q6I", 0, len(m.data), e, t.tile, *shape, t.group, scale)
        self.put(table)
        steps = (np.zeros(rows) if ids is None else ids, np.arange(rows) if positions is None else positions)
        for numbers in (*steps, np.zeros(rows), picks, list(inputs)):
            self.put(np.asarray(numbers).astype("<i4").tobytes())
        for m in weights:
            self.put(m.data.tobytes())
        for values in (*inputs.values(), np.broadcast_to(want, got.shape), got):
            self.put(np.ascontiguousarray(values, "<f4").tobytes())
        self.cases += 1
        return got

    def linear(self, rng, encoding, rows, cols, group, scale_type, tokens, policy="i8g32", extreme=False):
        """One LINEAR with bias."""
        m = self.rig.random_matrix(rng, encoding, rows, cols, group, scale_type, extreme)
        bias = self.rig.vector(rng.standard_normal(rows))
        x = rng.standard_normal((tokens, cols)).astype(np.float32)
        if extreme:
            x = np.where(x < 0, -127.0, 127.0).astype(np.float32)
        e = encodings.BY_NAME[encoding]
        if policy == "f32" or not e.is_integer:
            want = x.astype(np.float64) @ m.values.T.astype(np.float64) + bias.values
            bound = (np.abs(x) @ np.abs(m.values).T + 3).max() * (cols + 1) ** 0.5 * 2.0**-23
        else:
            want = linear_i8g32(x, m.codes, m.tensor) + bias.values
            # the reference's fma rounds twice: one unit in the last place of the largest partial sum
            bound = (np.abs(want).max() + np.abs(x).max() * np.abs(m.values).max() * cols) * 2.0**-22
        integer = f"bits{e.bits}" if e.is_integer and policy == "i8g32" else "dequantised"
        family = "float" if e.is_float else integer
        record = program.record("linear", out=[1], ins=[0], weights=[0, 1])
        name = f"linear {encoding} {policy} {rows}x{cols} g{group} {scale_type} T{tokens}"
        self.case(
            name, [record], [cols, rows], {0: x}, 1, tokens, want, bound, weights=[m, bias], family=family,
            policy=policy,
        )  # fmt: skip


def law(weights=(), caches=()):
    """The reference's op functions over these weights."""
    r = object.__new__(Reference)
    r._memo = lambda i, what: weights[i].values
    r.file = SimpleNamespace(caches=np.array(list(caches), program.CACHE_DTYPE))
    return r


def step_of(rows, positions=None, kvs=()):
    """A Step of one session."""
    zeros = np.zeros(rows, np.int32)
    positions = np.arange(rows) if positions is None else positions
    return Step(zeros, np.asarray(positions, np.int32), zeros, np.array([rows - 1], np.int32), list(kvs))


def linear_cases(v: Vectors, rng) -> None:
    """Every encoding, group, tail and number of tokens; the ends of the integer range; a row of many chunks."""
    every = [
        (0, "f32"),
        (4, "bf16"),
        (8, "f16"),
        (16, "f16"),
        (32, "bf16"),
        (96, "f32"),
        (16, K256),
        (32, K256),
    ]
    for e in MATRIX_ENCODINGS:
        groups = [g for g in every if parameters_are_valid(e, *g)] or [(32, "f16")]
        for group, scale_type in groups:
            for rows, cols in ((5, 33), (40, 100)):
                for tokens in TOKENS:
                    v.linear(rng, e.name, rows, cols, group, scale_type, tokens)
            for rows, cols in ((1, 1), (17, 31), (33, 7), (16, 64)):
                v.linear(rng, e.name, rows, cols, group, scale_type, 5)
        v.linear(rng, e.name, 18, 1100, 64, "f16", 13)
        if e.is_integer and not e.group and e.offset != "zero":
            v.linear(rng, e.name, 18, 1100, 16, K256, 13)
            v.linear(rng, e.name, 18, 1104, 16, K256, 1)
        if e.is_integer:
            v.linear(rng, e.name, 18, 96, 32, "f32", 7, extreme=True)
            v.linear(rng, e.name, 18, 96, 32, "f32", 1, extreme=True)
            for rows, cols, group, scale_type in (
                (17, 31, 0, "f32"),
                (40, 100, 8, "bf16"),
                (3, 520, 32, "f16"),
                (3, 520, 16, K256),
            ):
                v.linear(rng, e.name, rows, cols, group, scale_type, 3, policy="f32")


def row_cases(v: Vectors, rng) -> None:
    """The ops that treat rows alike."""
    for e in MATRIX_ENCODINGS:
        m = v.rig.random_matrix(rng, e.name, 37, 33, 4, "f16")
        ids = rng.integers(0, 37, 9)
        rec = program.record("embed", out=[0], weights=[0])
        v.case(f"embed {e.name}", [rec], [33], {}, 0, 9, m.values[ids], 0.0, weights=[m], ids=ids)
    for dim in (1, 16, 33, 96):
        x = rng.standard_normal((4, 2 * dim)).astype(np.float32)
        w, bias = (v.rig.vector(rng.standard_normal(dim)) for _ in range(2))
        for ws in ([0, None], [None, None]):
            want = law([w]).rmsnorm(step_of(4), x, ws[0], 1e-5, dim)
            rec = program.record("rmsnorm", out=[1], ins=[0], weights=ws[:1], eps=1e-5, dim=dim)
            bound = 2.0**-22 * np.abs(want).max()
            v.case(f"rmsnorm {dim}", [rec], [2 * dim] * 2, {0: x}, 1, 4, want, bound, weights=[w])
        for ws in ([0, 1], [None, None]):
            want = law([w, bias]).layernorm(step_of(4), x, *ws, 1e-5, dim)
            rec = program.record("layernorm", out=[1], ins=[0], weights=ws, eps=1e-5, dim=dim)
            bound = 2.0**-22 * np.abs(want).max()
            v.case(f"layernorm {dim}", [rec], [2 * dim] * 2, {0: x}, 1, 4, want, bound, weights=[w, bias])
    for dim in (1, 2, 8, 16, 64, 512):
        x = rng.standard_normal((3, 3 * dim)).astype(np.float32)
        rec = program.record("hadamard", out=[1], ins=[0], dim=dim)
        want = law().hadamard(step_of(3), x, dim)
        bound = 2.0**-21 * np.abs(want).max()
        v.case(f"hadamard {dim}", [rec], [3 * dim] * 2, {0: x}, 1, 3, want, bound)
    x, order = rng.standard_normal((3, 40)).astype(np.float32), rng.integers(0, 40, 77)
    rec, index = program.record("gather", out=[1], ins=[0], weights=[0]), v.rig.index_vector(order)
    v.case("gather", [rec], [40, 77], {0: x}, 1, 3, x[:, order], 0.0, weights=[index])
    a, b = (rng.standard_normal((3, 37)).astype(np.float32) for _ in range(2))
    recs = [program.record("add", out=[0], ins=[0, 1], scale=0.3), program.record("mul", out=[2], ins=[0, 1])]
    v.case("add mul", recs, [37] * 3, {0: a, 1: b}, 2, 3, (a + np.float32(0.3) * b) * b, 0.0)
    x = np.concatenate([np.linspace(-12, 12, 301), rng.standard_normal(100) * 0.02, [0, 60, -60, 300]])
    x = x.astype(np.float32)[None]
    n, up = x.shape[1], rng.standard_normal(x.shape).astype(np.float32)
    for name, function in sorted(FUNCTIONS.items()):
        want = apply_function(name, x, 1.7)
        exact = name != "gelu"  # erf is the C library's
        rec = program.record("unary", out=[1], ins=[0], function=function, p=1.7)
        bound = 2.0**-22 * np.abs(want).max()
        v.case(f"unary {name}", [rec], [n, n], {0: x}, 1, 1, want, bound, exact=exact)
        if name not in ("scale", "softcap"):
            rec = program.record("glu", out=[1], ins=[0], function=function)
            both = np.concatenate([x, up], axis=1)
            bound = 2.0**-21 * np.abs(want * up).max()
            v.case(f"glu {name}", [rec], [2 * n, n], {0: both}, 1, 1, want * up, bound, exact=exact)
    for heads, head_dim, n in ((3, 8, 4), (2, 20, 5), (1, 128, 64)):
        freq = v.rig.vector(10000.0 ** (-np.arange(n) / n))
        x, at = rng.standard_normal((4, heads * head_dim)).astype(np.float32), [0, 1, 77, 100000]
        want = law([freq]).rope(step_of(4, at), x, 0, head_dim, 1.25)
        rec = program.record("rope", out=[1], ins=[0], weights=[0], head_dim=head_dim, mscale=1.25)
        v.case(
            f"rope {head_dim}", [rec], [x.shape[1]] * 2, {0: x}, 1, 4, want, 2.0**-21, weights=[freq], positions=at,
            exact=False,
        )  # fmt: skip


def attend_cases(v: Vectors, rng) -> None:
    """KV_PUT and ATTEND: shared heads, windows, odd sizes, both caches."""
    shapes = [
        ((2, 16, 16, 0), 2),
        ((2, 64, 64, 0), 8),
        ((1, 40, 24, 0), 5),
        ((3, 5, 7, 9), 3),
        ((1, 80, 96, 70), 7),
    ]
    for (shape, heads), mode, softcap in (
        (s, m, c)
        for s in shapes
        for m in ("f32", "f16", "k8v8", "k8v4", "tq3", "kt1v8", "tq3-qjl")
        for c in (0.0, 5.0)
    ):
        rows, (kv_heads, k_dim, v_dim, _) = 90, shape
        widths = (heads * k_dim, kv_heads * k_dim, kv_heads * v_dim)
        x = {i: rng.standard_normal((rows, w)).astype(np.float32) for i, w in enumerate(widths)}
        kv = KV(np.array([shape], program.CACHE_DTYPE), mode)
        kv.reserve(rows)
        ref = law(caches=[shape])
        ref.kv_put(step_of(rows, kvs=[kv]), x[1], x[2], 0)
        want = ref.attend(step_of(rows, kvs=[kv]), x[0], 0, 0.3, softcap)
        recs = [
            program.record("kv_put", ins=[1, 2], cache=0),
            program.record("attend", out=[3], ins=[0], cache=0, scale=0.3, softcap=softcap),
        ]
        bound = (2.0**-6 if kv_modes.mode(mode).packed else 3e-6) * np.abs(x[2]).max()
        v.case(
            f"attend {shape} {mode}", recs, [*widths, heads * v_dim], x, 3, rows, want, bound, caches=[shape],
            kv_mode=mode,
        )  # fmt: skip


def far_case(v: Vectors, rng) -> None:
    """A few rows far apart, so that segments of the context are summed apart and merged."""
    shape, heads, positions = (2, 16, 24, 0), 6, [5, 700, 1500, 2999]
    widths, rows = (heads * 16, 2 * 16, 2 * 24), len(positions)
    x = {i: rng.standard_normal((rows, w)).astype(np.float32) for i, w in enumerate(widths)}
    kv, ref = KV(np.array([shape], program.CACHE_DTYPE), "f16"), law(caches=[shape])
    kv.reserve(positions[-1] + 1)
    step = step_of(rows, positions, kvs=[kv])
    ref.kv_put(step, x[1], x[2], 0)
    want = ref.attend(step, x[0], 0, 0.3, 0.0)
    recs = [
        program.record("kv_put", ins=[1, 2], cache=0),
        program.record("attend", out=[3], ins=[0], cache=0, scale=0.3, softcap=0.0),
    ]
    v.case(
        "attend far", recs, [*widths, heads * 24], x, 3, rows, want, 3e-6 * np.abs(x[2]).max(), caches=[shape],
        kv_mode="f16", positions=positions,
    )  # fmt: skip


def layer_case(v: Vectors, rng) -> None:
    """From ids to logits through one layer; policy f32, where an error of the rope stays small."""
    dim, head, vocab, rows = 48, 16, 50, 21
    ids = rng.integers(0, vocab, rows)
    shapes = [(vocab, dim), (5 * head, dim), (dim, 3 * head), (160, dim), (dim, 80), (vocab, dim)]
    m = [v.rig.random_matrix(rng, "q8", *s, 32, "f16") for s in shapes]
    m += [v.rig.vector(rng.uniform(0.5, 1.5, dim)), v.rig.vector(0.3 ** np.arange(head // 2))]
    slots = [dim, dim, 5 * head, (3 * head, 2, 0, 0), (head, 2, 3 * head, 0), (head, 2, 4 * head, 0)]
    slots += [3 * head, 160, 80, (dim, 9, 0, 1), (vocab, 10, 0, 1)]
    r, norm = program.record, {"weights": [6], "eps": 1e-5, "dim": dim}
    rope = {"weights": [7], "head_dim": head, "mscale": 1.0}
    recs = [
        r("embed", out=[0], weights=[0]), r("rmsnorm", out=[1], ins=[0], **norm),
        r("linear", out=[2], ins=[1], weights=[1]), r("rope", out=[3], ins=[3], **rope),
        r("rope", out=[4], ins=[4], **rope), r("kv_put", ins=[4, 5], cache=0),
        r("attend", out=[6], ins=[3], cache=0, scale=0.25, softcap=0.0),
        r("linear", out=[1], ins=[6], weights=[2]), r("add", out=[0], ins=[0, 1], scale=1.0),
        r("rmsnorm", out=[1], ins=[0], **norm), r("linear", out=[7], ins=[1], weights=[3]),
        r("glu", out=[8], ins=[7], function=FUNCTIONS["silu"]), r("linear", out=[1], ins=[8], weights=[4]),
        r("add", out=[0], ins=[0, 1], scale=1.0), r("pick", out=[9], ins=[0]),
        r("linear", out=[10], ins=[9], weights=[5]),
    ]  # fmt: skip
    caches, picks = [(1, head, head, 0)], [20, 3]
    ref, w = law(m, caches), [a.values for a in m]
    step = step_of(rows, kvs=[KV(np.array(caches, program.CACHE_DTYPE), "f32")])
    step.kvs[0].reserve(rows)
    x = w[0][ids]
    q, k, value = np.split(ref.rmsnorm(step, x, 6, 1e-5, dim) @ w[1].T, [3 * head, 4 * head], axis=1)
    ref.kv_put(step, ref.rope(step, k, 7, head, 1.0), value, 0)
    x = x + ref.attend(step, ref.rope(step, q, 7, head, 1.0), 0, 0.25, 0.0) @ w[2].T
    gate, up = np.split(ref.rmsnorm(step, x, 6, 1e-5, dim) @ w[3].T, 2, axis=1)
    want = (x + (apply_function("silu", gate, 0.0) * up) @ w[4].T)[picks] @ w[5].T
    bound = 1e-5 * float(np.abs(want).max())
    v.case(
        "a layer", recs, slots, {}, 10, rows, want, bound, weights=m, caches=caches, family="dequantised",
        policy="f32", ids=ids, picks=picks, exact=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def vectors(rig, tmp_path_factory) -> Path:
    """The file, written once for all machines."""
    v, rng = Vectors(rig), np.random.default_rng(31)
    linear_cases(v, rng)
    row_cases(v, rng)
    attend_cases(v, rng)
    far_case(v, rng)
    layer_case(v, rng)
    v.data[:16] = struct.pack("<8s2I", b"HBPARITY", 1, v.cases)
    path = tmp_path_factory.mktemp("parity") / "vectors.bin"
    path.write_bytes(v.data)
    return path


@pytest.fixture(scope="module")
def arm() -> Path:
    """The library and the driver built for AArch64."""
    return AARCH64.built()


def check(command: list[str], isas: list[str]) -> None:
    """The driver succeeds and tried every kernel of exactly these instruction sets."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert sorted({line[0] for line in lines}) == sorted(isas)
    assert all(line[-1] == "ok" and int(line[2]) > 0 for line in lines)
    for isa in isas:
        assert any(line[0] == isa and line[1].endswith(f"_{isa}") for line in lines)


@pytest.mark.parametrize("machine", MACHINES)
def test_arm_gives_the_bits_of_this_machine(machine, arm, vectors):
    check([QEMU, "-L", SYSROOT, "-cpu", machine, str(arm / "parity"), str(vectors)], MACHINES[machine])


@pytest.fixture
def driver(rig) -> Path:
    """The driver for this machine, as `make native` builds it."""
    folders = (native.library_path().parent, ROOT / "build" / "native")
    found = next((f / "parity" for f in folders if (f / "parity").is_file()), None)
    if found is None:
        pytest.skip("native/tests/parity.c is not built (make native)")
    return found


def test_the_driver_on_this_machine(rig, driver, vectors):
    check([str(driver), str(vectors)], rig.usable())


def test_the_driver_notices_a_wrong_bit(driver, vectors, tmp_path):
    data = bytearray(vectors.read_bytes())
    data[-1] ^= 1  # the exponent of the last logit of the last case
    (tmp_path / "flipped.bin").write_bytes(data)
    (tmp_path / "short.bin").write_bytes(data[:-64])
    done = subprocess.run([driver, tmp_path / "flipped.bin"], capture_output=True, text=True)
    assert done.returncode == 1 and "a layer differs" in done.stdout
    done = subprocess.run([driver, tmp_path / "short.bin"], capture_output=True, text=True)
    assert done.returncode == 2 and "too short" in done.stderr
