"""AWQ, SmoothQuant and rotations: what they are for, on a trained model with outlier channels put in."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import halfbyte
from halfbyte.converter import models
from halfbyte.converter.assemble import assemble
from halfbyte.converter.blas import Products
from halfbyte.converter.builder import Builder
from halfbyte.converter.calibrate import Calibration
from halfbyte.converter.checkpoints import open_checkpoint
from halfbyte.converter.fold import MATRIX, Fold
from halfbyte.converter.quantizers import _hadamard, _planes, awq, rotation, smoothquant
from halfbyte.converter.recipe import recipe
from halfbyte.converter.weights import Weights
from halfbyte.runtime.backends.reference import Reference
from halfbyte.runtime.evaluate import log_softmax


class PerToken(Reference):
    """Activations rounded with one scale a token; `turns`: matrices whose inputs a Hadamard op would turn."""

    bits = 8
    turns: dict[int, _hadamard.Rotation] = {}  # noqa: RUF012

    def linear(self, step: Any, x: np.ndarray, matrix: int, bias: int | None) -> np.ndarray:
        if matrix in self.turns:
            x = self.turns[matrix].apply(x.astype(np.float64), 0).astype(np.float32)
        most = np.float32(2 ** (self.bits - 1) - 1)
        scale = np.maximum(np.abs(x).max(axis=1, keepdims=True) / most, np.float32(1e-30))
        return (np.rint(x / scale) * scale) @ self._memo(matrix, "values").T


class Trained:
    """tinystories-656k with outliers: builder, fold, calibration text and a text to be judged by."""

    def __init__(self, data: Path, folder: Path):
        self.path = folder / "m.hb"
        source = data / "tinystories-656k"
        reference = halfbyte.load(halfbyte.convert(source, folder / "f32.hb", recipe="f32"), policy="f32")
        text = (data / "text" / "tinystories.txt").read_text()
        encode = reference.tokenizer.encode
        self.ids = encode(text[200_000:201_000], bos=False)[:200]
        self.wanted = log_softmax(reference.session().feed_all(self.ids))
        self.b = Builder(open_checkpoint(source, None), recipe("f32"))
        models.build(self.b)
        self.fold = Fold(self.b)
        rng = np.random.default_rng(0)
        for site in (s for s in self.fold.sites if not s.obstacle):
            s = np.ones(site.width)
            s[rng.choice(site.width, 3, replace=False)] = 1 / 60
            self.fold.scale(site, s)
        parts = [encode(text[a : a + 1500], bos=False)[:256] for a in range(0, 30_000, 5000)]
        self.weights = Weights(self.b)
        self.calibration = Calibration(self.b, self.weights, parts)

    def kl(self, backend: type[Reference] | None = None) -> float:
        """KL against the untouched model; the weights stay float, so only activations round."""
        meta: Any = {
            "general.name": "t",
            "model.vocab_size": self.b.vocab,
            "model.context_length": self.b.context_limit,
        }
        assemble(self.b, self.path, meta, b"", "", lambda *_: None)
        model = halfbyte.load(self.path, backend="reference", policy="f32", kv="f32")
        if backend:
            model.backend = backend(model.file, "f32")
        ours = log_softmax(model.session().feed_all(self.ids))
        return float((np.exp(self.wanted) * (self.wanted - ours)).sum(axis=1).mean())


def emulated(bits: int, turns: dict[int, _hadamard.Rotation] | None = None) -> type[Reference]:
    return type("Emulated", (PerToken,), {"bits": bits, "turns": turns or {}})


def test_smoothing_at_least_halves_the_loss_of_int8_tokens(shared_data: Path, tmp_path: Path) -> None:
    plain = Trained(shared_data, tmp_path)
    assert plain.kl() < 1e-6  # the outliers themselves changed nothing
    before = plain.kl(emulated(8))
    smooth = Trained(shared_data, tmp_path)
    assert len(smoothquant.apply(smooth.fold, smooth.calibration)) == 8
    after = smooth.kl(emulated(8))
    assert after < before / 2 and before > 0.05


def test_rotation_at_least_halves_the_loss_of_int4_tokens(shared_data: Path, tmp_path: Path) -> None:
    before = Trained(shared_data, tmp_path).kl(emulated(4))
    turned = Trained(shared_data, tmp_path)
    rotation.residual(turned.fold)
    rotation.heads(turned.fold)
    offline = turned.kl(emulated(4))
    assert offline < before / 2
    b = turned.b
    records = len(b._records)
    assert rotation.online(turned.fold) == b.layers
    added = [i for i, r in enumerate(b._records) if r.op == "hadamard"]
    assert len(b._records) == records + b.layers == records + len(added)
    turns = {}
    for i in added[::-1]:  # what the op will do, done by NumPy
        r, reader = b._records[i], b._records[i + 1]
        assert r.out == r.ins and reader.op == "linear" and reader.ins == r.out and r.attrs["dim"] == 128
        matrix = reader.weights[MATRIX]
        assert matrix is not None
        turns[matrix] = _hadamard.Rotation(np.ones(r.ins[0].width), 1, int(r.attrs["dim"]))
        del b._records[i]
    assert turned.kl(emulated(16, turns)) < 1e-4
    assert turned.kl(emulated(4, turns)) < offline


def coder(w: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """q4 and back."""
    return _planes.decode(_planes.nearest(w, "q4", importance=importance), "q4")


def test_awq_finds_outlier_columns_and_folds_them(shared_data: Path, tmp_path: Path) -> None:
    t = Trained(shared_data, tmp_path)
    found = awq.apply(t.fold, t.calibration, coder)
    assert len(found) == 8 and all(gain <= 1 for _, gain in found)
    # what the first norm feeds really is read back with less error, by about as much as was promised
    assert min(gain for _, gain in found) < 0.9
    assert t.kl() < 1e-6  # and the function is the same


def test_awq_keeps_weights_that_round_well() -> None:
    """White inputs: no exponent beats none, and the scales are ones."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 128)).astype(np.float32)

    class Site:
        width = 128

        def columns(self, s: np.ndarray) -> np.ndarray:
            return s

        reduce = columns

    with Products(1) as products:
        s, gain = awq.search(Site(), [w], np.eye(128), coder, products)  # type: ignore[arg-type]
    np.testing.assert_array_equal(s, np.ones(128))
    assert gain == 1


def test_clip_never_raises_the_error_of_a_row() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_t(3, (48, 128)).astype(np.float32)
    x = rng.normal(size=(500, 128)) * np.exp(rng.normal(size=128))
    h = x.T @ x / len(x)
    with Products(1) as products:
        clipped = awq.clip(w, h, coder, products)
        importance = np.diagonal(h)
        before = awq.output_error(w - coder(w, importance), h, products)
        after = awq.output_error(w - coder(clipped, importance), h, products)
    assert (after <= before * (1 + 1e-6)).all() and after.sum() < 0.995 * before.sum()
    assert (np.abs(clipped) <= np.abs(w)).all()


def test_smoothing_formula() -> None:
    s = smoothquant.scales(np.array([100.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0]), 0.5)
    assert s[0] / s[1] == pytest.approx(10)
    assert np.exp(np.log(s).mean()) == pytest.approx(1)
    assert np.isfinite(s).all() and (s > 0).all()


@pytest.mark.parametrize("order", [12, 20, 24, 28, 36, 44, 60, 76, 84, 108, 140, 148])
def test_paley_matrices_are_hadamard(order: int) -> None:
    h = _hadamard.core(order)
    assert h is not None and set(np.unique(h)) == {-1.0, 1.0}
    np.testing.assert_array_equal(h @ h.T, order * np.eye(order))


@pytest.mark.parametrize(
    ("width", "parts"),
    [
        (64, (1, 64)),
        (192, (12, 16)),
        (896, (28, 32)),
        (1536, (12, 128)),
        (172, (1, 4)),
        (11008, (1, 256)),
        (7, (1, 1)),
    ],
)
def test_rotations_of_any_width(width: int, parts: tuple[int, int]) -> None:
    assert _hadamard.factors(width) == parts
    turn = _hadamard.Rotation.random(width, seed=1)
    x = np.random.default_rng(0).normal(size=(5, width))
    y = turn.apply(x, 0)
    np.testing.assert_allclose(y @ y.T, x @ x.T, atol=1e-9)  # lengths and angles stay
    half = width // turn.span // 2 * turn.span  # whole blocks may come by themselves
    parts_of_y = (turn.apply(x[:, :half], 0), turn.apply(x[:, half:], half))
    np.testing.assert_array_equal(np.concatenate(parts_of_y, axis=1), y)
    if turn.span == width > 1:  # one channel spreads over all
        np.testing.assert_allclose(np.abs(turn.apply(np.eye(1, width), 0)), width**-0.5)


def test_sylvester_order() -> None:
    """The order of the HADAMARD op: H2n = [[Hn, Hn], [Hn, -Hn]]."""
    h = np.ones((1, 1))
    for n in (2, 4, 8, 16):
        h = np.block([[h, h], [h, -h]])
        np.testing.assert_array_equal(_hadamard.sylvester(np.eye(n)), h)
