"""GPTQ: the factorisation, the rounding against the loss it lowers, and the shapes and rows it must not depend on."""

import numpy as np
import pytest

from halfbyte.converter.blas import Products
from halfbyte.converter.quantizers import _planes, gptq, rtn
from halfbyte.formats import encodings
from halfbyte.formats.encodings import dequantize
from halfbyte.formats.errors import CheckpointError, UsageError


def problem(rows: int, cols: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights with heavy tails and correlated inputs' second moments with column scales a decade apart."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((cols, cols)) / np.sqrt(cols) + np.eye(cols)
    x = rng.standard_normal((4 * cols, cols)) @ mix * np.exp(rng.standard_normal(cols))
    return (0.02 * rng.standard_t(5, (rows, cols))).astype(np.float32), x.T @ x / len(x)


def solved(w: np.ndarray, hessian: np.ndarray, threads: int = 1, **kw: object) -> dict[str, np.ndarray]:
    with Products(threads) as p:
        return gptq.quantize(w, "q4", gptq.curvature(hessian, p), p, **kw)  # type: ignore[arg-type]


def decoded(planes: dict[str, np.ndarray]) -> np.ndarray:
    return dequantize("q4", planes["codes"], planes["scales"], 32, row=planes["row"])


def loss(w: np.ndarray, planes: dict[str, np.ndarray], hessian: np.ndarray) -> float:
    e = w.astype(np.float64) - decoded(planes)
    return float(np.einsum("ij,jk,ik->", e, hessian, e))


def nearest(w: np.ndarray, hessian: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(("codes", "scales", "row"), rtn.quantize_q4(w, np.diagonal(hessian))))


@pytest.mark.parametrize("cols", [1, 31, 32, 33, 172, 300, 544])
def test_the_factors_give_the_damped_matrix_back(cols: int) -> None:
    _, hessian = problem(1, cols)
    with Products(1) as p:
        c = gptq.curvature(hessian, p, damping=0.02)
    u = c.u.astype(np.float64)
    damped = hessian + 0.02 * np.diagonal(hessian).mean() * np.eye(cols)
    assert sorted(c.order) == list(range(cols)) and (np.triu(u) == u).all() and (np.diagonal(u) == 1).all()
    np.testing.assert_allclose(c.h, damped[np.ix_(c.order, c.order)], rtol=1e-6)
    np.testing.assert_allclose(u @ np.diag(c.d) @ u.T, c.h, atol=1e-6 * damped.max())
    for g, a, z in zip(c.number, c.groups, c.groups[1:]):  # a place holds one whole group of the matrix
        assert set(c.order[a:z]) == set(range(32 * g, min(32 * g + 32, cols)))


def test_groups_and_columns_that_weigh_most_come_first() -> None:
    _, hessian = problem(1, 200)
    with Products(1) as p:
        c = gptq.curvature(hessian, p)
    diagonal = np.diagonal(hessian)[c.order]
    peaks = [diagonal[a:z].max() for a, z in zip(c.groups, c.groups[1:])]
    assert peaks == sorted(peaks, reverse=True)
    assert all((np.diff(diagonal[a:z]) <= 0).all() for a, z in zip(c.groups, c.groups[1:]))


@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (16, 31), (40, 172), (130, 96), (65, 300)])
def test_the_loss_is_far_below_that_of_rounding_to_nearest(rows: int, cols: int) -> None:
    w, hessian = problem(rows, cols)
    plain = loss(w, nearest(w, hessian), hessian)
    greedy = loss(w, solved(w, hessian, passes=0), hessian)
    final = loss(w, solved(w, hessian), hessian)
    assert greedy < 0.9 * plain
    assert final < (
        0.97 * greedy if rows * cols > 5000 else greedy * (1 + 1e-6)
    )  # few columns leave little to move


def test_no_single_code_or_sub_scale_can_lower_the_loss_after_enough_passes() -> None:
    w, hessian = problem(12, 70)
    planes = solved(w, hessian, passes=200)
    damped = hessian + gptq.DAMPING * np.diagonal(hessian).mean() * np.eye(70)

    def losses(p: dict[str, np.ndarray]) -> np.ndarray:
        e = w.astype(np.float64) - decoded(p)
        return np.einsum("ij,jk,ik->i", e, damped, e)

    base = losses(planes)
    for column in range(70):
        for step in (-1, 1):
            moved = {**planes, "codes": planes["codes"].copy()}
            moved["codes"][:, column] = np.clip(moved["codes"][:, column].astype(int) + step, 0, 15)
            assert (losses(moved) >= base * (1 - 1e-5)).all()
    for group in range(3):
        for step in (-2, 2):
            moved = {**planes, "scales": planes["scales"].copy()}
            moved["scales"][:, group] = np.clip(moved["scales"][:, group].astype(int) + step, 0, 255)
            assert (losses(moved) >= base * (1 - 1e-5)).all()


def test_uncorrelated_inputs_leave_nothing_to_feed_forward() -> None:
    """Then the loss is a weighted squared error, and a search as good as that of round-to-nearest must be found."""
    w, _ = problem(64, 160)
    hessian = np.diag(np.exp(np.random.default_rng(1).standard_normal(160)))
    assert loss(w, solved(w, hessian), hessian) < 1.005 * loss(w, nearest(w, hessian), hessian)


def test_what_the_outputs_miss_is_made_up_for() -> None:
    """missing = M H moves the target by M, so the result must be close to w + M, not to w."""
    w, hessian = problem(400, 96)
    shift = np.float32(0.05) * np.random.default_rng(2).standard_normal((400, 96)).astype(np.float32)
    with Products(1) as p:
        c = gptq.curvature(hessian, p, damping=1e-6)
        planes = gptq.quantize(w, "q4", c, p, missing=shift.astype(np.float64) @ hessian)
        direct = gptq.quantize(w + shift, "q4", c, p)
    assert loss(w + shift, planes, hessian) < 1.05 * loss(w + shift, direct, hessian)
    assert loss(w, planes, hessian) > 10 * loss(w + shift, planes, hessian)


def test_results_do_not_depend_on_threads_or_on_other_rows() -> None:
    w, hessian = problem(300, 130)
    one = solved(w, hessian)
    for threads in (2, 5):
        other = solved(w, hessian, threads=threads)
        assert all((one[k] == other[k]).all() for k in one)
    part = solved(w[gptq.LANES : 2 * gptq.LANES], hessian)
    assert all((one[k][gptq.LANES : 2 * gptq.LANES] == part[k]).all() for k in one)


def test_rows_of_zeros_and_columns_without_input() -> None:
    w, hessian = problem(20, 64)
    w[3] = 0
    w[4] = 1e-20
    hessian[10], hessian[:, 10] = 0, 0
    planes = solved(w, hessian)
    back = decoded(planes)
    assert not back[3].any() and not back[4].any() and np.isfinite(back).all()
    assert np.abs(back[:, 10] - w[:, 10]).max() < 0.5 * np.abs(w).max()  # damping keeps it near its value


def test_the_scale_of_the_weights_does_not_matter() -> None:
    w, hessian = problem(20, 64)
    plain, scaled = solved(w, hessian), solved(np.ldexp(w, -30), hessian)
    assert (plain["codes"] == scaled["codes"]).all() and (plain["scales"] == scaled["scales"]).all()


def test_no_calibration_at_all_is_a_plain_search() -> None:
    w, _ = problem(50, 96)
    eye = np.eye(96)
    assert loss(w, solved(w, eye), eye) < 1.005 * loss(w, nearest(w, eye), eye)
    dead = solved(w, np.zeros((96, 96)))
    assert loss(w, dead, eye) < 1.005 * loss(w, nearest(w, eye), eye)


def test_refusals() -> None:
    w, hessian = problem(4, 32)
    with Products(1) as p:
        with pytest.raises(CheckpointError, match="not finite"):
            gptq.curvature(np.full((4, 4), np.nan), p)
        c = gptq.curvature(hessian, p)
        for encoding in ("q8", "f16", "f8e4m3", "n4"):
            with pytest.raises(UsageError, match=encoding):
                gptq.quantize(w, encoding, c, p)
        with pytest.raises(UsageError, match="k256"):
            gptq.quantize(w, "a4", c, p, scale_type="k256")
        with pytest.raises(CheckpointError, match="f16 scales"):
            gptq.quantize(w * np.float32(1e9), "a4", c, p)


# ---- integers with float scales, minima and zero points -----------------------------------------------------------


def affine(
    w: np.ndarray, hessian: np.ndarray, encoding: str, group: int = 32, threads: int = 1, **kw: object
) -> dict[str, np.ndarray]:
    with Products(threads) as p:
        return gptq.quantize(w, encoding, gptq.curvature(hessian, p, group=group), p, **kw)  # type: ignore[arg-type]


def affine_loss(
    w: np.ndarray, planes: dict[str, np.ndarray], hessian: np.ndarray, encoding: str, group: int
) -> float:
    e = w.astype(np.float64) - _planes.decode(planes, encoding, group)
    return float(np.einsum("ij,jk,ik->", e, hessian, e))


def off_centre(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """A problem whose rows have means, so that minima and zero points have something to do."""
    w, hessian = problem(rows, cols)
    return w + 0.02 * np.random.default_rng(3).standard_normal((rows, 1)).astype(np.float32), hessian


@pytest.mark.parametrize("encoding", rtn.AFFINE)
def test_affine_output_error_is_far_below_that_of_rounding_to_nearest(encoding: str) -> None:
    for rows, cols, group, scale_type in ((65, 172, 32, "f16"), (40, 130, 0, "f32"), (16, 96, 16, "bf16")):
        w, hessian = off_centre(rows, cols)
        start = _planes.nearest(w, encoding, group, scale_type)
        plain = affine_loss(w, start, hessian, encoding, group)
        greedy, planes = (
            affine(w, hessian, encoding, group, passes=n, scale_type=scale_type) for n in (0, gptq.PASSES)
        )
        assert affine_loss(w, greedy, hessian, encoding, group) < 0.9 * plain
        assert affine_loss(w, planes, hessian, encoding, group) < 0.75 * plain
        for name, plane in start.items():  # the same planes, which the scale type holds
            assert planes[name].dtype == plane.dtype and planes[name].shape == plane.shape
            if name in ("scales", "mins"):
                stored = encodings.float_to_bits(planes[name], scale_type)
                assert (encodings.bits_to_float(stored, scale_type) == planes[name]).all()


@pytest.mark.parametrize("encoding", ["i3", "a4", "z2", "z4"])
def test_affine_no_single_code_can_lower_the_loss_after_enough_passes(encoding: str) -> None:
    w, hessian = off_centre(9, 70)
    planes = affine(w, hessian, encoding, passes=300)
    damped = hessian + gptq.DAMPING * np.diagonal(hessian).mean() * np.eye(70)

    def losses(p: dict[str, np.ndarray]) -> np.ndarray:
        e = w.astype(np.float64) - _planes.decode(p, encoding, 32)
        return np.einsum("ij,jk,ik->i", e, damped, e)

    base, most = losses(planes), (1 << int(encoding[1])) - 1
    for column in range(70):
        for step in (-1, 1):
            codes = planes["codes"].copy()
            codes[:, column] = np.clip(codes[:, column].astype(int) + step, 0, most)
            assert (losses({**planes, "codes": codes}) >= base * (1 - 1e-5)).all()


def test_affine_minima_and_zero_points_are_used() -> None:
    """Weights far from zero: a grid through zero would spend its levels where nothing is."""
    w, hessian = problem(20, 96)
    w += np.float32(1)
    errors = {e: affine_loss(w, affine(w, hessian, e), hessian, e, 32) for e in ("i4", "a4", "z4")}
    assert errors["a4"] < 0.05 * min(errors["i4"], errors["z4"])
    w -= np.float32(0.97)  # one-sided, zero within reach
    errors = {e: affine_loss(w, affine(w, hessian, e), hessian, e, 32) for e in ("i4", "a4", "z4")}
    assert errors["z4"] < 0.7 * errors["i4"]


def test_affine_dead_rows_small_scales_and_threads() -> None:
    w, hessian = off_centre(300, 96)
    w[3], hessian[10], hessian[:, 10] = 0, 0, 0
    for encoding in ("i4", "i8", "a2", "z3"):
        one = affine(w, hessian, encoding)
        assert not _planes.decode(one, encoding, 32)[3].any()
        two = affine(w, hessian, encoding, threads=3)
        assert all((one[k] == two[k]).all() for k in one)
        tiny = affine(np.ldexp(w, -40), hessian, encoding, scale_type="f32")
        whole = affine(w, hessian, encoding, scale_type="f32")
        assert (tiny["codes"] == whole["codes"]).all()
        assert (np.ldexp(tiny["scales"], 40) == whole["scales"]).all()
