"""`halfbyte parity` between the backends that need no PyTorch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from story import story_folder

import halfbyte
from halfbyte.runtime.cli import main
from halfbyte.runtime.parity import BOUNDS, Bound, bound_of


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("parity")
    halfbyte.convert(story_folder(folder / "story"), folder / "story.hb", recipe="q4")
    return str(folder / "story.hb")


def test_two_backends_agree(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("Once upon a time there was a little robot. It liked to count.")
    out, plot = tmp_path / "p.json", tmp_path / "p.svg"
    command = ["parity", file, "--a", "reference", "--b", "jit", "--text", str(tmp_path / "t.txt"), "-n", "8"]
    assert main([*command, "--json", str(out), "--plot", str(plot)]) == 0
    found = json.loads(out.read_text())
    assert found["ok"] and found["first_divergence"] is None and found["top1_agreement"] == 1.0
    assert found["bound"] == BOUNDS["i8g32", "i8g32"].as_dict()
    assert len(found["logits"]) == found["tokens"] > 10
    assert found["worst"][0]["error"] >= found["worst"][-1]["error"]
    assert plot.read_text().startswith("<svg xmlns") and "bound 0.05" in plot.read_text()
    assert "all 8 tokens agree" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.json", "p.svg", "t.txt"]


def test_a_bound_that_is_exceeded_is_status_1(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    command = [
        "parity",
        file,
        "--a",
        "reference",
        "--b",
        "reference",
        "--policy-a",
        "f32",
        "--tokens",
        "20",
        "--json",
    ]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["checks"]) == {"logits", "kld_mean"} and found["checks"]["logits"]["value"] > 0
    monkeypatch.setitem(BOUNDS, ("f32", "i8g32"), Bound(1e-6, 1e-9, "too strict"))
    assert main(command) == 1
    assert main([*command[:-1]]) == 1
    assert "EXCEEDED" in capsys.readouterr().out


def test_what_does_not_exist_is_status_2(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--b tpu", "--b jit --policy f9", "--b jit --policy bf16", "--b jit --text /nowhere"]
    for extra in (*wrong, "--b jit --a jit --plot /nowhere/p.svg"):
        assert main(["parity", file, *extra.split(), "-n", "1", "--tokens", "2"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_without_pytorch_the_cuda_backend_is_one_line(file: str, capsys, monkeypatch) -> None:
    for name in [n for n in sys.modules if n.startswith("halfbyte.runtime.backends.cuda")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    for command in (["parity", file], ["run", file, "--ids", "1", "--backend", "cuda"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "pip install 'halfbyte[cuda]'" in error and error.count("\n") == 1


def test_the_model_is_not_written_over(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(file).read_bytes()
    common = ["parity", file, "--a", "jit", "--b", "jit", "--tokens", "2", "-n", "1"]
    for option in ("--plot", "--json"):
        assert main([*common, option, file]) == 2
        assert "is the model itself" in capsys.readouterr().err
    assert Path(file).read_bytes() == before


def test_every_pair_of_policies_has_a_bound() -> None:
    names = ("bf16", "f32", "f8", "i8g32")
    assert all(bound_of(a, b) is bound_of(b, a) for a in names for b in names)
