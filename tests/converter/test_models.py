"""Every model type against logits recorded from `transformers`, on every backend."""

from pathlib import Path

import numpy as np
import pytest
from tiny import case_names, load_case

import halfbyte
from halfbyte.converter import models
from halfbyte.formats.errors import CheckpointError

TOLERANCE = 1e-4  # float32 noise of two implementations; a wrong formula moves logits by 1e-2 and more
LONG = {"phi3-longrope-long": 64}  # the context that makes the converter choose the long factors


def files(name: str, folder: Path, v5: bool = False, recipe: str = "f32", **kw: object) -> Path:
    case = load_case(name)
    case.write_folder(folder / "checkpoint", v5=v5, **kw)
    return halfbyte.convert(folder / "checkpoint", folder / "m.hb", recipe=recipe, context=LONG.get(name))


@pytest.mark.parametrize("name", case_names())
def test_logits_equal_transformers(name: str, backend: str, tmp_path: Path) -> None:
    case = load_case(name)
    model = halfbyte.load(files(name, tmp_path), backend=backend)
    session = model.session()
    prompt, decoded = case.ids[: len(case.logits)], case.ids[len(case.logits) :]
    np.testing.assert_allclose(session.feed_all(prompt), case.logits, rtol=0, atol=TOLERANCE)
    for token, want in zip(decoded, case.decode_logits):
        np.testing.assert_allclose(session.feed([token]), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", case_names())
def test_newer_config_form_means_the_same(name: str, tmp_path: Path) -> None:
    classic = files(name, tmp_path).read_bytes()
    again = files(name, tmp_path, v5=True)
    a = halfbyte.load(again, backend="reference")
    (tmp_path / "classic.hb").write_bytes(classic)
    b = halfbyte.load(tmp_path / "classic.hb", backend="reference")
    np.testing.assert_array_equal(a.file.program, b.file.program)
    assert [t.digest for t in a.file.tensors] == [t.digest for t in b.file.tensors]


def test_shards_and_types_give_the_same_file(tmp_path: Path) -> None:
    one = halfbyte.load(files("llama-plain", tmp_path, dtype="bfloat16"), backend="reference").file.tensors
    (tmp_path / "b").mkdir()
    two = halfbyte.load(files("llama-plain", tmp_path / "b", shards=3), backend="reference").file.tensors
    assert [t.digest for t in one] == [t.digest for t in two]


def test_every_model_type_has_vectors() -> None:
    covered = {models.ALIASES.get(t, t) for t in (load_case(n).config["model_type"] for n in case_names())}
    assert covered == set(models.supported())


def test_merging_is_only_a_matter_of_storage(tmp_path: Path) -> None:
    """q, k and v in one matrix or in three (when their storages differ) are the same function."""
    from halfbyte.converter.builder import Builder

    merged = files("qwen2-plain", tmp_path)
    original = Builder._storage

    def differing(self: Builder, name: str):  # type: ignore[no-untyped-def]
        storage = original(self, name)
        return (
            type(storage)("f32" if "v_proj" in name or "up_proj" in name else "f16")
            if "_proj" in name
            else storage
        )

    (tmp_path / "split").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Builder, "_storage", differing)
        split = files("qwen2-plain", tmp_path / "split")
    a, b = (halfbyte.load(f, backend="reference", kv="f32") for f in (merged, split))
    assert len(b.file.program) > len(a.file.program)
    ids = load_case("qwen2-plain").ids
    # the weights are exact in f16 too, so only the order of float sums may differ
    np.testing.assert_allclose(a.session().feed(ids), b.session().feed(ids), rtol=0, atol=TOLERANCE)


def test_unsupported_type_names_the_supported(tmp_path: Path) -> None:
    case = load_case("llama-plain")
    case.write_folder(tmp_path / "c")
    config = (tmp_path / "c" / "config.json").read_text().replace('"llama"', '"mamba"')
    (tmp_path / "c" / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"'mamba' is not supported \(gemma2, .*smollm3\)"):
        halfbyte.convert(tmp_path / "c", tmp_path / "m.hb")
