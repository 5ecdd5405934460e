"""The recorded vectors are whole, and the weights made here are the ones they were recorded with."""

import json

import numpy as np
import pytest
import tiny

CASES = tiny.case_names()


def test_every_case_is_recorded() -> None:
    assert len(CASES) == 29
    assert sorted(file.stem for file in tiny.VECTORS.glob("*.npz")) == CASES
    assert sum(file.stat().st_size for file in tiny.VECTORS.iterdir()) < 1_500_000


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_recorded(name: str) -> None:
    case = tiny.load_case(name)
    assert tiny.weights_sha256(case.weights()) == case.weights_sha256
    assert case.all_logits.shape == (len(case.ids), case.config["vocab_size"])
    assert case.all_logits.dtype == np.float32
    assert np.isfinite(case.all_logits).all()
    assert case.ids.min() >= 0 and case.ids.max() < case.config["vocab_size"]


@pytest.mark.parametrize(("dtype", "shards"), [("float32", 1), ("float16", 2), ("bfloat16", 3)])
def test_folder_holds_the_same_numbers_in_every_type(tmp_path, dtype: str, shards: int) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    case = tiny.load_case("gemma3-plain")
    folder = case.write_folder(tmp_path / "model", dtype, shards, v5=True)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == shards
    read = {name: w for file in files for name, w in safetensors.load_file(file).items()}
    weights = case.weights()
    assert read.keys() == weights.keys()
    for name, w in weights.items():
        assert read[name].dtype.name == dtype
        np.testing.assert_array_equal(read[name].astype(np.float32), w)
    assert json.loads((folder / "config.json").read_text()) == case.config_v5
    if shards > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == weights.keys()
        assert index["metadata"]["total_size"] == sum(w.nbytes for w in read.values())
