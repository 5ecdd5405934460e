"""The cuda backend on PyTorch's CPU device: every op, policy and model type, against the reference and native."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from cases import ALL, Case

import halfbyte
from halfbyte.formats.container import File
from halfbyte.formats.errors import UsageError
from halfbyte.runtime.backends.reference import Reference
from halfbyte.runtime.lockstep import lockstep
from halfbyte.runtime.model import load
from halfbyte.runtime.parity import BOUNDS, compare

pytest.importorskip("torch", reason="PyTorch is not installed (halfbyte[cuda])")

POLICIES = ("f32", "i8g32", "bf16", "f8")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory):
    """Name of a case and recipe -> its file."""
    folder: Path = tmp_path_factory.mktemp("cuda")

    def convert(name: str, recipe: str = "q4") -> Path:
        path = folder / f"{name}.{recipe}.hb"
        if not path.exists():
            (folder / name).mkdir(exist_ok=True)
            tiny.load_case(name).write_folder(folder / name)
            halfbyte.convert(folder / name, path, recipe=recipe)
        return path

    return convert


@pytest.mark.parametrize("name", tiny.case_names())
def test_lockstep_of_every_model_type(model_file, name: str) -> None:
    for policy in POLICIES:
        for outcome in lockstep(File(model_file(name)), "cuda", policy, rows_of=(5, 1)):
            assert outcome.ok, (policy, outcome)


@pytest.mark.parametrize("case", [c for c in ALL if c.variant == "plain"], ids=str)
def test_every_op_and_encoding(case: Case, tmp_path: Path) -> None:
    file = case.tiny().write(tmp_path / "case.hb")
    for policy in ("f32", "i8g32"):
        for outcome in lockstep(file, "cuda", policy, rows_of=(1, 9)):
            # sums of small programs are set up to cancel, so that a row's largest value says little of its terms
            assert outcome.worst <= max(outcome.tolerance, 1e-4 if outcome.op == "linear" else 0), (
                policy,
                outcome,
            )


@pytest.mark.parametrize("name", ["llama-plain", "gemma3-plain", "qwen3-plain"])
def test_i8g32_is_the_integers_of_native(model_file, name: str) -> None:
    for recipe in ("q4", "q8", "q3"):
        ours, theirs = (load(model_file(name, recipe), b, kv="f16") for b in ("cuda", "native"))
        ids = [(5 * i + 1) % ours.vocab_size for i in range(12)]
        a, b = (m.session().feed_all(ids) for m in (ours, theirs))
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
        assert np.array_equal(a.argmax(1), b.argmax(1))


@pytest.mark.parametrize("kv", ["f32", "f16", "k8v8", "tq3", "tq3-qjl"])
def test_sessions_live_on_the_device(model_file, kv: str) -> None:
    model = load(model_file("mistral-window"), "cuda", kv=kv, policy="f32")  # the smoothest: nothing flips
    law = load(model_file("mistral-window"), "reference", kv=kv, policy="f32")
    ids = [(7 * i + 2) % model.vocab_size for i in range(70)]
    ids = ids[: model.context_length - 4]
    session, expected = model.session(), law.session()
    near = 2e-4 if kv in ("f32", "f16") else 2e-2  # a key or value near an edge may get the other code
    assert np.allclose(session.feed(ids), expected.feed(ids), rtol=0, atol=near)
    session.rewind(9), expected.rewind(9)
    fork = session.fork()
    want = expected.fork().feed([3])
    assert np.allclose(fork.feed([3]), want, rtol=0, atol=near)
    assert np.allclose(session.feed([4]), expected.feed([4]), rtol=0, atol=near)
    with pytest.raises(UsageError, match="cannot be saved"):
        session.save("never")


def test_many_sessions_in_a_step(model_file) -> None:
    from halfbyte.runtime.backends.backend import Step

    model = load(model_file("llama-plain"), "cuda", kv="f32", policy="f32")
    kvs = [model.new_kv(), model.new_kv()]
    for kv in kvs:
        kv.reserve(8)
    rows = [(3, 0, 0), (4, 1, 0), (9, 0, 1), (5, 2, 0), (8, 1, 1)]
    ids, positions, sessions = (np.array(a, np.int32) for a in zip(*rows))
    got = model.run(Step(ids, positions, sessions, np.array([3, 4], np.int32), kvs))
    for row, alone in zip(got, ([3, 4, 5], [9, 8])):
        assert np.allclose(row, model.session().feed(alone), atol=1e-5)


def test_an_unknown_policy_or_device_is_one_line(model_file, monkeypatch) -> None:
    with pytest.raises(UsageError, match="cuda backend has f32, i8g32, bf16, f8"):
        load(model_file("llama-plain"), "cuda", policy="f9")
    with pytest.raises(UsageError, match="native backend has f32, i8g32"):
        load(model_file("llama-plain"), "native", policy="bf16")
    monkeypatch.setenv("HALFBYTE_DEVICE", "cuda:77")
    with pytest.raises(UsageError, match="device cuda:77"):
        load(model_file("llama-plain"), "cuda")


def test_f8_files_keep_their_codes(model_file) -> None:
    from halfbyte.runtime.backends.cuda import Cuda

    path = model_file("llama-plain", "f8")
    file, device = File(path), Cuda(File(path), "f8")
    matrices = [i for i, t in enumerate(file.tensors) if t.encoding == "f8e4m3"]
    assert matrices
    for i in matrices:
        codes, scale = device._stored(i, "f8")
        planes = file.codes(file.tensors[i])
        assert np.array_equal(codes.view(dtype=__import__("torch").uint8).numpy(), planes["codes"])
        values = codes.float().numpy() * scale.numpy()[:, None]
        assert np.array_equal(values, file.dequantize(file.tensors[i]))


@pytest.mark.parametrize("policy", POLICIES)
def test_parity_with_native_or_the_reference(model_file, policy: str) -> None:
    a = "native" if policy in ("f32", "i8g32") else "reference"
    found = compare(model_file("llama-plain"), (a, policy), ("cuda", policy), kv="f16", steps=8)
    assert found["ok"], found["checks"]
    assert found["bound"] == BOUNDS[policy, policy].as_dict()


def test_the_reference_rounds_bf16_and_f8_as_torch_does() -> None:
    import torch

    from halfbyte.runtime.backends import reference
    from halfbyte.runtime.backends.cuda import to_f8

    rng = np.random.default_rng(0)
    x = (rng.normal(size=(40, 64)) * 10.0 ** rng.integers(-8, 8, (40, 1))).astype(np.float32)
    x[3] = 0
    assert np.array_equal(torch.from_numpy(x).bfloat16().float().numpy(), reference.round_bf16(x))
    codes, scale = to_f8(torch.from_numpy(x))
    values, law = reference.round_f8(x)
    assert np.array_equal(codes.float().numpy(), values)
    assert np.array_equal(scale.numpy(), law)


def test_reference_has_every_policy(model_file) -> None:
    ids = [1, 2, 3, 4, 5]
    logits = {
        p: load(model_file("llama-plain", "q8"), "reference", policy=p).session().feed(ids) for p in POLICIES
    }
    assert Reference.policies == POLICIES
    for policy in POLICIES[1:]:
        error = np.abs(logits[policy] - logits["f32"]).max() / np.abs(logits["f32"]).max()
        assert 0 < error < 0.5, policy
