"""Far context in every cache mode, on a model made by hand that can only answer by looking back."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import halfbyte

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import induction
import long_context

LENGTH = 2048


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> halfbyte.Model:
    path = tmp_path_factory.mktemp("induction") / "m.hb"
    return halfbyte.load(str(induction.make(path, vocab=LENGTH // 2, context=LENGTH)))


# A position head like this one's is the hardest case for low-bit keys: in layer 0 the modes of 3 bits and less lose it.
@pytest.mark.parametrize("mode", ["f32", "f16", "k8v8", "k8v4", "tq3,0=k8v8", "tq2,0=k8v8"])
def test_what_was_said_before_is_found(model: halfbyte.Model, mode: str) -> None:
    found = long_context.measure(model, mode, LENGTH)
    assert found.needles == 1
    assert found.copied > 0.99
    assert max(found.nll) < 0.05


def test_the_model_needs_its_context(model: halfbyte.Model) -> None:
    ids = np.random.default_rng(1).permutation(model.vocab_size)[:64].tolist()
    seen = model.session("f32")
    seen.feed(ids)
    assert int(np.argmax(seen.feed(ids[10:11]))) == ids[11]
    other = model.session("f32")
    other.feed([i for i in ids if i != ids[10]])
    assert int(np.argmax(other.feed(ids[10:11]))) != ids[11]


def test_keys_of_three_bits_lose_a_position_head(model: halfbyte.Model) -> None:
    assert long_context.measure(model, "tq3", LENGTH).copied < 0.9
