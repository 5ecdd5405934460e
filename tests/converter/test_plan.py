"""Methods by name, from the command to the file: each writes a sound file and is closer than plain rounding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_model import fails, quiet, write_checkpoint
from tiny import load_case

import halfbyte
from halfbyte.formats.container import File
from halfbyte.formats.ops import BY_NAME
from halfbyte.runtime.evaluate import evaluate


@pytest.fixture(scope="module")
def story(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any, str]:
    """A real model, a calibration text, its float file, and held-out text."""
    folder = tmp_path_factory.mktemp("story")
    raw = (shared_data / "text" / "tinystories.txt").read_text().replace("<|endoftext|>", "\n\n")
    (folder / "t.txt").write_text(raw[100_000:180_000])
    source = shared_data / "tinystories-656k"
    reference = halfbyte.load(halfbyte.convert(source, folder / "f.hb", recipe="f32"), policy="f32")
    return source, folder / "t.txt", reference, raw[:20_000]


def kld(story: tuple[Path, Path, Any, str], out: Path, **options: Any) -> float:
    """KL of a conversion on held-out text."""
    source, calibrate, reference, text = story
    calibrated = {} if options.get("method") == "rtn" else {"calibrate": calibrate}
    file = halfbyte.convert(source, out, recipe="q4", **calibrated, **options)
    File(file).verify()
    return evaluate(halfbyte.load(file), text, against=reference)["kld_mean"]


def test_every_method_is_closer_than_rounding(story: tuple[Path, Path, Any, str], tmp_path: Path) -> None:
    base = kld(story, tmp_path / "o.hb", method="rtn")
    found = {m: kld(story, tmp_path / f"{m}.hb", method=m) for m in ("awq", "autoround", "gptq")}
    assert found["gptq"] < found["autoround"] < found["awq"] < base, (base, found)
    for method in found:
        assert File(tmp_path / f"{method}.hb").metadata["quantization.method"] == method
    assert kld(story, tmp_path / "s.hb", method="gptq", smooth=True) < 0.8 * base


def test_rotations_are_in_the_file(story: tuple[Path, Path, Any, str], tmp_path: Path) -> None:
    """The residual stream is rotated, so head and embedding part, and a HADAMARD stands before each down projection."""
    assert kld(story, tmp_path / "o.hb", method="gptq", rotate=True) < 0.06
    file = File(tmp_path / "o.hb")
    assert (file.program["code"] == BY_NAME["hadamard"].code).sum() == 2 and "lm_head" in file.tensor_index


@pytest.mark.parametrize("backend", ["reference", "jit"])
def test_folds_leave_the_function(backend: str, tmp_path: Path) -> None:
    """Stored in f32, the rotated model has the logits of the model as it was."""
    case = load_case("llama-plain")
    case.write_folder(tmp_path / "c")
    file = halfbyte.convert(tmp_path / "c", tmp_path / "o.hb", recipe="f32", rotate=True)
    logits = halfbyte.load(file, backend=backend, policy="f32").session().feed_all(case.ids)
    want = case.all_logits
    np.testing.assert_allclose(logits, want, rtol=0, atol=3e-5 * np.abs(want).max())


def test_models_that_allow_no_rotation(tmp_path: Path, capsys: Any) -> None:
    load_case("gemma3-plain").write_folder(tmp_path / "c")
    why = fails(capsys, "convert", tmp_path / "c", "-o", tmp_path / "o.hb", "--rotate")
    assert "residual stream cannot be rotated" in why and not (tmp_path / "o.hb").exists()


def test_methods_that_need_text(tmp_path: Path, capsys: Any) -> None:
    bare = write_checkpoint(tmp_path / "bare", tokenizer=False)
    for options in (("--method", "awq"), ("--method", "autoround"), ("--smooth",)):
        assert "needs a tokenizer" in fails(capsys, "convert", bare, "-o", tmp_path / "o.hb", *options)
    full = write_checkpoint(tmp_path / "full")
    for method in ("awq", "autoround"):
        quiet(capsys, "convert", full, "-o", tmp_path / f"{method}.hb", "--method", method)
        assert [p.name for p in tmp_path.glob(".*")] == []
