"""The proof of a conversion: figures against sums computed another way, and that it never stands in the way."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_model import TEXT, fails, quiet, write_checkpoint

import halfbyte
from halfbyte.converter import evaluate as converter_evaluate
from halfbyte.formats import proof
from halfbyte.formats.container import File
from halfbyte.formats.errors import HalfbyteError, UsageError
from halfbyte.formats.tiles import P16
from halfbyte.runtime.evaluate import evaluate
from halfbyte.runtime.model import Model
from halfbyte.runtime.tokenizer import Tokenizer

FIGURES = ("kld_mean", "kld_p99", "kld_max", "top1_agreement")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(
        tmp_path_factory.mktemp("m") / "m", config={"eos_token_id": 2, "bos_token_id": 1}
    )
    (folder.parent / "t.txt").write_text(TEXT)
    return folder


def proof_of(path: Path) -> proof.Proof:
    found = proof.read(File(path))
    assert found is not None
    return found


def close(path: Path) -> proof.Closeness:
    found = proof_of(path).closeness
    assert found is not None
    return found


def check_against_eval(path: Path, reference: Path, text: str) -> None:
    """`halfbyte eval path --against reference` gives the figures in the file."""
    c = close(path)
    got = evaluate(halfbyte.load(path), text, ctx=c.ctx, against=halfbyte.load(reference))
    assert c.tokens == got["tokens"]
    for name in FIGURES:
        assert getattr(c, name) == proof.rounded(got[name]), name
    assert (c.nll, c.float_nll) == tuple(
        proof.rounded(got[k]) for k in ("nll_per_token", "against_nll_per_token")
    )
    assert (c.ppl, c.float_ppl) == tuple(proof.rounded(got[k]) for k in ("ppl", "against_ppl"))
    assert sum(c.kld_histogram) == c.tokens and c.sha256 == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "how", [{"method": "rtn"}, {"method": "rtn", "rotate": True}, {"recipe": "q8"}], ids=str
)
def test_eval_gives_the_same_figures(checkpoint: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    """On the model's own text, also where something was folded in: the reference is the model as it was trained."""
    out = halfbyte.convert(checkpoint, tmp_path / "m.hb", save_heldout=tmp_path / "own.txt", **how)
    reference = halfbyte.convert(checkpoint, tmp_path / "f.hb", recipe="keep", proof=False)
    assert close(out).text == converter_evaluate.OWN
    assert close(out).kld_mean > 1e-6
    check_against_eval(out, reference, (tmp_path / "own.txt").read_text(encoding="utf-8"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.hb", "m.hb", "own.txt"]


def test_on_a_text_that_is_given(checkpoint: Path, tmp_path: Path) -> None:
    text = checkpoint.parent / "t.txt"
    out = halfbyte.convert(checkpoint, tmp_path / "m.hb", method="rtn", heldout=text)
    reference = halfbyte.convert(checkpoint, tmp_path / "f.hb", recipe="f32", proof=False)
    assert close(out).text == "t.txt"
    check_against_eval(out, reference, TEXT)


def test_chats_are_rendered(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", template=True)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps([{"role": "user", "content": "the dog ran"}]) + "\n")
    c = close(halfbyte.convert(folder, tmp_path / "m.hb", method="rtn", heldout=chats))
    assert (
        c.text == "chats.jsonl"
        and c.sha256 == hashlib.sha256(chats.read_bytes()).hexdigest()
        and c.tokens > 5
    )
    with pytest.raises(UsageError, match="--save-heldout"):
        halfbyte.convert(folder, tmp_path / "n.hb", method="rtn", heldout=chats, save_heldout=tmp_path / "t")


def test_a_model_that_writes_nothing_is_measured_on_our_text(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without BOS and end token it cannot start."""
    monkeypatch.setattr(
        Tokenizer, "bos_id", property(lambda self: None, lambda self, value: None), raising=False
    )
    monkeypatch.setattr(Model, "eos_ids", [])
    c = close(halfbyte.convert(checkpoint, tmp_path / "m.hb", method="rtn", save_heldout=tmp_path / "t.txt"))
    assert c.text == converter_evaluate.OURS
    assert (tmp_path / "t.txt").read_bytes() == converter_evaluate.BUILT_IN.read_bytes()


def test_our_text_is_not_what_is_calibrated_on() -> None:
    """No run of six words in common."""
    from halfbyte.converter.calibrate import BUILT_IN

    words = [p.read_text(encoding="utf-8").split() for p in (BUILT_IN, converter_evaluate.BUILT_IN)]
    runs = [{tuple(w[i : i + 6]) for i in range(len(w) - 5)} for w in words]
    assert len(runs[1]) > 1500 and not runs[0] & runs[1]


def test_errors_of_matrices(checkpoint: Path, tmp_path: Path) -> None:
    """Against the f32 file, matrix by matrix, summed plainly."""
    out = halfbyte.convert(checkpoint, tmp_path / "m.hb", method="rtn")
    exact = halfbyte.convert(checkpoint, tmp_path / "f.hb", recipe="f32")
    file, reference = File(out), File(exact)
    off = norm = nbytes = weights = 0.0
    found = {m.name: m for m in proof_of(out).matrices}
    assert list(found) == [t.name for t in file.tensors if t.tile == P16]
    for t, r in zip(file.tensors, reference.tensors):
        if t.tile != P16:
            continue
        w, q = reference.dequantize(r).astype(np.float64), file.dequantize(t)
        a, b = ((w - q) ** 2).sum(), (w**2).sum()
        assert found[t.name].error == pytest.approx(a / b, rel=1e-4)
        assert found[t.name].bits == proof.rounded(8 * t.nbytes / w.size)
        assert found[t.name].encoding == t.encoding
        off, norm, nbytes, weights = off + a, norm + b, nbytes + t.nbytes, weights + w.size
    assert sorted({m.encoding for m in found.values()}) == ["q4", "q5"]
    assert proof_of(out).error == pytest.approx(off / norm, rel=1e-4)
    assert proof_of(out).bits == proof.rounded(8 * nbytes / weights)
    assert {m.error for m in proof_of(exact).matrices} == {0.0} and close(exact).kld_max == 0.0


def test_how_it_was_made(checkpoint: Path, tmp_path: Path) -> None:
    text = checkpoint.parent / "t.txt"
    out = halfbyte.convert(checkpoint, tmp_path / "m.hb", calibrate=text, context=64)
    p, weights = proof_of(out), checkpoint / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert p.source["files"] == [{"name": weights.name, "bytes": weights.stat().st_size, "sha256": digest}]
    assert p.source["digest"] == File(out).metadata["general.source_digest"]
    assert p.recipe == {
        "name": "q4",
        "method": "gptq",
        "context": 64,
        "calibrate": {"name": "t.txt", "sha256": hashlib.sha256(TEXT.encode()).hexdigest()},
    }
    assert (p.tool, p.format) == (f"halfbyte {halfbyte.__version__}", "1.2")
    assert close(out).ctx == 64


def test_the_same_bytes_on_one_processor_and_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    """For any number of threads, and whatever the folders are called."""
    first = halfbyte.convert(checkpoint, tmp_path / "m.hb", method="rtn").read_bytes()
    (tmp_path / "other").mkdir()
    script = (
        "import os, sys, halfbyte\n"
        "hasattr(os, 'sched_setaffinity') and os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "halfbyte.convert(sys.argv[1], sys.argv[2], method='rtn')"
    )
    out = tmp_path / "other" / "n.hb"
    subprocess.run(
        [sys.executable, "-c", script, str(checkpoint), str(out)], check=True, env=dict(os.environ)
    )
    assert out.read_bytes() == first


def test_no_proof(checkpoint: Path, tmp_path: Path) -> None:
    out = halfbyte.convert(checkpoint, tmp_path / "m.hb", method="rtn", proof=False)
    assert "PROF" not in File(out).sections and File(out).version == (1, 2)
    for extra in ({"heldout": checkpoint.parent / "t.txt"}, {"save_heldout": tmp_path / "t"}):
        with pytest.raises(UsageError, match="--no-proof"):
            halfbyte.convert(checkpoint, tmp_path / "n.hb", method="rtn", proof=False, **extra)
    assert not (tmp_path / "n.hb").exists()


def test_without_a_tokenizer_only_the_errors(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tokenizer=False)
    p = proof_of(halfbyte.convert(folder, tmp_path / "m.hb"))
    assert p.closeness is None and p.why_not == "the model has no tokenizer" and p.error > 1e-4
    (tmp_path / "t.txt").write_text(TEXT)
    with pytest.raises(UsageError, match="no tokenizer"):
        halfbyte.convert(folder, tmp_path / "n.hb", heldout=tmp_path / "t.txt")


def test_a_plan_given_back_gives_the_same_proof(checkpoint: Path, tmp_path: Path) -> None:
    """What it took to find a plan is not part of the file."""
    plan, options = tmp_path / "p.toml", {"method": "rtn", "heldout": checkpoint.parent / "t.txt"}
    a = halfbyte.convert(checkpoint, tmp_path / "a.hb", target_bits=4.4, save_plan=plan, **options)  # type: ignore[arg-type]
    b = halfbyte.convert(checkpoint, tmp_path / "b.hb", plan=plan, **options)  # type: ignore[arg-type]
    assert a.read_bytes() == b.read_bytes() and proof_of(a).recipe["name"] == "plan"


def test_large_models_are_measured_when_asked(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.converter.proof.OWN_TEXT_WEIGHTS", 1000)
    p = proof_of(halfbyte.convert(checkpoint, tmp_path / "m.hb", method="rtn"))
    assert p.closeness is None and "--proof" in p.why_not and p.error > 1e-4
    assert (
        close(halfbyte.convert(checkpoint, tmp_path / "m.hb", method="rtn", proof=True)).text
        == converter_evaluate.OURS
    )
    text = checkpoint.parent / "t.txt"
    assert close(halfbyte.convert(checkpoint, tmp_path / "m.hb", method="rtn", heldout=text)).text == "t.txt"


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (HalfbyteError("{folder}/float.hb: cannot write:\n No space"), "float.hb: cannot write: No space"),
        (MemoryError(), "there was not enough memory"),
        (OSError(28, "No space left"), "No space left"),
    ],
)
def test_what_cannot_be_measured_does_not_stop_the_conversion(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, why: str
) -> None:
    def broken(path: Path, plan: Any, checkpoint: Any, folder: Path, **options: Any) -> None:
        raise type(error)(str(error).format(folder=folder)) if isinstance(error, HalfbyteError) else error

    monkeypatch.setattr(converter_evaluate, "measure", broken)
    p = proof_of(halfbyte.convert(checkpoint, tmp_path / "m.hb", method="rtn"))
    assert p.closeness is None and p.why_not == why
    assert [f.name for f in tmp_path.iterdir()] == ["m.hb"]
    File(tmp_path / "m.hb").verify()


def test_a_model_that_gives_nonsense(tmp_path: Path) -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights["model.norm.weight"][:] = 3e38

    folder = write_checkpoint(tmp_path / "m", change=change)
    p = proof_of(halfbyte.convert(folder, tmp_path / "m.hb", method="rtn", heldout=_text(tmp_path)))
    assert p.closeness is None and p.why_not == converter_evaluate.NOT_FINITE


def _text(folder: Path) -> Path:
    (folder / "t.txt").write_text(TEXT)
    return folder / "t.txt"


def test_max_bytes_counts_the_proof(checkpoint: Path, tmp_path: Path) -> None:
    """A budget that just holds the smallest file without its proof is refused; each one reached holds it."""
    bare = (
        halfbyte.convert(checkpoint, tmp_path / "b.hb", recipe="q2", method="rtn", proof=False).stat().st_size
    )
    section = File(halfbyte.convert(checkpoint, tmp_path / "m.hb", recipe="q2", method="rtn")).sections[
        "PROF"
    ][1]
    assert section > 500
    with pytest.raises(UsageError, match="too few"):
        halfbyte.convert(checkpoint, tmp_path / "n.hb", max_bytes=bare + section // 2, method="rtn")
    budget = bare + 3 * section
    out = halfbyte.convert(checkpoint, tmp_path / "n.hb", max_bytes=budget, method="rtn")
    assert "PROF" in File(out).sections and out.stat().st_size <= budget


@pytest.mark.parametrize("text", [None, "t.txt"])
def test_room_is_enough_and_not_lavish(checkpoint: Path, tmp_path: Path, text: str | None) -> None:
    from halfbyte.converter import proof as converting

    rooms = []
    original = converting.Prover.__call__

    def call(self: converting.Prover, path: Path) -> bytes:
        data = original(self, path)
        rooms.append((self.room(), len(data)))
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converting.Prover, "__call__", call)
        heldout = checkpoint.parent / text if text else None
        halfbyte.convert(checkpoint, tmp_path / "m.hb", method="rtn", heldout=heldout)
    ((room, used),) = rooms
    assert used <= room <= used + 700


def test_bad_texts_are_found_at_once(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for options in (
        ("--heldout", tmp_path / "absent.txt"),
        ("--heldout", tmp_path / "empty.txt"),
        ("--heldout", tmp_path / "bytes.txt"),
        ("--save-heldout", tmp_path),
        ("--save-heldout", tmp_path / "absent" / "t.txt"),
        ("--no-proof", "--save-heldout", tmp_path / "t.txt"),
    ):
        fails(capsys, "convert", checkpoint, "-o", tmp_path / "m.hb", *options)
    assert not (tmp_path / "m.hb").exists()
    out = quiet(capsys, "convert", checkpoint, "-o", tmp_path / "m.hb", "--method", "rtn", "--no-proof")
    assert "KL" not in out
    out = quiet(capsys, "convert", checkpoint, "-o", tmp_path / "m.hb", "--method", "rtn", "--proof")
    assert f"KL divergence {close(tmp_path / 'm.hb').kld_mean:.3g} from the float model" in out
