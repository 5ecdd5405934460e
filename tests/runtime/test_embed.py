"""Embeddings: the states before the logits, pooled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from story import story_folder
from tiny import load_case

import halfbyte
from halfbyte.formats.errors import UsageError
from halfbyte.runtime.backends.backend import Step
from halfbyte.runtime.embed import embed
from halfbyte.runtime.model import Model

TEXTS = [[0, 5, 6, 7], [9], [0, 8], list(range(5, 290)) * 2, [3, 4]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embed")
    return halfbyte.convert(story_folder(folder / "c", context=700), folder / "m.hb", recipe="f32")


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return halfbyte.load(path)


def states(model: Model, ids: list[int]) -> np.ndarray:
    """float32[T, width] of one step."""
    kv = model.new_kv()
    kv.reserve(len(ids), 0)
    rows = np.arange(len(ids), dtype=np.int32)
    return model.states(Step(np.array(ids, np.int32), rows, np.zeros(len(ids), np.int32), rows, [kv]))


def test_states_make_the_logits(path: Path) -> None:
    model = halfbyte.load(path, backend="reference", policy="f32")
    ids = TEXTS[0]
    head = next(t for t in model.file.tensors if t.shape == (model.vocab_size, model.width))
    weights = model.backend._weight(model.file.tensors.index(head))  # type: ignore[attr-defined]
    made = states(model, ids) @ weights.T
    np.testing.assert_allclose(made, model.session().feed_all(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooling(model: Model, pooling: str) -> None:
    found = embed(model, TEXTS, pooling)
    assert found.shape == (len(TEXTS), model.width) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    for ids, row in zip(TEXTS, found):
        each = states(model, ids)
        if pooling == "last":
            wanted = each[-1]
        else:
            wanted = each[1:].mean(0) if ids[0] == 0 and len(ids) > 1 else each.mean(0)
        np.testing.assert_allclose(row, wanted / np.linalg.norm(wanted), rtol=1e-4, atol=1e-6)


def test_an_embedding_does_not_depend_on_its_neighbours(model: Model) -> None:
    together = embed(model, TEXTS)
    for ids, row in zip(TEXTS, together):
        np.testing.assert_array_equal(embed(model, [ids])[0], row)


def test_backends_agree(path: Path, backend: str) -> None:
    model = halfbyte.load(path, backend=backend, policy="f32")
    reference = halfbyte.load(path, backend="reference", policy="f32")
    np.testing.assert_allclose(embed(model, TEXTS[:3]), embed(reference, TEXTS[:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["gemma2-plain", "gemma3-plain", "granite-plain", "phi3-plain"])
def test_other_programs(tmp_path: Path, case: str) -> None:
    load_case(case).write_folder(tmp_path / "c")
    model = halfbyte.load(halfbyte.convert(tmp_path / "c", tmp_path / "m.hb", recipe="q8"))
    found = embed(model, [[5, 6, 7], [5, 6, 9]])
    assert np.isfinite(found).all() and found[0] @ found[1] < 0.9999


def test_bad_texts(model: Model) -> None:
    for texts in ([[]], [[1] * 701], [[10**6]], [[-1]]):
        with pytest.raises(UsageError):
            embed(model, texts)
    with pytest.raises(UsageError, match="pooling"):
        embed(model, [[1]], "max")
