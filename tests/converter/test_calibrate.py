"""The walk through a program: what every matrix's input is, on every model type, and what later layers see."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_model import write_checkpoint
from tiny import case_names, load_case

import halfbyte
from halfbyte.converter import models
from halfbyte.converter.blas import Products, mirror
from halfbyte.converter.builder import Builder, Matrix
from halfbyte.converter.calibrate import Calibration, Statistics, own_sequences, sequences
from halfbyte.converter.calibration.own_text import own_documents
from halfbyte.converter.checkpoints import open_checkpoint
from halfbyte.converter.recipe import recipe
from halfbyte.converter.weights import Weights
from halfbyte.formats.errors import UsageError
from halfbyte.runtime.backends.backend import Step


def built(folder: Path) -> Builder:
    b = Builder(open_checkpoint(folder, None), recipe("f32"))
    models.build(b)
    return b


def inputs_by_matrix(path: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What the reference backend puts into every LINEAR of an f32 file, by the matrix's name."""
    model = halfbyte.load(path, backend="reference", policy="f32")
    file, backend, kv = model.file, model.backend, model.new_kv()
    kv.reserve(len(ids))
    rows = np.arange(len(ids), dtype=np.int32)
    step = Step(ids.astype(np.int32), rows, np.zeros(len(ids), np.int32), rows, [kv])
    backend.begin(step)
    out = {}
    for i, r in enumerate(file.program):
        if int(r["code"]) == 5:
            out[file.tensors[int(r["w"][0])].name] = backend.slot(int(r["in"][0]), step).copy()
        backend.run_range(step, i, i + 1)
    return out


@pytest.mark.parametrize("name", case_names())
def test_statistics_are_those_of_the_inputs(name: str, tmp_path: Path) -> None:
    case = load_case(name)
    folder = case.write_folder(tmp_path / "c")
    path = halfbyte.convert(folder, tmp_path / "m.hb", recipe="f32")
    ids = [case.ids[:11], case.ids[3:10], case.ids[:1]]
    want: dict[str, list[np.ndarray]] = {}
    for s in ids:
        for matrix, x in inputs_by_matrix(path, s).items():
            want.setdefault(matrix, []).append(x.astype(np.float64))
    seen: dict[str, Statistics] = {}
    b = built(folder)
    Calibration(b, Weights(b), ids).run(lambda t, s: seen.setdefault(t.name, s) and None, sample=5)
    assert list(seen) == list(want)
    for matrix, parts in want.items():
        x, s = np.concatenate(parts), seen[matrix]
        size = np.abs(x).max()
        assert s.count == len(x) == 19
        np.testing.assert_allclose(s.mean, x.mean(axis=0), atol=1e-5 * size)
        np.testing.assert_allclose(s.absmax, np.abs(x).max(axis=0), atol=1e-5 * size)
        np.testing.assert_allclose(s.square, (x**2).mean(axis=0), atol=1e-5 * size**2)
        np.testing.assert_allclose(s.hessian, x.T @ x / len(x), atol=1e-5 * size**2)
        np.testing.assert_allclose(s.sample, x[[0, 4, 9, 13, 18]], atol=1e-5 * size)


def test_later_layers_see_what_the_visitor_returns(tmp_path: Path) -> None:
    """Statistics after a replaced matrix are those of a checkpoint that holds the replacement."""
    case = load_case("llama-plain")
    folder = case.write_folder(tmp_path / "c")
    b = built(folder)
    weights = Weights(b)
    changed = {t.name: weights.rows(t) * np.float32(0.9) for t in b.tensors if isinstance(t, Matrix)}
    seen: dict[str, Statistics] = {}

    def visit(t: Matrix, s: Statistics) -> np.ndarray:
        seen[t.name] = s
        return changed[t.name]

    Calibration(b, weights, [case.ids]).run(visit)
    edited = Weights(b)
    for name in changed:
        if name != "embed":
            edited.edit(name, lambda w, _: w * np.float32(0.9))
    plain: dict[str, Statistics] = {}
    Calibration(b, edited, [case.ids]).run(lambda t, s: plain.setdefault(t.name, s) and None)
    for name, s in plain.items():
        np.testing.assert_array_equal(seen[name].hessian, s.hessian)


def test_drift_is_what_the_output_misses(tmp_path: Path) -> None:
    """For o_proj: (x_float - x) W^T and the error that the residual already has, against the inputs."""
    case = load_case("llama-plain")
    folder = case.write_folder(tmp_path / "c")
    b = built(folder)
    weights = Weights(b)
    table = next(t for t in b.tensors if isinstance(t, Matrix) and t.name == "embed")
    worse = weights.rows(table) + np.float32(0.01) * np.sin(np.arange(table.shape[1], dtype=np.float32))
    now: dict[str, Statistics] = {}
    Calibration(b, weights, [case.ids]).run(
        lambda t, s: now.setdefault(t.name, s) and None,
        drift=True,
        sample=len(case.ids),
        embedding=lambda t, ids: worse[ids],
    )
    before: dict[str, Statistics] = {}
    Calibration(b, weights, [case.ids]).run(
        lambda t, s: before.setdefault(t.name, s) and None, sample=len(case.ids)
    )
    for name, residual in (
        ("layers.0.self_attn.o_proj", (weights.rows(table) - worse)[case.ids]),
        ("layers.0.mlp.gate_up", None),
    ):
        t = next(t for t in b.tensors if t.name == name)
        assert isinstance(t, Matrix)
        w, x = weights.rows(t), now[name].sample
        y = (before[name].sample - x) @ w.T
        want = (y if residual is None else y + residual).T @ x / len(x)
        got = now[name].missing(w)
        assert got is not None and np.abs(want).max() > 1e-4
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max() + 1e-8)
    same: dict[str, Statistics] = {}
    Calibration(b, weights, [case.ids]).run(lambda t, s: same.setdefault(t.name, s) and None, drift=True)
    for t in b.tensors:
        if isinstance(t, Matrix) and t.name in same:
            missing = same[t.name].missing(weights.rows(t))
            assert missing is not None and not missing.any()


def test_only_some_matrices_are_visited(tmp_path: Path) -> None:
    case = load_case("llama-plain")
    b = built(case.write_folder(tmp_path / "c"))
    seen: list[str] = []
    Calibration(b, Weights(b), [case.ids]).run(
        lambda t, s: seen.append(t.name), only={"layers.1.mlp.down_proj", "lm_head"}
    )
    assert seen == ["layers.1.mlp.down_proj", "lm_head"]


def test_bad_sequences_are_refused(tmp_path: Path) -> None:
    case = load_case("llama-plain")
    b = built(case.write_folder(tmp_path / "c"))
    for ids in ([], [[]], [[b.vocab]], [[-1]]):
        with pytest.raises(UsageError):
            Calibration(b, Weights(b), ids)


@pytest.mark.parametrize("shape", [(7, 3, 5), (512, 172, 64), (600, 1100, 1300), (1, 2000, 513)])
def test_products_do_not_depend_on_threads(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((n, k), np.float32)
    results = []
    for threads in (1, 2, 5):
        with Products(threads) as p:
            gram, mixed = np.zeros((k, k)), np.zeros((k, k))
            p.add_gram(gram, a)
            mirror(gram)
            p.add_gram(mixed, a, a + 1)
            spd = gram + k * np.eye(k)
            assert p.cholesky(spd)
            results.append([p.matmul(a, b.T), gram, mixed, np.tril(spd)])
    for other in results[1:]:
        for x, y in zip(results[0], other):
            np.testing.assert_array_equal(x, y)
    product, gram, mixed, factor = results[0]
    a, b = a.astype(np.float64), b.astype(np.float64)
    np.testing.assert_allclose(product, a @ b.T, atol=1e-3)
    np.testing.assert_allclose(gram, a.T @ a, atol=1e-3)
    np.testing.assert_allclose(mixed, a.T @ (a + 1), atol=2e-3)
    np.testing.assert_allclose(factor @ factor.T, gram + k * np.eye(k), rtol=1e-9, atol=1e-9)


def test_an_indefinite_matrix_has_no_factor() -> None:
    a = np.eye(300)
    a[280, 280] = -1
    with Products(1) as p:
        assert not p.cholesky(a)


# ---- token sequences ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> halfbyte.Model:
    folder = tmp_path_factory.mktemp("chatty")
    write_checkpoint(folder / "m", template=True)
    return halfbyte.load(halfbyte.convert(folder / "m", folder / "m.hb", recipe="f32"))


def test_text_becomes_windows_that_start_with_bos(chatty: halfbyte.Model, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the dog ran to the tree. " * 2000)
    got = sequences(chatty.tokenizer, "", tmp_path / "t.txt", 100)
    assert len(got) == 64 and all(s[0] == chatty.tokenizer.bos_id and len(s) <= 100 for s in got)
    assert chatty.tokenizer.decode(got[0]).startswith("the dog ran")


def test_chats_are_rendered_by_the_models_template(chatty: halfbyte.Model, tmp_path: Path) -> None:
    chat = [{"role": "u", "content": "who saw a dog"}, {"role": "a", "content": "the tree"}]
    lines = [json.dumps({"messages": chat}), "", json.dumps(chat), json.dumps({"text": "a tree"})]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    first, second, third = sequences(chatty.tokenizer, chatty.chat_template, tmp_path / "c.jsonl", 512)
    tokenizer = chatty.tokenizer
    assert first == second == tokenizer.encode("<s><|turn|>u who saw a dog<|end|><|turn|>a the tree<|end|>")
    assert first.count(tokenizer.bos_id) == 1 and tokenizer.id_of("<|turn|>") in first
    assert third == tokenizer.encode("a tree")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.jsonl", b"{", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "a dog"}\n[1]', "line 2 holds neither"),
        ("a.jsonl", b'{"messages": []}', "line 1 holds neither"),
        ("a.jsonl", b'[{"role": "u", "content": "a"}]', "no chat template"),
    ],
)
def test_a_text_that_cannot_be_used(
    chatty: halfbyte.Model, tmp_path: Path, name: str, content: bytes, why: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=why):
        sequences(chatty.tokenizer, "", tmp_path / name, 128)
    with pytest.raises(UsageError, match="No such file"):
        sequences(chatty.tokenizer, "", tmp_path / "absent", 128)


def test_the_built_in_mix_suits_every_tokenizer(chatty: halfbyte.Model) -> None:
    got = sequences(chatty.tokenizer, "", None, 128)
    assert len(got) == 64 and all(1 < len(s) <= 128 for s in got)


def test_a_model_writes_its_own_text(chatty: halfbyte.Model) -> None:
    """Documents that are likely by the model's own judgement, the same every time, and windows of their text."""
    path, start = chatty.file.path, chatty.tokenizer.bos_id
    documents = own_documents(path, 480, 0, 12)
    assert documents == own_documents(path, 480, 0, 12) and documents != own_documents(path, 480, 1, 12)
    assert len(documents) >= 12 and 300 < sum(map(len, documents)) <= 480
    read = [[start, *ids] for ids in documents if ids]
    logits = np.concatenate([chatty.session().feed_all(s[:-1]) for s in read]).astype(np.float64)
    following = np.concatenate([s[1:] for s in read])
    p = np.exp(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    likelihood = np.log(p[np.arange(len(p)), following]).mean()
    entropy = (p * np.log(p)).sum(axis=1).mean()
    assert likelihood == pytest.approx(entropy, abs=0.1) and entropy > -np.log(p.shape[1]) + 0.2
    got = own_sequences(path, 40, 12)
    assert 6 <= len(got) <= 12 and all(len(s) == 40 for s in got[:-1])
    assert all(s.count(start) == 1 and s[0] == start for s in got)
