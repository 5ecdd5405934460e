"""Quantisation-aware training: gradients, files equal to the trained graph, resuming, errors."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

import halfbyte
from halfbyte.formats import encodings
from halfbyte.formats.container import File
from halfbyte.runtime.cli import main

ENCODINGS = (("q2", 32), ("q3", 32), ("q4", 32), ("q5", 32), ("q6", 32), ("q8", 32), ("i2", 64))
RECIPES = ("q2", "q3", "q4", "q4-", "q4+", "q8", "ternary")


@pytest.fixture(scope="module")
def torch():
    """PyTorch on one thread."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'halfbyte[qat]'")
    torch.set_num_threads(1)
    return torch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny tied Llama without a tokenizer."""
    return tiny.load_case("llama-tied").write_folder(tmp_path / "checkpoint")


def matrix(seed: int = 0, rows: int = 19, cols: int = 80) -> np.ndarray:
    """Random weights whose width is no multiple of the groups, with a row and a group of zeros."""
    w = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    w[3], w[5, 32:64] = 0, 0
    return w


def moved(torch, encoding: str, group: int, rank: int = 0):
    """A fake-quantiser somewhere in the middle of a training."""
    from halfbyte.converter.qat.fake_quant import FakeQuant

    m = FakeQuant(matrix(), encoding, group, rank)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        m.factor.mul_(0.7 + 0.6 * torch.rand(m.factor.shape, generator=random))
        w = m.a if rank else m.weight
        w.add_(0.1 * torch.randn(w.shape, generator=random))
    return m


@pytest.mark.parametrize("rank", (0, 2))
@pytest.mark.parametrize("encoding, group", ENCODINGS)
def test_forward_is_what_a_file_decodes_to(torch, encoding: str, group: int, rank: int) -> None:
    m = moved(torch, encoding, group, rank)
    planes = m.planes()
    read = encodings.dequantize(encoding, planes["codes"], planes["scales"], group, row=planes.get("row"))
    assert np.array_equal(m().detach().numpy().view(np.int32), read.view(np.int32))
    assert len(np.unique(planes["codes"])) > 2


@pytest.mark.parametrize("encoding, group", ENCODINGS)
def test_gradients_follow_lsq_and_seq(torch, encoding: str, group: int) -> None:
    """Against the formulas, written out weight by weight; some weights lie outside of the range, most inside."""
    m = moved(torch, encoding, group)
    g = torch.randn(m.rows, m.cols, generator=torch.Generator().manual_seed(2))
    (m() * g).sum().backward()
    planes = m.planes()
    level, s, _ = (
        encodings.decode(encoding, planes, group, "f16" if encoding in ("q8", "i2") else "f32")
        if (encodings.BY_NAME[encoding].row_scale)
        else (
            m.levels.numpy()[m.choice.reshape(m.rows, -1)[:, : m.cols]],
            planes["scales"].astype(np.float32),
            None,
        )
    )
    shift = np.zeros_like(s) if not m.sub7 else m.shift * (planes["scales"] & 1).astype(np.float32)
    first, last = m.levels[0].item(), m.levels[-1].item()
    if encodings.BY_NAME[encoding].bits == 2:  # half a step more, times .99
        first -= 0.495 * (m.levels[1] - m.levels[0]).item()
        last += 0.495 * (m.levels[-1] - m.levels[-2]).item()
    slope, clipped = np.zeros_like(s), 0
    w = m.weight.detach().numpy()
    for i in range(m.rows):
        for j in range(m.cols):
            k = j // group
            x = w[i, j] / s[i, k] if s[i, k] else w[i, j]
            inside = first + shift[i, k] <= x <= last + shift[i, k]
            clipped += not inside
            assert m.weight.grad[i, j] == (g[i, j] if inside else 0)
            slope[i, k] += g[i, j] * (level[i, j] - x if inside else level[i, j])
    assert 0 < clipped < 0.5 * w.size or encoding == "q8"
    unit = m.start.numpy() * (m.unit.numpy() if m.sub7 else 1)
    expected = slope * unit / np.sqrt(m.width * m.q)
    np.testing.assert_allclose(m.factor.grad.numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("encoding", ("q2", "q3", "q4", "q6", "q8"))
def test_training_starts_from_given_codes(torch, encoding: str) -> None:
    """Codes of other weights are those of the first forward, and weights that round to theirs anyway stay put."""
    from halfbyte.converter.qat.fake_quant import FakeQuant
    from halfbyte.converter.quantizers import _planes

    other = matrix() + 0.3 * matrix(1)
    given = _planes.nearest(other, encoding)
    assert (given["codes"] != _planes.nearest(matrix(), encoding)["codes"]).mean() > 0.1
    m = FakeQuant(matrix(), encoding, planes=given)
    for name, a in m.planes().items():
        assert np.array_equal(a, given[name]), name
    stay = (m.weight.detach().numpy() == matrix()).mean()
    moved = np.abs(m.weight.detach().numpy() - matrix()).mean()
    assert moved < np.abs(_planes.decode(given, encoding) - matrix()).mean() and (
        stay > 0.1 or encoding > "q5"
    )


def test_low_rank_gradients_reach_the_factors_only(torch) -> None:
    m = moved(torch, "q4", 32, rank=2)
    m().square().sum().backward()
    assert m.a.grad.abs().sum() > 0 and m.b.grad.abs().sum() > 0 and m.weight.grad is None
    assert {n for n, _ in m.named_parameters()} == {"a", "b", "factor"}


def test_frozen_codes_stay(torch) -> None:
    """A weight pushed to and fro over a border is frozen; others still follow."""
    m = moved(torch, "q4", 32)
    m.freeze_scales()
    assert not m.factor.requires_grad
    before = m.weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            m.weight.copy_(before)
            m.weight[0, 0] += 0.5 * (-1) ** step
        m()
        m.freeze_codes(0.04)
    assert m.frozen[0, 0, 0] and m.frozen.sum() == 1
    held = int(m.held[0, 0, 0])
    with torch.no_grad():
        m.weight[0, :2] = 9
    m().sum().backward()
    assert m.choice[0, 0, 0] == held and m.choice[0, 0, 1] == 15
    assert m.weight.grad[0, 0] == 0


def test_activations_are_rounded_as_the_reference_does(torch) -> None:
    from halfbyte.converter.qat.activations import round_activations
    from halfbyte.runtime.backends.reference import quantize_activations

    x = matrix(3, 6, 80) * 10
    x[2] = 1e-38
    q, d = quantize_activations(x)
    expected = (q.reshape(6, -1, 32) * d[..., None]).reshape(6, -1)[:, :80]
    t = torch.from_numpy(x).requires_grad_()
    y = round_activations(t)
    assert np.array_equal((y.detach() - t.detach()).numpy(), expected - x)
    y.sum().backward()
    assert (t.grad == 1).all()


@pytest.mark.parametrize("mode", ("f16", "k8v8", "k8v4", "tq3", "tq3-qjl"))
def test_keys_and_values_are_rounded_as_the_cache_does(torch, mode: str) -> None:
    from halfbyte.converter.qat.activations import round_cache
    from halfbyte.formats import kv_modes
    from halfbyte.runtime.kv import KV

    caches = np.array([(2, 32, 48, 0)], [(n, "<u4") for n in ("kv_heads", "k_dim", "v_dim", "window")])
    kv = KV(caches, mode)
    kv.reserve(100)
    sides = [np.random.default_rng(n).standard_normal((2, 100, n)).astype(np.float32) for n in (32, 48)]
    kv.put(0, 0, *sides)
    (m,) = kv_modes.by_cache(mode, 1)
    for x, read, values in zip(sides, kv.read(0, 0, 100), (False, True)):
        read = read.reshape(2, 100, -1, x.shape[2]).sum(axis=2)  # of two stages
        ours = round_cache(torch.from_numpy(x)[None], m, values)[0].numpy()
        close = np.abs(ours - read) < 1e-5
        assert close.mean() > 0.995  # a value on a border between two levels may fall to either side
        assert mode == "f16" or np.abs(ours - x).max() > 1e-3


@pytest.mark.parametrize("name", [n for n in tiny.case_names() if n != "phi3-longrope-long"])
def test_programs_run_under_autograd(torch, name: str, tmp_path: Path) -> None:
    """Every model type: the recorded logits of transformers."""
    from halfbyte.converter.builder import Builder
    from halfbyte.converter.checkpoints import open_checkpoint
    from halfbyte.converter.models import build
    from halfbyte.converter.qat.graph import Graph
    from halfbyte.converter.recipe import recipe
    from halfbyte.converter.weights import Weights

    case = tiny.load_case(name)
    with open_checkpoint(case.write_folder(tmp_path), None) as checkpoint:
        b = Builder(checkpoint, recipe("f32"))
        build(b)
        with torch.no_grad():
            y = Graph(b, Weights(b))(torch.from_numpy(np.asarray(case.ids, np.int64))[None])[0].numpy()
    np.testing.assert_allclose(y, case.all_logits[: len(y)], atol=5e-5)


# ---- trainings ----------------------------------------------------------------------------------


def trainer(folder: Path, recipe: str, checkpoint: Path, **options):
    """What `train_qat` makes of a checkpoint, on random ids, since these have no tokenizer."""
    from halfbyte.converter.builder import Builder
    from halfbyte.converter.checkpoints import open_checkpoint
    from halfbyte.converter.models import build
    from halfbyte.converter.qat.graph import Graph
    from halfbyte.converter.qat.options import Options, source_recipe, store
    from halfbyte.converter.qat.training import Trainer
    from halfbyte.converter.weights import Weights

    o = Options(**({"recipe": recipe, "steps": 6, "batch": 2, "every": 2, "freeze": 0.5} | options))
    o.check()
    b = Builder(open_checkpoint(folder, None), source_recipe())
    build(b)
    store(b, recipe)
    ids = np.random.default_rng(0).integers(0, b.vocab, (8, 16)).tolist()
    student = Graph(b, Weights(b), trains=True, integer=True, kv=o.kv or None, rank=o.lora_rank)
    return b, Trainer(student, Graph(b, Weights(b)), o, ids[:6], ids[6:], checkpoint, "test")


@pytest.mark.parametrize("options", ({}, {"lora_rank": 2, "kv": "k8v4"}), ids=("weights", "low-rank"))
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_difference_between_training_and_file(
    torch, recipe: str, options: dict, folder: Path, tmp_path
) -> None:
    """The file decodes to the graph's matrices, bit for bit, and its program gives the graph's logits."""
    from halfbyte.converter.qat.run import export
    from halfbyte.converter.weights import Weights

    b, t = trainer(folder, recipe, tmp_path / "qat", **options)
    before = {i: m.planes()["codes"] for i, m in t.student.quantizers().items()}

    def keep_the_last(now: str, done: int, total: int) -> None:
        t.result.loss = np.inf

    found = t.run(keep_the_last)
    assert found.step == 6 and any((found.planes[i]["codes"] != codes).any() for i, codes in before.items())
    path = tmp_path / "m.hb"
    meta = {"general.model_type": "llama", "model.vocab_size": b.vocab, "model.context_length": 64}
    export(b, found, path, meta, b"", "", Weights(b))
    file, mismatches, compared = File(path), 0, 0
    with torch.no_grad():
        for i, m in t.student.quantizers().items():
            ours, read = m().numpy(), file.dequantize(file.tensors[i])
            mismatches += int((ours.view(np.int32) != read.view(np.int32)).sum())
            compared += read.size
            for plane, values in m.planes().items():
                stored = file.codes(file.tensors[i])[plane]
                assert np.array_equal(stored.reshape(values.shape), values), (file.tensors[i].name, plane)
        for i, v in t.student.vectors.items():
            assert np.array_equal(file.vector(file.tensors[int(i)]), v.numpy())
        assert mismatches == 0 and compared > 1000
        ids = t.heldout[0]
        ours = t.student(torch.tensor([ids]))[0].numpy()
    model = halfbyte.load(path, backend="reference", kv=options.get("kv", "f32"))
    read = model.session().feed_all(ids)
    assert np.abs(read - ours).max() < 2e-2 * np.abs(ours).max()  # an activation may fall to another integer


def test_resuming_gives_the_same_curve(torch, folder: Path, tmp_path: Path) -> None:
    """A training that is killed after a checkpoint, in the frozen stage and before it, ends as one that is not."""
    _, whole = trainer(folder, "q3", tmp_path / "whole")
    expected = whole.run()
    for stop in (3, 5):
        path = tmp_path / f"stopped-{stop}"
        _, t = trainer(folder, "q3", path)

        def killed(now: str, done: int, total: int, stop: int = stop) -> None:
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            t.run(killed)
        _, again = trainer(folder, "q3", path)
        again.room = 0  # for the float model's answers, which are the same if computed anew
        again.resume()
        assert again.at == stop - 1
        found = again.run()
        assert found.curve == expected.curve and found.measured == expected.measured
        for i, planes in expected.planes.items():
            assert all(np.array_equal(a, found.planes[i][k]) for k, a in planes.items())


def test_scales_learn_slower_than_weights(torch, folder: Path, tmp_path: Path) -> None:
    """Adam's first step is the learning rate wherever there is a gradient: of scales a share of it."""
    from halfbyte.converter.qat.training import SCALES

    _, t = trainer(folder, "q3", tmp_path / "qat", lr=0.001, warmup=0.0)
    before = [(m.weight.detach().clone(), m.factor.detach().clone()) for m in t.student.quantizers().values()]
    t._step()
    for (weight, factor), m in zip(before, t.student.quantizers().values()):
        step = 0.001 * float(weight.square().mean().sqrt())
        assert 0.9 * step < float((m.weight - weight).detach().abs().max()) < 1.1 * step
        assert 0.9e-3 * SCALES < float((m.factor - factor).detach().abs().max()) < 1.1e-3 * SCALES


def test_texts_are_a_third_of_what_is_trained_on(torch, shared_data: Path, tmp_path: Path) -> None:
    """Beside windows of documents that the float model writes; few of them come several times, the held-out never."""
    from halfbyte import converter
    from halfbyte.converter.builder import Builder
    from halfbyte.converter.checkpoints import open_checkpoint
    from halfbyte.converter.models import build
    from halfbyte.converter.qat.options import Options, source_recipe, store
    from halfbyte.converter.qat.text import TIMES, sequences

    source, text = shared_data / "tinystories-656k", tmp_path / "text.txt"
    text.write_text((shared_data / "text" / "tinystories.txt").read_text()[:6000])
    with open_checkpoint(source, None) as checkpoint:
        b = Builder(checkpoint, source_recipe())
        build(b)
        store(b, "q3")
        tokenizer, meta = converter._text(checkpoint, b.vocab)
        meta |= converter._facts(checkpoint, b, source, "q3", 1)

        def drawn(own_text: int, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
            o = Options(recipe="q3", length=64, own_text=own_text, seed=seed)
            return sequences(b, meta, tokenizer, "", o, [text], None, tmp_path)

        alone, held = drawn(0)
        assert len(alone) + len(held) == len({tuple(s) for s in [*alone, *held]})  # nothing twice
        for own, times in ((4, 1), (4 * len(alone), 2), (10 * len(alone), TIMES)):
            train, held = drawn(own)
            counts = [train.count(s) for s in alone if s not in held]
            assert set(counts) == {times} and not any(s in train for s in held)
            written = [s for s in train if s not in alone]
            assert abs(len(written) + len(held) - own) < 0.2 * own + 4
            assert all(s[0] == 1 and 1 not in s[1:] and len(s) <= 64 for s in written)
        assert drawn(4) == drawn(4) and drawn(4) != drawn(4, seed=1)
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_training_stops_when_nothing_improves(torch, folder: Path, tmp_path: Path) -> None:
    _, t = trainer(folder, "q4", tmp_path / "qat", steps=50, every=1, patience=2, lr=1.0)
    try:
        found = t.run()
    except halfbyte.HalfbyteError as error:
        assert "lower --lr" in str(error)
    else:
        assert len(found.curve) == found.step + 2 < 50


def test_a_checkpoint_of_another_training_or_a_damaged_one(torch, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "qat"
    _, t = trainer(folder, "q4", path)
    t.save()
    t.identity = "other"
    with pytest.raises(halfbyte.HalfbyteError, match="another source"):
        t.resume()
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(damage)
        with pytest.raises(halfbyte.HalfbyteError, match="damaged"):
            t.resume()


# ---- the command --------------------------------------------------------------------------------


def test_command_trains_a_real_model(torch, shared_data: Path, tmp_path: Path, capsys) -> None:
    """From a checkpoint with a tokenizer to a file that runs; nothing is left beside it, nothing said in a pipe."""
    out = tmp_path / "m.hb"
    text = tmp_path / "text.txt"
    text.write_text((shared_data / "text" / "tinystories.txt").read_text()[:12000])
    source = str(shared_data / "tinystories-656k")
    command = ["train-qat", source, "-o", str(out), "--recipe", "q3", "--text", str(text), "--length", "64"]
    command += [
        "--steps",
        "4",
        "--batch",
        "2",
        "--every",
        "2",
        "--lr",
        "0.005",
        "--start",
        "rtn",
        "--own-text",
        "0",
        "--no-proof",
        "--json",
    ]
    assert main(command) == 0
    done = capsys.readouterr()
    found = json.loads(done.out)
    assert done.err == "" and len(found["curve"]) == 4 and found["measured"][-1][2] < found["measured"][0][2]
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("text.txt",)] == ["m.hb"]
    assert File(out).metadata["quantization.method"] == "qat" and File(out).sections["VOCB"][1]
    assert halfbyte.load(out).session().feed([1, 5, 9]).shape == (2048,)


def test_a_killed_training_goes_on(torch, shared_data: Path, tmp_path: Path, capsys) -> None:
    """Killed between two checkpoints; with --resume the curve, and the file, are those of a training that was not."""
    source, text = str(shared_data / "tinystories-656k"), tmp_path / "text.txt"
    text.write_text((shared_data / "text" / "tinystories.txt").read_text()[:12000])
    options = {
        "recipe": "q3",
        "length": 64,
        "steps": 6,
        "batch": 2,
        "every": 2,
        "freeze": 0.5,
        "own_text": 3,
        "proof": False,
    }
    whole = halfbyte.train_qat(source, tmp_path / "whole.hb", text=[text], **options)
    code = (
        "import os, halfbyte\n"
        "def kill(now, done, total):\n    if done == 5:\n        os.kill(os.getpid(), 9)\n"
        f"halfbyte.train_qat({source!r}, {str(tmp_path / 'm.hb')!r}, text=[{str(text)!r}], progress=kill, **{options})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    assert (tmp_path / ".m.hb.qat").exists() and not (tmp_path / "m.hb").exists()
    command = [
        "train-qat",
        source,
        "-o",
        str(tmp_path / "m.hb"),
        "--text",
        str(text),
        "--no-proof",
        "--resume",
    ]
    command += [a for k, v in options.items() if k != "proof" for a in ("--" + k.replace("_", "-"), str(v))]
    assert main([*command, "--json"]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["curve"] == whole["curve"] and found.err == "continuing at step 4 of 6\n"
    assert (tmp_path / "m.hb").read_bytes() == (tmp_path / "whole.hb").read_bytes()


def fails(capsys, *args: object) -> str:
    """The one line that a command fails with."""
    assert main([str(a) for a in args]) == 2
    done = capsys.readouterr()
    assert done.err.count("\n") == 1 and done.out == ""
    return done.err


def test_errors_are_one_line(torch, folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "m.hb"
    say = ["train-qat", folder, "-o", out]
    assert "q3, q2, ternary" in fails(capsys, *say, "--recipe", "f16")
    assert "lr must lie between" in fails(capsys, *say, "--lr", "-1")
    assert "i8g32, f32" in fails(capsys, *say, "--policy", "f9")
    assert "kv mode" in fails(capsys, *say, "--kv", "k9")
    assert "nothing to resume" in fails(capsys, *say, "--resume")
    assert "needs a tokenizer" in fails(capsys, *say, "--text", __file__)
    assert "too little text" in fails(capsys, *say)
    (tmp_path / ".m.hb.qat").write_bytes(b"")
    assert "--resume continues it" in fails(capsys, *say)
    assert not out.exists()


def test_without_torch_the_error_says_what_to_install(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from halfbyte.runtime.cli import main;"
        f"sys.exit(main(['train-qat', {str(folder)!r}, '-o', {str(tmp_path / 'm.hb')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "halfbyte: error: training needs PyTorch: pip install 'halfbyte[qat]'\n"
