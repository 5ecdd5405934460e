"""The reference against independent mathematics: float64 textbook formulas and scalar loops."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from cases import ALL, ATTENTION, CASES, FLOATING, Case
from programs import Logical, Tiny, code_matrix

from halfbyte.formats.container import File
from halfbyte.formats.encodings import BY_NAME as BY_ENCODING
from halfbyte.formats.encodings import (
    FP4_LEVELS,
    MATRIX_ENCODINGS,
    Q2_LEVELS,
    Q3_LEVELS,
    Q4_LEVELS,
    Q5_LEVELS,
    parameters_are_valid,
)
from halfbyte.formats.ops import BY_NAME, FUNCTIONS, OPS, PARAMETRIC
from halfbyte.runtime.backends.backend import Step
from halfbyte.runtime.backends.reference import Reference, apply_function, quantize_activations
from halfbyte.runtime.kv import KV

PLAIN = [c for c in ALL if c.variant == "plain"]


def test_every_op_function_and_encoding_has_a_case() -> None:
    """The table of cases is as large as the table of ops."""
    assert [op.name for op in OPS if not CASES[op.name]] == []
    for op in OPS:
        places = {c.variant for c in CASES[op.name]}
        assert {"plain", "view"} <= places and ("inplace" in places) == op.in_place
    covered = {op: {c.covers for c in CASES[op]} for op in CASES}
    assert covered["unary"] == set(FUNCTIONS)
    assert covered["glu"] == set(FUNCTIONS) - set(PARAMETRIC)
    assert covered["linear"] == covered["embed"] == {e.name for e in MATRIX_ENCODINGS}
    assert all(BY_NAME[c.op] for c in ALL) and len({str(c) for c in ALL}) == len(ALL)


def run(
    file: File, policy: str, ids: np.ndarray, positions: np.ndarray | None = None
) -> tuple[Reference, Step]:
    """One step of one session with every row picked, executed on the reference."""
    kv = KV(file.caches, "f32")
    kv.reserve(64)
    rows = np.arange(len(ids), dtype=np.int32)
    step = Step(ids.astype(np.int32), rows if positions is None else positions, rows * 0, rows, [kv])
    law = Reference(file, policy)
    law.run(step)
    return law, step


def operands(file: File, tested: int, law: Reference, step: Step) -> tuple[list[np.ndarray], np.ndarray]:
    """Inputs and output of the record under test, float64 (the programs of plain cases keep both)."""
    r = file.program[tested]
    ins = [law.slot(int(i), step).astype(np.float64) for i in r["in"] if int(i) < len(file.slots)]
    return ins, law.slot(int(r["out"][0]), step).astype(np.float64)


# Level tables that SPEC.md 5.3 lists, and the shifts of the q family.
TABLES = {
    "q2": Q2_LEVELS,
    "q3": Q3_LEVELS,
    "q4": Q4_LEVELS,
    "q5": Q5_LEVELS,
    "n4": Q4_LEVELS,
    "m4": FP4_LEVELS,
}
SHIFTS = {"q2": 5, "q3": 4, "q4": 4, "q5": 2, "q6": 2}


def float8(code: int, mantissa: int, bias: int) -> float:
    """A finite 8-bit float, by the text of SPEC.md 5.5."""
    e, m = code % 128 >> mantissa, code % (1 << mantissa)
    size = m / 2**mantissa * 2.0 ** (1 - bias) if e == 0 else (1 + m / 2**mantissa) * 2.0 ** (e - bias)
    return -size if code > 127 else size


def scalar_level(encoding: str, c: int) -> float:
    """L[c], by the text of SPEC.md 5."""
    if encoding in TABLES:
        return TABLES[encoding][c]
    if encoding == "q6":
        return 4 * (c - 32)
    if encoding.startswith("f8"):
        return float8(c, *((3, 7) if encoding == "f8e4m3" else (2, 15)))
    return c - {"i2": 2, "i3": 4, "i4": 8, "i5": 16, "i6": 32}.get(encoding, 0)


def scalar_weight(t: Logical, encoding: str, i: int, j: int) -> tuple[float, float]:
    """(w[i, j], its size before cancellation) of a code matrix, by the text of SPEC.md section 5."""
    p, group = t.planes, t.spec.group
    g = 0 if group == 0 else j // group
    level = scalar_level(encoding, int(p["codes"][i, j]))
    if encoding in SHIFTS:
        b, r = int(p["scales"][i, g]), int(p["row"][i])
        big = 0.0 if r == 0 else (1 + (r % 4) / 4) * 2.0 ** (r // 4 - 60)
        w = big * ((b - b % 2) - 127) * (level + SHIFTS[encoding] * (b % 2))
        return w, abs(w)

    def number(plane: str, above: str) -> float:
        v = p[plane][i, g]
        if t.spec.scale_type == "k256":
            return float(p[above][i, g * group // 256]) * int(v)
        if t.spec.scale_type == "bf16":
            return float(np.array([int(v) << 16], np.uint32).view(np.float32)[0])
        return float(v)

    s = number("scales", "super")
    if encoding[0] == "a":
        m = number("mins", "supermin") * (-1 if t.spec.scale_type == "k256" else 1)
        return s * level + m, abs(s * level) + abs(m)
    w = s * (level - (int(p["zeros"][i, g]) if encoding[0] == "z" else 0))
    return w, abs(w)


CODED = [e for e in MATRIX_ENCODINGS if e.has_codes]
CHOICES = [
    (e.name, group, "bf16" if group == 8 else "f16")
    for e in CODED
    for group in (0, 4, 8, 16, 32, 64, 256)
    if e.scale == "*" or group == 0
] + [(e.name, group, "k256") for e in CODED for group in (16, 32) if parameters_are_valid(e, group, "k256")]


@pytest.mark.parametrize(("encoding", "group", "scale_type"), CHOICES)
def test_dequantised_values_are_the_formula(
    encoding: str, group: int, scale_type: str, tmp_path: Path
) -> None:
    """Through the file and back: every element is the scalar formula, to within its two roundings."""
    cols = 300 if scale_type == "k256" or group == 256 else 70
    tiny = Tiny(1)
    t = code_matrix("m", encoding, 49, cols, tiny.rng, group, scale_type)
    matrix, x, y = tiny.tensor(t), tiny.slot(cols), tiny.slot(49)
    tiny.emit("embed", [x], [], (matrix,))
    tiny.test("linear", [y], [x], (matrix, None))
    file = tiny.write(tmp_path / "m.hb")
    w = file.dequantize(file.tensors[0])
    for i in range(49):
        for j in range(cols):
            want, size = scalar_weight(t, encoding, i, j)
            assert abs(float(w[i, j]) - want) <= 2**-23 * size, (i, j)


@pytest.mark.parametrize(("name", "mantissa", "bias"), [("f8e4m3", 3, 7), ("f8e5m2", 2, 15)])
def test_float8_tables(name: str, mantissa: int, bias: int) -> None:
    """All 256 codes: the formula, the NaNs and infinities, and ml_dtypes' own tables."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    levels = np.array(BY_ENCODING[name].levels, np.float32)
    theirs = (
        np.arange(256)
        .astype(np.uint8)
        .view({"f8e4m3": ml_dtypes.float8_e4m3fn, "f8e5m2": ml_dtypes.float8_e5m2}[name])
    )
    np.testing.assert_array_equal(levels, theirs.astype(np.float32))
    special = {0x7F, 0xFF} if name == "f8e4m3" else {*range(0x7C, 0x80), *range(0xFC, 0x100)}
    for c in range(256):
        assert np.isfinite(levels[c]) == (c not in special)
        if c not in special:
            assert levels[c] == float8(c, mantissa, bias)


LINEARS = [c for c in PLAIN if c.op == "linear"]


@pytest.mark.parametrize("case", LINEARS, ids=str)
def test_linear_is_the_product_of_what_it_rounded_to(case: Case, tmp_path: Path) -> None:
    """Both policies against a float64 product; i8g32 of the rounded activations, block by block."""
    tiny = case.tiny()
    file = tiny.write(tmp_path / "m.hb")
    r = file.program[tiny.tested]
    weight = file.dequantize(file.tensors[int(r["w"][0])]).astype(np.float64)
    bias = (
        0.0
        if int(r["w"][1]) >= len(file.tensors)
        else file.dequantize(file.tensors[int(r["w"][1])]).astype(float)
    )
    for policy in ("f32", "i8g32"):
        law, step = run(file, policy, np.arange(9))
        (x,), y = operands(file, tiny.tested, law, step)
        if policy == "i8g32" and case.covers not in FLOATING:
            q, d = quantize_activations(x.astype(np.float32))
            rounded = (q.reshape(9, -1, 32) * d.astype(np.float64)[..., None]).reshape(9, -1)[:, : x.shape[1]]
            assert (np.abs(rounded - x) <= np.repeat(d, 32, axis=1)[:, : x.shape[1]] * 0.5001).all()
            x = rounded
        size = np.abs(x) @ np.abs(weight).T + np.abs(bias)
        # a min term of one block cancels in w but not in the sum: count it
        assert (
            np.abs(y - (x @ weight.T + bias)) <= 1e-5 * size + 1e-6 * np.abs(x).sum(axis=1)[:, None]
        ).all()


def test_activation_rounding_is_the_text_of_the_spec() -> None:
    """Scalar loop over SPEC.md 10.2: halves to even, empty and tiny groups, a short last group."""
    rng = np.random.default_rng(5)
    x = (rng.normal(size=(6, 70)) * 10.0 ** rng.integers(-30, 30, (6, 1))).astype(np.float32)
    x[0, :32] = 0
    x[1, 32:64] = 2.0**-101
    x[2, :32] = np.arange(32) / 2 - 8  # halves
    x[2, 31] = 127
    q, d = quantize_activations(x)
    assert q.shape == (6, 96) and d.shape == (6, 3) and not q[:, 70:].any()
    for t in range(6):
        for g in range(3):
            part = x[t, 32 * g : 32 * g + 32]
            amax = np.float32(max(abs(float(v)) for v in part))
            if amax < 2.0**-100:
                assert d[t, g] == 0 and not q[t, 32 * g : 32 * g + 32].any()
                continue
            assert d[t, g] == amax / np.float32(127)
            inverse = np.float32(127) / amax
            for j, v in enumerate(part):
                assert q[t, 32 * g + j] == max(-127, min(127, round(float(np.float32(v * inverse)))))


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_functions(name: str) -> None:
    """Scalar `math` formulas of the op table."""
    p = 2.5
    formulas = {
        "scale": lambda v: p * v,
        "softcap": lambda v: p * math.tanh(v / p),
        "silu": lambda v: v / (1 + math.exp(-v)),
        "gelu": lambda v: v * 0.5 * math.erfc(-v / math.sqrt(2)),
        "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
        "relu": lambda v: max(v, 0.0),
        "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
        "tanh": math.tanh,
    }
    x = np.concatenate([np.linspace(-6, 6, 401), [-80, 80, 0.0]]).astype(np.float32)
    want = np.array([formulas[name](float(v)) for v in x])
    got = apply_function(name, x, p)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=2e-7, atol=1e-15)


@pytest.mark.parametrize(
    "case", [c for c in PLAIN if c.op in ("rmsnorm", "layernorm", "rope", "add", "mul")], ids=str
)
def test_row_ops(case: Case, tmp_path: Path) -> None:
    """Norms run by run, rotations as complex products, sums: float64 loops over heads."""
    tiny = case.tiny()
    file = tiny.write(tmp_path / "m.hb")
    r = file.program[tiny.tested]
    positions = np.array([0, 3, 7, 1000, 31], np.int32)
    law, step = run(file, "f32", np.arange(5), positions)
    ins, y = operands(file, tiny.tested, law, step)
    ws = [
        file.dequantize(file.tensors[int(w)]).astype(float) if int(w) < len(file.tensors) else None
        for w in r["w"]
    ]
    floats, ints = r["attr"].view("<f4"), [int(v) for v in r["attr"]]
    x = ins[0]
    if case.op in ("add", "mul"):
        want = x + np.float64(floats[0]) * ins[1] if case.op == "add" else x * ins[1]
    elif case.op == "rope":
        head, scale = ints[0], float(floats[1])
        want = x.copy()
        n = len(ws[0])
        for a in range(0, x.shape[1], head):
            z = x[:, a : a + n] + 1j * x[:, a + n : a + 2 * n]
            z = z * np.exp(1j * positions[:, None] * ws[0]) * scale
            want[:, a : a + n], want[:, a + n : a + 2 * n] = z.real, z.imag
    else:
        want = np.empty_like(x)
        for a in range(0, x.shape[1], ints[1]):
            run_ = x[:, a : a + ints[1]]
            centre = run_.mean(axis=1, keepdims=True) if case.op == "layernorm" else 0
            z = (run_ - centre) / np.sqrt(
                ((run_ - centre) ** 2).mean(axis=1, keepdims=True) + float(floats[0])
            )
            z = z if ws[0] is None else z * ws[0]
            want[:, a : a + ints[1]] = z if ws[1] is None else z + ws[1]
    assert (np.abs(y - want) <= 5e-7 * np.abs(want).max(axis=1, keepdims=True) + 1e-12).all()


ATTENDS = [c for c in PLAIN if c.op == "attend"]


@pytest.mark.parametrize(("case", "shape"), list(zip(ATTENDS, ATTENTION)), ids=str)
def test_attention_with_an_explicit_mask(case: Case, shape: tuple, tmp_path: Path) -> None:
    """Textbook attention over full score matrices, a query head at a time, masked by position, window."""
    kv_heads, share, k_dim, v_dim, window, softcap = shape
    tiny = case.tiny()
    file = tiny.write(tmp_path / "m.hb")
    T = 21
    law, step = run(file, "f32", np.arange(T))
    (q,), y = operands(file, tiny.tested, law, step)
    put = file.program[tiny.tested - 1]
    k, v = (law.slot(int(i), step).astype(float) for i in put["in"][:2])
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    allowed = (j <= i) & ((i - j < window) if window else True)
    for h in range(kv_heads * share):
        kh = h // share
        s = (
            float(np.float32(k_dim**-0.5))
            * q[:, h * k_dim : (h + 1) * k_dim]
            @ k[:, kh * k_dim : (kh + 1) * k_dim].T
        )
        s = np.where(allowed, softcap * np.tanh(s / softcap) if softcap else s, -np.inf)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        want = p / p.sum(axis=1, keepdims=True) @ v[:, kh * v_dim : (kh + 1) * v_dim]
        np.testing.assert_allclose(y[:, h * v_dim : (h + 1) * v_dim], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in PLAIN if c.op == "hadamard"], ids=str)
def test_hadamard_is_its_matrix(case: Case, tmp_path: Path) -> None:
    """y[i] = sum (-1)^popcount(i & j) x[j] / sqrt(dim), run by run; twice is the identity."""
    tiny = case.tiny()
    file = tiny.write(tmp_path / "m.hb")
    law, step = run(file, "f32", np.arange(5))
    (x,), y = operands(file, tiny.tested, law, step)
    dim = int(file.program[tiny.tested]["attr"][0])
    i = np.arange(dim)
    parity = np.array([[bin(a & b).count("1") % 2 for b in i] for a in i])
    h = (1 - 2 * parity) / math.sqrt(dim)
    want = (x.reshape(5, -1, dim) @ h).reshape(x.shape)
    bound = 1e-7 * np.abs(want).max(axis=1, keepdims=True)
    assert (np.abs(y - want) <= bound).all()
    again = law.hadamard(step, y.astype(np.float32), dim)
    assert (np.abs(again - x) <= 4e-7 * np.abs(x).max(axis=1, keepdims=True)).all()


@pytest.mark.parametrize("case", [c for c in PLAIN if c.op == "gather"], ids=str)
def test_gather_copies_columns(case: Case, tmp_path: Path) -> None:
    """Column by column, and not simply the first ones."""
    tiny = case.tiny()
    file = tiny.write(tmp_path / "m.hb")
    law, step = run(file, "f32", np.arange(5))
    (x,), y = operands(file, tiny.tested, law, step)
    index = file.vector(file.tensors[int(file.program[tiny.tested]["w"][0])])
    assert index.dtype == np.uint32 and index[-1] == x.shape[1] - 1
    for j, column in enumerate(index):
        np.testing.assert_array_equal(y[:, j], x[:, int(column)])
