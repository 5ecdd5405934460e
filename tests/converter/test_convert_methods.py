"""Methods of `halfbyte convert`: what the default does, what it gains, and what it refuses."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from small_model import TEXT, fails, quiet, write_checkpoint

import halfbyte
from halfbyte.converter.quantizers import rtn
from halfbyte.formats.container import File
from halfbyte.formats.errors import UsageError
from halfbyte.runtime.evaluate import evaluate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("m") / "m", template=True)


def test_the_default_is_gptq_where_there_is_a_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    def method(source: Path, **kw: Any) -> object:
        return File(halfbyte.convert(source, tmp_path / "o.hb", **kw)).metadata["quantization.method"]

    assert method(checkpoint) == "gptq"
    assert method(checkpoint, method="rtn") == "rtn"
    assert method(checkpoint, recipe="q8") == method(checkpoint, recipe="f32") == "rtn"
    assert method(write_checkpoint(tmp_path / "bare", tokenizer=False)) == "rtn"
    File(halfbyte.convert(checkpoint, tmp_path / "o.hb")).verify()
    assert [p.name for p in tmp_path.glob(".*")] == []  # no temporary file is left


def test_all_methods_write_as_many_bytes(checkpoint: Path, tmp_path: Path) -> None:
    files = [File(halfbyte.convert(checkpoint, tmp_path / f"{m}.hb", method=m)) for m in ("rtn", "gptq")]
    assert [t.nbytes for t in files[0].tensors] == [t.nbytes for t in files[1].tensors]


def test_results_do_not_depend_on_the_number_of_cpus(checkpoint: Path, tmp_path: Path) -> None:
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs and a system that can take one away")
    both = os.sched_getaffinity(0)
    many = halfbyte.convert(checkpoint, tmp_path / "many.hb").read_bytes()
    try:
        os.sched_setaffinity(0, {min(both)})
        one = halfbyte.convert(checkpoint, tmp_path / "one.hb").read_bytes()
    finally:
        os.sched_setaffinity(0, both)
    assert one == many


def test_rtn_with_a_text_weighs_the_columns(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    plain = File(halfbyte.convert(checkpoint, tmp_path / "p.hb", method="rtn"))
    file = File(halfbyte.convert(checkpoint, tmp_path / "w.hb", method="rtn", calibrate=tmp_path / "t.txt"))
    exact = File(halfbyte.convert(checkpoint, tmp_path / "e.hb", recipe="f32"))
    name = "layers.0.mlp.down_proj"
    a, b, w = (f.dequantize(f.tensors[f.tensor_index[name]]) for f in (plain, file, exact))
    assert (a != b).any()
    assert ((b - w) ** 2).sum() > ((a - w) ** 2).sum()  # worse without weights, so better with them
    codes = file.codes(file.tensors[file.tensor_index[name]])
    assert codes["codes"].shape == rtn.quantize_q4(w)[0].shape


def test_calibration_text_decides_the_result(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    chat = [{"role": "u", "content": "who saw the tree"}, {"role": "a", "content": "a little dog"}]
    (tmp_path / "c.jsonl").write_text("\n".join([json.dumps(chat)] * 5))
    digests = {
        File(halfbyte.convert(checkpoint, tmp_path / "o.hb", calibrate=c)).digest
        for c in (None, tmp_path / "t.txt", tmp_path / "c.jsonl")
    }
    assert len(digests) == 3


def test_requests_that_cannot_be_met(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    out = ("-o", tmp_path / "o.hb")
    bare = write_checkpoint(tmp_path / "bare", tokenizer=False)
    (tmp_path / "bad.jsonl").write_text("{")
    assert "unknown method 'best'" in fails(capsys, "convert", checkpoint, *out, "--method", "best")
    assert "needs a tokenizer" in fails(capsys, "convert", bare, *out, "--method", "gptq")
    assert "needs a tokenizer" in fails(capsys, "convert", bare, *out, "--calibrate", tmp_path / "bad.jsonl")
    assert "rounds nothing" in fails(
        capsys, "convert", checkpoint, *out, "--recipe", "f16", "--method", "gptq"
    )
    assert "No such file" in fails(capsys, "convert", checkpoint, *out, "--calibrate", tmp_path / "absent")
    assert "line 1 is not JSON" in fails(
        capsys, "convert", checkpoint, *out, "--calibrate", tmp_path / "bad.jsonl"
    )
    assert not (tmp_path / "o.hb").exists() and [p.name for p in tmp_path.glob(".*")] == []
    with pytest.raises(UsageError):
        halfbyte.convert(checkpoint, tmp_path / "o.hb", method="")


def test_the_command_says_which_method_it_used(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    said = json.loads(quiet(capsys, "convert", checkpoint, "-o", tmp_path / "o.hb", "--json"))
    assert said["method"] == "gptq" and said["recipe"] == "q4"


def test_the_default_is_much_closer_to_the_float_model(shared_data: Path, tmp_path: Path) -> None:
    """No calibration text is given; held-out stories (Q4_0 of llama.cpp: KL .056 on such text, at 4.5 bits)."""
    source = shared_data / "tinystories-656k"
    text = (shared_data / "text" / "tinystories.txt").read_text()[:30_000].replace("<|endoftext|>", "\n\n")
    reference = halfbyte.load(halfbyte.convert(source, tmp_path / "f32.hb", recipe="f32"), policy="f32")
    kl = {
        method: evaluate(
            halfbyte.load(halfbyte.convert(source, tmp_path / "m.hb", method=method)), text, against=reference
        )["kld_mean"]
        for method in ("rtn", "gptq")
    }
    assert kl["gptq"] < 0.7 * kl["rtn"]
