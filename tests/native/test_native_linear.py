"""LINEAR in C: every encoding, instruction set, token count and odd shape against the reference."""

from __future__ import annotations

import numpy as np
import pytest

from halfbyte.formats import program, tiles
from halfbyte.formats.encodings import BY_NAME, K256, MATRIX_ENCODINGS, parameters_are_valid
from halfbyte.runtime.backends import reference

INTEGERS = [e.name for e in MATRIX_ENCODINGS if e.is_integer]
CODES = [e.name for e in MATRIX_ENCODINGS if e.has_codes]
FLOATS = [e.name for e in MATRIX_ENCODINGS if e.is_float]
SHAPES = [
    (1, 1),
    (16, 32),
    (5, 33),
    (17, 31),
    (40, 100),
    (33, 7),
    (16, 64),
    (3, 97),
    (20, 4),
    (15, 36),
    (32, 80),
]
TOKENS = [1, 2, 3, 8, 33]


VARIANTS = [
    (0, "f32"),
    (4, "bf16"),
    (8, "f16"),
    (16, "f32"),
    (16, "f16"),
    (32, "bf16"),
    (64, "f16"),
    (96, "f32"),
    (16, K256),
    (32, K256),
]


def variants(encoding):
    """(group, scale type) to try; one for the encodings that fix them."""
    e = BY_NAME[encoding]
    return [v for v in VARIANTS if parameters_are_valid(e, *v)] or [(32, "f16")]


def expected(m, x):
    """The reference's integer linear."""
    return reference.linear_i8g32(x, m.codes, m.tensor)


@pytest.mark.parametrize("encoding", INTEGERS)
def test_every_isa_gives_the_bits_of_the_reference(rig, encoding):
    # the reference's fma rounds in float64 first, so a rare last bit may differ from a true fma: at most
    # one unit in the last place of the largest partial sum. Between instruction sets nothing may differ.
    rng = np.random.default_rng(1)
    exact = total = 0
    for rows, cols in SHAPES:
        for group, scale_type in variants(encoding):
            m = rig.random_matrix(rng, encoding, rows, cols, group, scale_type)
            bias = rng.standard_normal(rows).astype(np.float32)
            for tokens in TOKENS if (rows, cols) in ((40, 100), (5, 33)) else (1, 13):
                x = rng.standard_normal((tokens, cols)).astype(np.float32)
                want = expected(m, x) + bias
                got = {isa: rig.linear(m, x, bias, isa=isa) for isa in rig.usable()}
                for isa, y in got.items():
                    assert np.array_equal(y, got["scalar"]), (isa, rows, cols, group, scale_type, tokens)
                exact += int((want == got["scalar"]).sum())
                total += want.size
                size = np.abs(want).max() + np.abs(x).max() * np.abs(m.values).max() * cols
                assert np.abs(want - got["scalar"]).max() <= size * 2.0**-22
    assert exact >= 0.999 * total


@pytest.mark.parametrize("encoding", INTEGERS)
def test_integer_sums_are_exact_at_the_ends_of_the_range(rig, encoding):
    # powers of two as scales make the whole epilogue exact: every bit must be the reference's
    rng = np.random.default_rng(2)
    for rows, cols, tokens in ((18, 96, 1), (18, 96, 5), (16, 40, 3), (7, 128, 14)):
        m = rig.random_matrix(rng, encoding, rows, cols, 32, "f32", extreme=True)
        x = np.where(rng.random((tokens, cols)) < 0.5, -127.0, 127.0).astype(np.float32)
        want = expected(m, x)
        for isa in rig.usable():
            assert np.array_equal(rig.linear(m, x, isa=isa), want), isa


@pytest.mark.parametrize("encoding", FLOATS)
def test_float_matrices(rig, encoding):
    rng = np.random.default_rng(3)
    for rows, cols in [*SHAPES, (33, 600)]:
        m = rig.random_matrix(rng, encoding, rows, cols)
        for tokens in TOKENS:
            x = rng.standard_normal((tokens, cols)).astype(np.float32)
            want = x.astype(np.float64) @ m.values.T.astype(np.float64)
            bound = (np.abs(x) @ np.abs(m.values).T).max() * cols**0.5 * 2.0**-23
            got = {isa: rig.linear(m, x, isa=isa) for isa in rig.usable()}
            for isa, y in got.items():
                assert np.abs(y - want).max() <= bound, (isa, rows, cols, tokens)
                assert np.array_equal(y, got["scalar"]), isa


@pytest.mark.parametrize("encoding", CODES)
def test_policy_f32_dequantises(rig, encoding):
    rng = np.random.default_rng(4)
    cases = [(17, 31, 0, "f32"), (40, 100, 8, "bf16"), (3, 520, 32, "f16")]
    for rows, cols, group, scale_type in cases:
        m = rig.random_matrix(rng, encoding, rows, cols, group, scale_type)
        for tokens in (1, 3, 9):
            x = rng.standard_normal((tokens, cols)).astype(np.float32)
            want = x.astype(np.float64) @ m.values.T.astype(np.float64)
            bound = (np.abs(x) @ np.abs(m.values).T).max() * cols**0.5 * 2.0**-23
            got = {isa: rig.linear(m, x, isa=isa, policy="f32") for isa in rig.usable()}
            for isa, y in got.items():
                assert np.abs(y - want).max() <= bound, (isa, rows, cols, tokens)
                assert np.array_equal(y, got["scalar"]), isa


@pytest.mark.parametrize("encoding", [e.name for e in MATRIX_ENCODINGS if e.kind == "float8"])
def test_every_8_bit_float(rig, encoding):
    m = rig.random_matrix(np.random.default_rng(8), encoding, 256, 1, 0, "f32")
    codes, scales = tiles.planes(encoding, 256, 1, 0, "f32")
    m.data[: codes.nbytes] = tiles.pack_codes(np.arange(256, dtype=np.uint8)[:, None], 8)
    m.data[scales.offset :].view(np.float32)[:] = 1
    want = np.array(BY_NAME[encoding].levels, np.float32)
    for isa in rig.usable():
        y = rig.linear(m, np.ones((1, 1), np.float32), isa=isa)
        np.testing.assert_array_equal(y[0], want, err_msg=isa)
    b = rig.Bound([program.record("embed", out=[0], weights=[0])], [1], [m])
    np.testing.assert_array_equal(b.run({}, 0, 256, ids=np.arange(256))[:, 0], want)


@pytest.mark.parametrize("policy", ["i8g32", "f32"])
@pytest.mark.parametrize("encoding", [e.name for e in MATRIX_ENCODINGS])
def test_a_row_does_not_depend_on_its_company(rig, encoding, policy):
    rng = np.random.default_rng(5)
    m = rig.random_matrix(rng, encoding, 50, 1100, 64, "f16")
    x = rng.standard_normal((131, 1100)).astype(np.float32)
    for isa in rig.usable():
        whole = rig.linear(m, x, isa=isa, threads=3, policy=policy)
        for size in (1, 2, 3, 4, 5, 12, 97):
            first = 131 - size
            part = rig.linear(m, x[first:], isa=isa, policy=policy)
            assert np.array_equal(part, whole[first:]), (isa, size)


def test_quantize_is_the_reference(rig):
    rng = np.random.default_rng(6)
    rows = [rng.standard_normal(n).astype(np.float32) for n in (1, 31, 32, 33, 100, 256)]
    rows.append(np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.0, 126.5] * 4, np.float32))  # ties
    rows.append(np.full(32, 2.0**-101, np.float32))
    rows.append(np.array([2.0**-100, -(2.0**-100)] * 16, np.float32))
    rows.append(np.array([3e38, -3.4e38] * 16, np.float32))
    rows.append(np.zeros(40, np.float32))
    rows.append((rng.standard_normal(64) * 1e-30).astype(np.float32))
    probe = rig.Bound([], [1])
    for x in rows:
        want_q, want_d = reference.quantize_activations(x[None])
        for isa in rig.usable():
            for block in (4, 8, 16, 32):
                q, d = np.zeros(want_q.shape[1], np.int8), np.zeros(want_d.shape[1], np.float32)
                sums = np.zeros(len(q) // block, np.int32)
                cast = probe.ffi.cast
                assert not probe.lib.hb_quantize(
                    cast("float *", x.ctypes.data), len(x), block, rig.ISAS.index(isa), cast("int8_t *", q.ctypes.data),
                    cast("float *", d.ctypes.data), cast("int32_t *", sums.ctypes.data),
                )  # fmt: skip
                assert np.array_equal(q, want_q[0]) and np.array_equal(d, want_d[0]), isa
                assert np.array_equal(sums, q.reshape(-1, block).sum(axis=1, dtype=np.int32))


def test_not_a_number_stays_in_its_row(rig):
    rng = np.random.default_rng(7)
    m = rig.random_matrix(rng, "q4", 20, 64)
    x = rng.standard_normal((6, 64)).astype(np.float32)
    clean = rig.linear(m, x)
    x[2, 5], x[4, 40] = np.nan, np.inf
    for isa in rig.usable():
        y = rig.linear(m, x, isa=isa)
        keep = [0, 1, 3, 5]
        assert np.array_equal(y[keep], clean[keep])
