"""Round to nearest: every code against slow NumPy, and the optimality that the search promises."""

import numba
import numpy as np
import pytest

from halfbyte.converter import quantizers
from halfbyte.converter.quantizers import rtn
from halfbyte.formats import encodings
from halfbyte.formats.errors import CheckpointError, UsageError

LEVELS = np.array(encodings.Q4_LEVELS, np.float64)
# Two float32 sums of 32 non-negative terms may each be off by this share; errors closer than it are equal.
SUM_ROUNDING = 2 * 32 * 2.0**-24


def gaussian(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def heavy_tailed(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(5, (rows, cols)).astype(np.float32)


def nmse(w: np.ndarray, decoded: np.ndarray) -> float:
    w = w.astype(np.float64)
    return float(np.sum((w - decoded) ** 2) / np.sum(w**2))


def nearest_error(x: np.ndarray, weights: np.ndarray, d: float, shift: int) -> float:
    """Smallest weighted error of one group under scale d: every level tried for every weight (float64)."""
    squares = (x[:, None] - d * (LEVELS + shift)) ** 2
    return float(np.sum(weights * squares.min(axis=1)))


def each_group(w: np.ndarray, codes: np.ndarray, sub: np.ndarray, row: np.ndarray):
    """Yield (columns, x, codes, S, k, shift) of every group, decoded one by one as the format defines."""
    for n in range(w.shape[0]):
        r = int(row[n])
        s = 0.0 if r == 0 else (1 + (r & 3) / 4) * 2.0 ** ((r >> 2) - 60)
        for g in range(sub.shape[1]):
            columns = slice(g * 32, min((g + 1) * 32, w.shape[1]))
            b = int(sub[n, g])
            yield (
                columns,
                w[n, columns].astype(np.float64),
                codes[n, columns],
                s,
                (b & 254) - 127,
                4 * (b & 1),
            )


def test_registry_lists_methods_by_file_name():
    assert "rtn" in quantizers.methods()
    assert not [name for name in quantizers.methods() if name.startswith("_")]
    assert quantizers.load("rtn") is rtn
    with pytest.raises(UsageError, match="choose one of"):
        quantizers.load("_grid")


@pytest.mark.parametrize("cols", [*range(1, 66), 300])
def test_q8_follows_its_definition(cols):
    w = heavy_tailed(3, cols, cols)
    w[1] *= np.float32(1e-3)
    w[2, : cols // 2] = 0
    codes, scales = rtn.quantize_q8(w)
    assert codes.dtype == np.int8 and scales.dtype == np.float16
    assert scales.shape == (3, -(-cols // 32))
    for g in range(scales.shape[1]):
        x = w[:, g * 32 : (g + 1) * 32]
        s = (np.abs(x).max(axis=1) / np.float32(127)).astype(np.float16)
        assert np.array_equal(scales[:, g], s)
        s = s.astype(np.float32)[:, None]
        expected = np.clip(np.rint(np.divide(x, s, out=np.zeros_like(x), where=s > 0)), -127, 127)
        assert np.array_equal(codes[:, g * 32 : (g + 1) * 32], expected)
        assert np.array_equal(rtn.dequantize_q8(codes, scales)[:, g * 32 : (g + 1) * 32], s * expected)


def test_q8_scale_overflow_is_refused_not_infinite():
    w = gaussian(4, 64)
    w[2, 40] = 65504 * 127
    assert np.isfinite(rtn.quantize_q8(w)[1]).all()
    w[2, 40] = 65600 * 127
    with pytest.raises(CheckpointError, match="does not fit"):
        rtn.quantize_q8(w)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 37])
def test_values_that_are_not_finite_are_refused(bad, position):
    w = gaussian(3, 40)
    w[1, position] = bad
    for quantize in (rtn.quantize_q8, rtn.quantize_q4, lambda w: rtn.quantize_affine(w, "a4", 32, "f32")):
        with pytest.raises(CheckpointError):
            quantize(w)


def test_q4_decodes_exactly_as_written_in_the_format():
    w = heavy_tailed(5, 77)
    w[3] = 0
    codes, sub, row = rtn.quantize_q4(w)
    decoded = rtn.dequantize_q4(codes, sub, row)
    assert codes.dtype == sub.dtype == row.dtype == np.uint8 and codes.max() <= 15
    assert decoded.dtype == np.float32
    groups = list(each_group(w, codes, sub, row))
    for n in range(5):
        for g, (columns, _, c, s, k, shift) in enumerate(groups[n * 3 : n * 3 + 3]):
            expected = (np.float32(s) * np.float32(k)) * (LEVELS[c] + shift).astype(np.float32)
            assert np.array_equal(decoded[n, columns], expected), (n, g)


@pytest.mark.parametrize("cols", [*range(1, 66), 97, 256])
@pytest.mark.parametrize("weighted", [False, True])
def test_q4_no_single_step_lowers_the_error(cols, weighted):
    w = heavy_tailed(3, cols, cols)
    w[1] *= np.linspace(0.01, 3, cols, dtype=np.float32)
    importance = np.random.default_rng(cols).lognormal(size=cols) if weighted else None
    codes, sub, row = rtn.quantize_q4(w, importance)
    weights = np.ones(cols) if importance is None else importance
    for columns, x, c, s, k, shift in each_group(w, codes, sub, row):
        v = weights[columns]
        error = float(np.sum(v * (x - s * k * (LEVELS[c] + shift)) ** 2))
        slack = 1 + SUM_ROUNDING
        assert error <= nearest_error(x, v, s * k, shift) * slack  # so no change of any code helps
        for step in (-2, 2):
            if abs(k + step) <= 127:
                assert error <= nearest_error(x, v, s * (k + step), shift) * slack


def test_q4_is_close_to_the_best_of_all_sub_scales():
    w = heavy_tailed(40, 64)
    codes, sub, row = rtn.quantize_q4(w)
    found = best = 0.0
    for _, x, c, s, k, shift in each_group(w, codes, sub, row):
        found += float(np.sum((x - s * k * (LEVELS[c] + shift)) ** 2))
        best += min(nearest_error(x, np.ones(32), s * j, t) for j in range(-127, 128, 2) for t in (0, 4))
    assert best <= found * (1 + SUM_ROUNDING)
    assert found <= best * 1.002


def test_q4_error_is_at_most_that_of_full_range_linear_codes():
    for make in (gaussian, heavy_tailed):
        w = make(200, 256)
        x = w.reshape(-1, 32)
        peak = x[np.arange(len(x)), np.abs(x).argmax(axis=1)][:, None]
        linear = np.clip(np.rint(x / (peak / -8)), -8, 7) * (peak / -8)
        linear_error = np.sum((x - linear) ** 2, axis=1).reshape(200, 8).sum(axis=1)
        error = np.sum((w - rtn.dequantize_q4(*rtn.quantize_q4(w))) ** 2, axis=1)
        assert (error < linear_error).all()


@pytest.mark.parametrize(("make", "bound"), [(gaussian, 0.00507), (heavy_tailed, 0.00685)])
def test_q4_error_on_random_data(make, bound):
    w = make(4000, 256)
    assert nmse(w, rtn.dequantize_q4(*rtn.quantize_q4(w))) < bound


def test_results_do_not_depend_on_threads_or_on_other_rows():
    w = heavy_tailed(1500, 224)
    importance = np.random.default_rng(3).lognormal(size=224)
    before = numba.get_num_threads()
    results = []
    try:
        for threads in sorted({1, min(2, before), before}):
            numba.set_num_threads(threads)
            results.append(
                (
                    *rtn.quantize_q4(w, importance),
                    *rtn.quantize_q8(w),
                    *rtn.quantize_affine(w, "z4", 32, "f16"),
                )
            )
    finally:
        numba.set_num_threads(before)
    codes, sub, row = results[0][:3]
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert (a is None and b is None) or np.array_equal(a, b)
    for first, last in ((0, 1), (3, 5), (590, 1021)):
        part = rtn.quantize_q4(w[first:last], importance)
        for a, b in zip(part, (codes, sub, row)):
            assert np.array_equal(a, b[first:last])


def test_q4_powers_of_two_move_only_the_row_scale():
    w = heavy_tailed(20, 100)
    codes, sub, row = rtn.quantize_q4(w)
    for power in (-40, -3, 1, 12):
        scaled = rtn.quantize_q4(w * np.float32(2.0**power))
        assert np.array_equal(scaled[0], codes) and np.array_equal(scaled[1], sub)
        assert np.array_equal(scaled[2].astype(int), row.astype(int) + 4 * power)


def test_q4_zero_tiny_and_empty():
    w = gaussian(6, 70)
    w[0] = 0
    w[1] *= np.float32(1e-30)
    w[2] = np.float32(1e-45)
    w[3, 32:64] = 0
    w[4, :32] *= np.float32(1e-20)
    codes, sub, row = rtn.quantize_q4(w)
    decoded = rtn.dequantize_q4(codes, sub, row)
    assert (row[:3] == 0).all() and (decoded[:3] == 0).all()
    # No level is zero: what stands for zero is one unit of the row's scale, far below its other values.
    assert np.abs(decoded[3, 32:64]).max() <= np.abs(w[3]).max() / 10000
    assert np.abs(decoded[4, :32]).max() <= np.abs(w[4]).max() / 10000
    for shape in ((0, 5), (5, 0), (0, 0)):
        codes, sub, row = rtn.quantize_q4(np.zeros(shape, np.float32))
        assert codes.shape == shape and sub.shape == (shape[0], -(-shape[1] // 32)) and row.shape == shape[:1]
        assert rtn.quantize_q8(np.zeros(shape, np.float32))[0].shape == shape


def test_q4_largest_value_fits_and_more_is_refused():
    w = np.full((1, 8), 14.0 * 127 * 127, np.float32)
    assert np.array_equal(rtn.dequantize_q4(*rtn.quantize_q4(w)), w)
    with pytest.raises(CheckpointError, match="does not fit q4"):
        rtn.quantize_q4(w * np.float32(1.01))


def test_importance_moves_the_error_off_the_important_columns():
    w = heavy_tailed(500, 256)
    importance = np.random.default_rng(1).lognormal(size=256)
    plain = rtn.dequantize_q4(*rtn.quantize_q4(w))
    weighted = rtn.dequantize_q4(*rtn.quantize_q4(w, importance))
    cost = [float(np.sum(importance * (w - decoded) ** 2)) for decoded in (plain, weighted)]
    assert cost[1] < 0.9 * cost[0]
    assert nmse(w, weighted) < 1.25 * nmse(w, plain)


def test_importance_that_is_constant_or_zero_changes_nothing():
    w = gaussian(8, 50)
    expected = rtn.quantize_q4(w)
    for value in (1.0, 7.0, 0.0):
        for a, b in zip(rtn.quantize_q4(w, np.full(50, value, np.float32)), expected):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("value", [np.full(49, 1.0), np.full(50, np.nan), np.full(50, -1.0)])
def test_bad_importance_is_refused(value):
    for quantize in (rtn.quantize_q4, rtn.quantize_q8):
        with pytest.raises(UsageError, match="importance"):
            quantize(gaussian(2, 50), value)


def test_any_layout_and_float_type_of_the_same_values():
    w = gaussian(30, 96).astype(np.float16)
    read_only = w.astype(np.float32)
    read_only.flags.writeable = False
    expected = rtn.quantize_q4(w.astype(np.float32))
    for same in (w, w.astype(np.float64), read_only, np.asfortranarray(w)):
        for a, b in zip(rtn.quantize_q4(same), expected):
            assert np.array_equal(a, b)


def possible_values(encoding: str, scale: float, minimum: float, zero: float) -> np.ndarray:
    """Every value that one group can hold, float32, by the formula of the encoding."""
    bits = int(encoding[1])
    codes = np.arange(-127, 128) if encoding == "i8" else np.arange(1 << bits)
    zero = 1 << (bits - 1) if encoding[0] == "i" and bits < 8 else zero
    return np.float32(scale) * (codes - zero).astype(np.float32) + np.float32(minimum)


@pytest.mark.parametrize("encoding", rtn.AFFINE)
@pytest.mark.parametrize(
    ("group", "scale_type"), [(0, "f32"), (4, "f16"), (16, "bf16"), (32, "f16"), (64, "bf16")]
)
def test_affine_codes_are_the_nearest_of_all(encoding, group, scale_type):
    w = heavy_tailed(6, 75) + np.float32(0.3)
    w[2] = 0
    w[3] = np.abs(w[3]) + 1
    w[4] *= np.float32(1e-9)
    codes, scales, mins, zeros = rtn.quantize_affine(w, encoding, group, scale_type)
    groups = encodings.group_count(75, group)
    assert codes.dtype == (np.int8 if encoding == "i8" else np.uint8)
    assert (mins is not None) == (encoding[0] == "a") and (zeros is not None) == (encoding[0] == "z")
    for values in (scales, mins):
        if values is not None:
            assert values.shape == (6, groups)
            bits = encodings.float_to_bits(values, scale_type)
            assert np.array_equal(encodings.bits_to_float(bits, scale_type), values)
    decoded = encodings.dequantize(encoding, codes, scales, group, mins, zeros)
    width = group or 75
    for n in range(6):
        for j in range(75):
            g = j // width
            m = mins[n, g] if mins is not None else 0.0
            z = float(zeros[n, g]) if zeros is not None else 0.0
            values = possible_values(encoding, scales[n, g], m, z)
            nearest = np.abs(values - w[n, j]).min()
            # A tie within float32 rounding of the division may go either way.
            assert abs(decoded[n, j] - w[n, j]) <= nearest + np.abs(values).max() * 2.0**-22


# NMSE of Gaussian weights: a little above what the search finds, and 5 to 40 % below what the full range has.
BOUNDS = (
    ("i2", 0.115), ("a2", 0.092), ("z2", 0.116), ("i3", 0.0275), ("z3", 0.0266), ("i4", 0.0068), ("a4", 0.0053),
    ("z4", 0.0063), ("i5", 0.00172), ("a5", 0.00135), ("i6", 0.00043),
)  # fmt: skip


@pytest.mark.parametrize(("encoding", "bound"), BOUNDS)
def test_affine_search_beats_the_full_range(encoding, bound):
    w = gaussian(500, 256)
    codes, scales, mins, zeros = rtn.quantize_affine(w, encoding, 32, "f16")
    assert nmse(w, encodings.dequantize(encoding, codes, scales, 32, mins, zeros)) < bound


def test_affine_refuses_what_cannot_be():
    w = gaussian(2, 64)
    for encoding, group, scale_type in (
        ("q4", 32, "f16"),
        ("a4", 12, "f16"),
        ("a4", -32, "f16"),
        ("a4", 32, "f8"),
    ):
        with pytest.raises(UsageError):
            rtn.quantize_affine(w, encoding, group, scale_type)
    with pytest.raises(CheckpointError, match="f16 scales"):
        rtn.quantize_affine(w * np.float32(1e9), "a8", 32, "f16")
    with pytest.raises(UsageError):
        rtn.quantize_q4(np.zeros(5, np.float32))
