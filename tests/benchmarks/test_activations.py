"""What smoothing and rotations are for: activations of one scale a token, on a model with outlier channels."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import activations
from activations import Rounding, Subject
from methods import DEMO, Bench, Inputs

from halfbyte.converter import calibrate, evaluate

INT8, STATIC, INT4 = activations.ROUNDINGS


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The demo model; calibrated on our mix, measured on our held-out text, which have nothing in common."""
    texts = [p.read_text(encoding="utf-8") for p in (evaluate.BUILT_IN, calibrate.BUILT_IN)]
    return Bench(Inputs(DEMO, None, texts[0][:1200], texts[1][:6000], 256), tmp_path_factory.mktemp("a"))


def kld(bench: Bench, kinds: str, remedy: str, *roundings: Rounding) -> list[float]:
    subject = Subject(bench, kinds, remedy)
    return [subject.kld(r) for r in roundings]


@pytest.mark.parametrize("kinds", ["norm", "all"])
def test_smoothing_and_rotations_undo_outlier_channels(bench: Bench, kinds: str) -> None:
    plain = kld(bench, kinds, "nothing", INT8, STATIC, INT4)
    smooth = kld(bench, kinds, "smooth", INT8, STATIC)
    rotated = kld(bench, kinds, "R1 R2 R4", INT8, INT4)
    assert 2 * smooth[0] < plain[0] and 2 * smooth[1] < plain[1]
    assert 2 * rotated[0] < plain[0] and 2 * rotated[1] < plain[2]


def test_the_outliers_change_the_rounding_and_not_the_function(bench: Bench) -> None:
    exact = Rounding(24, "token")
    for remedy in ("nothing", "smooth, R1 R2 R4"):
        assert kld(bench, "all", remedy, exact)[0] < 0.02  # of q8 weights alone
    clean, spoilt = (kld(bench, kinds, "nothing", INT8)[0] for kinds in ("", "norm"))
    assert spoilt > 5 * clean


def test_rounding() -> None:
    x = np.float32([[1, -0.6, 0.26], [100, 1, 0]])
    by_token = Rounding(4, "token")(x, 0.0)
    np.testing.assert_allclose(by_token, [[1, -4 / 7, 2 / 7], [100, 0, 0]], rtol=1e-6)
    by_tensor = Rounding(8, "tensor")(x, 12.7)
    np.testing.assert_allclose(by_tensor, [[1, -0.6, 0.3], [12.7, 1, 0]], rtol=1e-6)
