"""Learned rounding, the planes it works on, and mean-bias correction."""

import itertools

import numba
import numpy as np
import pytest

from halfbyte.converter.quantizers import _planes, autoround, bias
from halfbyte.formats import encodings
from halfbyte.formats.errors import UsageError

FORMS = (
    ("q4", 32, "f16"), ("q8", 32, "f16"), ("i4", 32, "f16"), ("i4", 0, "f32"), ("i8", 64, "bf16"),
    ("a4", 64, "f16"), ("a8", 32, "f32"), ("z4", 16, "f16"), ("z8", 32, "f32"),
)  # fmt: skip


def case(rows: int = 21, cols: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, correlated inputs with means and outlier columns, and their second moments."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(cols, cols)) * np.exp(rng.normal(size=cols))
    x = rng.normal(size=(1000, cols)) @ mix / cols + 0.3 * rng.normal(size=cols)
    return rng.standard_t(5, (rows, cols)).astype(np.float32), x, x.T @ x / len(x)


def losses(w: np.ndarray, read: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    e = w.astype(np.float64) - read
    return np.einsum("rc,cd,rd->r", e, hessian, e)


def damped(hessian: np.ndarray) -> np.ndarray:
    return hessian + autoround.DAMPING * np.diagonal(hessian).mean() * np.eye(len(hessian))


@pytest.mark.parametrize(("encoding", "group", "scale_type"), FORMS)
def test_ladder_says_what_the_format_says(encoding: str, group: int, scale_type: str) -> None:
    w, _, _ = case()
    planes = _planes.nearest(w, encoding, group, scale_type)
    ladder = _planes.climb(planes, encoding, group, scale_type)
    np.testing.assert_array_equal(ladder.value(), _planes.decode(planes, encoding, group))
    back = _planes.store(ladder, planes, encoding)
    for name, plane in planes.items():
        np.testing.assert_array_equal(back[name], plane)
    # any choice of scales and levels can be stored, and is read back as chosen
    rng = np.random.default_rng(1)
    ladder.choice = rng.integers(0, ladder.scales.shape[2], ladder.choice.shape)
    ladder.ranks = rng.integers(0, len(ladder.levels), ladder.ranks.shape)
    stored = _planes.store(ladder, planes, encoding)
    np.testing.assert_array_equal(_planes.decode(stored, encoding, group), ladder.value())


@pytest.mark.parametrize(("encoding", "group", "scale_type"), FORMS)
@pytest.mark.parametrize("options", [{}, {"sweeps": 0}, {"iterations": 0}], ids=["both", "learn", "descend"])
def test_learning_lowers_the_output_error(encoding, group, scale_type, options) -> None:
    w, _, hessian = case()
    start = _planes.nearest(w, encoding, group, scale_type, np.diagonal(hessian).copy())
    planes = autoround.quantize(
        w, encoding, hessian, group=group, scale_type=scale_type, start=start, **options
    )
    before, after = (losses(w, _planes.decode(p, encoding, group), damped(hessian)) for p in (start, planes))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < (0.95 if options.get("sweeps") == 0 else 0.7) * before.sum()
    for name, plane in planes.items():  # the same planes, of the same types
        assert plane.dtype == start[name].dtype and plane.shape == start[name].shape


def test_descent_ends_where_no_single_code_helps() -> None:
    """Every neighbouring code of every weight, tried by itself with the format's own decoder, is no better."""
    w, _, hessian = case(rows=3, cols=40)
    planes = autoround.quantize(w, "i4", hessian, iterations=20, sweeps=1000)
    h = damped(hessian)
    least = losses(w, _planes.decode(planes, "i4"), h)
    for j, step in itertools.product(range(40), (-1, 1)):
        other = dict(planes, codes=planes["codes"].copy())
        other["codes"][:, j] = np.clip(planes["codes"][:, j].astype(int) + step, 0, 15)
        assert (losses(w, _planes.decode(other, "i4"), h) >= least * (1 - 1e-4)).all()


def test_uncorrelated_inputs_leave_nearest_codes() -> None:
    """With a diagonal Hessian rounding to nearest is optimal: given its scales no code moves."""
    w, _, _ = case()
    start = _planes.nearest(w, "q8")
    planes = autoround.quantize(w, "q8", np.eye(w.shape[1]), start=start, damping=0.0)
    same = planes["scales"] == start["scales"]
    assert same.mean() > 0.2
    np.testing.assert_array_equal(planes["codes"][:, :32][same[:, 0]], start["codes"][:, :32][same[:, 0]])


def test_threads_do_not_change_a_bit() -> None:
    w, _, hessian = case(rows=70)
    found = []
    for threads in (1, 2):
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        found.append(autoround.quantize(w, "q4", hessian))
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    for name in found[0]:
        np.testing.assert_array_equal(found[0][name], found[1][name])


def test_dead_columns_and_rows_of_zeros() -> None:
    w, _, hessian = case()
    w[3], hessian[:, 7], hessian[7] = 0, 0, 0
    for encoding in ("q4", "i4", "a4"):
        read = _planes.decode(autoround.quantize(w, encoding, hessian), encoding)
        assert np.isfinite(read).all() and (read[3] == 0).all()
    nothing = autoround.quantize(w, "q4", np.zeros_like(hessian))
    assert np.isfinite(_planes.decode(nothing, "q4")).all()


def test_wrong_hessians_are_refused() -> None:
    w, _, hessian = case()
    for bad in (hessian[:-1, :-1], hessian * np.nan):
        with pytest.raises(UsageError, match="finite Hessian"):
            autoround.quantize(w, "q4", bad)
    with pytest.raises(UsageError, match="does not know f16"):
        _planes.climb({}, "f16")


def test_bias_takes_the_mean_error_away() -> None:
    w, x, hessian = case()
    read = encodings.dequantize("i4", *(_planes.nearest(w, "i4")[k] for k in ("codes", "scales")), 32)
    values = bias.correction(w, read, x.mean(axis=0))
    before = x @ (w - read).T.astype(np.float64)
    after = before - values
    assert np.abs(after.mean(axis=0)).max() < 1e-5 * np.abs(before).max()
    removed = 1 - (after**2).sum() / (before**2).sum()
    assert removed > 0.01
    assert bias.gain(w, read, hessian, x.mean(axis=0)) == pytest.approx(removed, rel=1e-4)
