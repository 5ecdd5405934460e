"""From weights to the file under each recipe: quantised by the method; and what arrived quantised is kept exactly."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from programs import code_matrix
from small_model import write_checkpoint
from tiny import load_case

import halfbyte
from halfbyte.converter import models
from halfbyte.converter.assemble import assemble, encode
from halfbyte.converter.builder import Builder, Matrix
from halfbyte.converter.checkpoints.checkpoint import Checkpoint, Packed
from halfbyte.converter.quantizers import rtn
from halfbyte.converter.quantizers.float8 import LARGEST
from halfbyte.converter.recipe import HEAD, HEADS, RECIPES, STORAGES, Storage, base, head, recipe
from halfbyte.converter.weights import Weights
from halfbyte.formats import encodings, tiles
from halfbyte.formats.container import File
from halfbyte.formats.encodings import MATRIX_ENCODINGS, parameters_are_valid
from halfbyte.formats.errors import CheckpointError, UsageError
from halfbyte.runtime.backends import native
from halfbyte.runtime.model import weight_facts

FAMILY = [e.name for e in MATRIX_ENCODINGS if e.row_scale]


@pytest.mark.parametrize("name", FAMILY)
def test_searched_recipes(name: str, tmp_path: Path) -> None:
    """Every matrix has the codes of `quantize_table`, the stated bits, and the model runs."""
    case = load_case("llama-plain")
    case.write_folder(tmp_path / "c")
    alike = f"{name}-" if name in HEADS else name
    file = File(halfbyte.convert(tmp_path / "c", tmp_path / "m.hb", recipe=alike, proof=False))
    file.verify()
    assert file.metadata["general.recipe"] == alike and file.version == (1, encodings.BY_NAME[name].minor)
    stored = file.tensors[file.tensor_index["embed"]]
    codes, sub, row = rtn.quantize_table(case.weights()["model.embed_tokens.weight"], name)
    for plane, want in (("codes", codes), ("scales", sub), ("row", row)):
        np.testing.assert_array_equal(file.codes(stored)[plane], want)
    found = {t.name: t.encoding for t in file.tensors if t.tile == tiles.P16}
    assert set(found.values()) == {name}
    facts = weight_facts(file)["encodings"][name]
    matrices = [t for t in file.tensors if t.encoding == name]
    assert facts["bytes"] == sum(t.nbytes for t in matrices)
    assert encodings.BY_NAME[name].bits < facts["bits_per_weight"] < 2 * encodings.BY_NAME[name].bits
    logits = halfbyte.load(file.path, backend="reference").session().feed_all(case.ids[:8])
    assert np.isfinite(logits).all() and np.abs(logits).max() > 0


def test_better_recipes_are_closer(tmp_path: Path) -> None:
    """The error of every matrix falls from q2 to q8."""
    case = load_case("llama-plain")
    case.write_folder(tmp_path / "c")
    exact = File(halfbyte.convert(tmp_path / "c", tmp_path / "f32.hb", recipe="f32"))
    before = None
    for name in (*sorted(FAMILY), "q8"):
        (tmp_path / "plan").write_text(f'[encodings]\n"*" = "{name}"\n')
        file = File(halfbyte.convert(tmp_path / "c", tmp_path / f"{name}.hb", plan=tmp_path / "plan"))
        errors = [
            float(np.sum((exact.dequantize(a) - file.dequantize(b)) ** 2))
            for a, b in zip(exact.tensors, file.tensors)
            if a.tile == tiles.P16
        ]
        assert before is None or all(now < then / 2 for now, then in zip(errors, before))
        before = errors


def test_the_head_gets_more_bits(tmp_path: Path) -> None:
    """Tied or not: with a + six, under q4 five, with a - none. Wider, float and packed storages stay as they are."""
    for name, want in (("q2", HEAD), ("q5", HEAD), ("q6", "q6"), ("q8", "q8"), ("f16", "f16")):
        assert head("q4+", Storage(name)).encoding == want
    assert [head(n, Storage(base(n))).encoding for n in ("q4", "q4-", "q3", "f8")] == ["q5", "q4", "q3", "f8"]
    assert head("q4", Storage("q8")).encoding == "q8"
    for name in ("q4", "q4+"):
        assert head(name, packed := Storage("i4", 32, "f16", packed=True)) == packed
    for tied in (False, True):
        folder = write_checkpoint(tmp_path / str(tied), config={"tie_word_embeddings": tied}, tokenizer=False)
        for name, want in (("q4+", HEAD), ("q4", HEADS["q4"]), ("q4-", "q4"), (None, HEADS["q4"])):
            file = File(halfbyte.convert(folder, tmp_path / "m.hb", recipe=name))
            assert file.metadata["general.recipe"] == (name or "q4")
            found = {t.name: t.encoding for t in file.tensors if t.tile == tiles.P16}
            assert found.pop("embed" if tied else "lm_head") == want
            assert set(found.values()) == {"q4"}


class Held(Checkpoint):
    """A llama whose projections arrived quantised, in memory."""

    format, path, generation = "huggingface", Path("memory"), {}

    def __init__(self, encoding: str, group: int, scale_type: str):
        case = load_case("llama-plain")
        self.config, self.tensors = case.config, dict[str, Any](case.weights())
        self.encoding, rng = encoding, np.random.default_rng(5)
        for name, w in self.tensors.items():
            if "_proj" in name:
                planes = code_matrix(name, encoding, *w.shape, rng, group, scale_type).planes
                for plane in ("scales", "mins"):
                    if plane in planes and scale_type == "bf16":
                        import ml_dtypes

                        planes[plane] = planes[plane].view(ml_dtypes.bfloat16)
                self.tensors[name] = Packed(encoding, group, **planes)

    def names(self) -> list[str]:
        return list(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> str:
        return self.encoding if isinstance(self.tensors[name], Packed) else "f32"

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray | Packed:
        t = self.tensors[name]
        return t.take(slice(start, stop)) if isinstance(t, Packed) else t[start:stop]

    def sizes(self) -> list[tuple[str, int]]:
        return []

    def close(self) -> None: ...


def written(checkpoint: Checkpoint, name: str, path: Path) -> File:
    """The file of a checkpoint under a recipe."""
    b = Builder(checkpoint, recipe(name))
    models.build(b)
    meta = {"model.vocab_size": b.vocab, "model.context_length": 64}
    assemble(b, path, meta, b"", "", lambda *_: None)
    file = File(path)
    file.verify()
    return file


ARRIVED = [
    (e.name, e.group or group, scale)
    for e in MATRIX_ENCODINGS
    if e.has_codes and not e.row_scale
    for group, scale in ((0, "f32"), (16, "f16"), (32, "bf16"), (16, "k256"), (32, "k256"))
    if (e.scale == "*" and parameters_are_valid(e, group, scale)) or (e.scale != "*" and scale == "f16")
]


@pytest.mark.parametrize(("encoding", "group", "scale_type"), ARRIVED)
def test_keep_keeps_every_code_and_scale(encoding: str, group: int, scale_type: str, tmp_path: Path) -> None:
    """Stacked projections hold exactly the planes of their sources, row after row."""
    checkpoint = Held(encoding, group, scale_type)
    file = written(checkpoint, "keep", tmp_path / "m.hb")
    kinds = {(t.encoding, t.scale_type) for t in file.tensors if t.tile == tiles.P16}
    assert kinds == {("f32", ""), (encoding, scale_type)}
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn."
        sources = [checkpoint.tensors[f"{prefix}{n}_proj.weight"] for n in "qkv"]
        tensor = next(
            t
            for t in file.tensors
            if t.encoding == encoding
            and t.shape[0] == sum(s.shape[0] for s in sources)
            and np.array_equal(file.codes(t)["codes"][: len(sources[0].codes)], sources[0].codes)
        )
        stored = file.codes(tensor)
        for plane in sources[0].planes():
            want = np.concatenate([s.planes()[plane] for s in sources])
            assert stored[plane].tobytes() == want.tobytes() and stored[plane].shape == want.shape
        w = np.concatenate([s.dequantize() for s in sources])
        np.testing.assert_array_equal(file.dequantize(tensor), w)


def test_narrow_integer_codes_are_not_rounded_again(tmp_path: Path) -> None:
    """q4 keeps i3 and requantises i5 and 8-bit floats; q8 keeps i5; f16 decodes all."""
    for encoding, name, kept in (
        ("i3", "q4", True), ("i5", "q4", False), ("i5", "q8", True), ("f8e4m3", "q8", False), ("z2", "f16", False),
    ):  # fmt: skip
        file = written(Held(encoding, 32, "f16"), name, tmp_path / "m.hb")
        assert (encoding in {t.encoding for t in file.tensors}) == kept


def test_8_bit_floats_that_are_not_finite(tmp_path: Path) -> None:
    """A NaN among the codes is refused by the tensor's name, as a NaN among floats is; nothing remains."""
    for encoding, code in (("f8e4m3", 0x7F), ("f8e5m2", 0xFC)):
        checkpoint = Held(encoding, 32, "f16")
        checkpoint.tensors["model.layers.1.mlp.down_proj.weight"].codes[3, 5] = code
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj.* not finite"):
            written(checkpoint, "keep", tmp_path / "m.hb")
    assert list(tmp_path.iterdir()) == []


def test_take_and_scale_type() -> None:
    """Rows of a Packed keep every plane; the scale type is that of the arrays."""
    planes = code_matrix("m", "a4", 20, 300, np.random.default_rng(1), 32, "k256").planes
    packed = Packed("a4", 32, **planes)
    assert packed.scale_type == "k256" and set(packed.planes()) == set(planes)
    order = np.array([3, 1, 19])
    np.testing.assert_array_equal(packed.take(order).dequantize(), packed.dequantize()[order])
    one = np.zeros((1, 4), np.uint8)
    for dtype, name in ((np.float16, "f16"), (np.float32, "f32")):
        assert Packed("i4", 0, one, np.ones((1, 1), dtype)).scale_type == name


def test_unknown_recipe() -> None:
    """One line that lists what there is."""
    with pytest.raises(UsageError, match=r"unknown recipe 'q7'; there are f32, .*q2, .*keep"):
        recipe("q7")
    assert set(FAMILY) < set(RECIPES)


@pytest.mark.parametrize("name", sorted(STORAGES))
@pytest.mark.parametrize("block", [1 << 12, 1 << 24])
def test_8_bit_float_recipes(name: str, block: int, tmp_path: Path) -> None:
    """Scales are shared as the recipe says; the largest weight becomes the largest value; all are at their nearest."""
    rng = np.random.default_rng(1)
    w = (rng.normal(size=(300, 288)) * 10.0 ** rng.integers(-3, 2, (300, 1))).astype(np.float32)
    w[40] = 0
    s = STORAGES[name].of_width(288)
    found: list[dict[str, np.ndarray]] = []
    source = SimpleNamespace(
        shape=lambda name: w.shape, read_rows=lambda name, a, z: w[a:z], dtype=lambda name: "f32"
    )
    weights = Weights(SimpleNamespace(checkpoint=source))  # type: ignore[arg-type]
    encode(Matrix("w", ("w",), w.shape, s), weights, lambda row, p: found.append(p), block=block)
    codes, scales = (np.concatenate([p[k] for p in found]) for k in ("codes", "scales"))
    assert block > w.size or len(found) > 1
    levels = np.asarray(encodings.BY_NAME[s.encoding].levels, np.float32)
    width, span = s.group or 288, s.span or 300
    for a in range(0, 300, span):
        for g in range(scales.shape[1]):
            part = np.abs(w[a : a + span, g * width : (g + 1) * width])
            assert np.unique(scales[a : a + span, g]).size == 1
            assert scales[a, g] == np.float32(part.max() / np.float32(LARGEST[s.encoding]))
    by_column = np.repeat(scales, width, axis=1)[:, :288]
    finite = np.sort(levels[np.isfinite(levels)].astype(np.float64))
    ratio = w.astype(np.float64) / np.where(by_column > 0, by_column, 1)
    got = levels[codes].astype(np.float64)
    at = np.clip(np.searchsorted(finite, ratio), 1, len(finite) - 1)
    best = np.minimum(np.abs(ratio - finite[at - 1]), np.abs(ratio - finite[at]))
    assert (np.abs(ratio - got) <= best * (1 + 1e-6) + 1e-12).all()


@pytest.mark.parametrize("name", sorted(STORAGES))
def test_8_bit_float_files_run(name: str, tmp_path: Path) -> None:
    case = load_case("llama-plain")
    case.write_folder(tmp_path / "c")
    file = File(halfbyte.convert(tmp_path / "c", tmp_path / "m.hb", recipe=name, proof=False))
    file.verify()
    assert {t.encoding for t in file.tensors if t.tile == tiles.P16} == {STORAGES[name].encoding}
    want = halfbyte.load(file.path, backend="reference", kv="f32").session().feed_all(case.ids[:8])
    for backend in ("jit", "native"):
        if backend == "native" and native.library_path() is None:
            continue
        got = halfbyte.load(file.path, backend=backend, kv="f32").session().feed_all(case.ids[:8])
        assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()
