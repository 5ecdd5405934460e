"""Folding changes weights and not the function: every model type, every site, scales and rotations."""

from pathlib import Path

import numpy as np
import pytest
from tiny import case_names, load_case

import halfbyte
from halfbyte.converter import models
from halfbyte.converter.assemble import assemble
from halfbyte.converter.builder import Builder, Matrix, Vector
from halfbyte.converter.checkpoints import open_checkpoint
from halfbyte.converter.fold import Fold, sites
from halfbyte.converter.quantizers import rotation
from halfbyte.converter.recipe import recipe
from halfbyte.formats.errors import UsageError

# float32 rounding of folded weights; an error of one scale or sign moves logits by 1e-2 and more
TOLERANCE = 2e-4


def built(folder: Path, name: str) -> Builder:
    load_case(name).write_folder(folder / "checkpoint")
    b = Builder(open_checkpoint(folder / "checkpoint", None), recipe("f32"))
    models.build(b)
    return b


def logits(b: Builder, path: Path, ids: np.ndarray) -> np.ndarray:
    meta = {
        "general.name": "folded",
        "model.vocab_size": b.vocab,
        "model.context_length": b.context_limit,
    }
    assemble(b, path, meta, b"", "", lambda *_: None)
    return halfbyte.load(path, backend="reference", policy="f32", kv="f32").session().feed_all(ids)


def difference(b: Builder, path: Path, ids: np.ndarray, before: np.ndarray) -> float:
    return float(np.abs(logits(b, path, ids) - before).max())


@pytest.mark.parametrize("name", case_names())
def test_scales_at_every_site_leave_the_logits(name: str, tmp_path: Path) -> None:
    ids = load_case(name).ids[:12]
    b = built(tmp_path, name)
    before = logits(b, tmp_path / "a.hb", ids)
    fold, rng = Fold(b), np.random.default_rng(1)
    open_sites = [s for s in fold.sites if not s.obstacle]
    assert {s.kind for s in open_sites} >= {"value", "up"}
    for site in open_sites:
        fold.scale(site, np.exp(rng.normal(0, 1, site.width)))
    assert difference(b, tmp_path / "b.hb", ids, before) < TOLERANCE
    # and the scales did arrive: with one consumer left out, the function is another
    fold.map_columns(open_sites[0].consumers[0], _Twice())
    assert difference(b, tmp_path / "c.hb", ids, before) > 50 * TOLERANCE


class _Twice:
    span = 1

    def apply(self, x: np.ndarray, first: int) -> np.ndarray:
        return 2 * x


@pytest.mark.parametrize("name", case_names())
def test_rotations_leave_the_logits(name: str, tmp_path: Path) -> None:
    ids = load_case(name).ids[:12]
    b = built(tmp_path, name)
    before = logits(b, tmp_path / "a.hb", ids)
    fold = Fold(b)
    if load_case(name).config["model_type"] in ("gemma2", "gemma3_text", "gemma3", "olmo2"):
        with pytest.raises(UsageError, match="cannot be rotated"):
            rotation.residual(fold, seed=3)
        assert difference(b, tmp_path / "b.hb", ids, before) == 0  # refused before anything was changed
    else:
        rotation.residual(fold, seed=3)
    assert rotation.heads(fold, seed=4) == b.layers
    assert difference(b, tmp_path / "c.hb", ids, before) < TOLERANCE
    # scales on top of rotations: the maps compose
    rng = np.random.default_rng(1)
    for site in (s for s in fold.sites if not s.obstacle):
        fold.scale(site, np.exp(rng.normal(0, 0.5, site.width)))
    assert difference(b, tmp_path / "d.hb", ids, before) < TOLERANCE


def test_sites_of_a_llama(tmp_path: Path) -> None:
    b = built(tmp_path, "llama-tied")
    found = sites(b)
    assert [s.kind for s in found] == ["norm", "value", "norm", "up"] * b.layers + ["norm"]
    head = found[-1]
    assert "other uses" in head.obstacle and [b.tensors[m].name for m in head.consumers] == ["embed"]
    value = found[1]
    assert value.heads is not None
    kv, share, dim = value.heads
    assert value.width == kv * dim and len(value.columns(np.ones(value.width))) == kv * share * dim
    assert value.reduce(np.arange(kv * share * dim)).shape == (value.width,)
    with pytest.raises(UsageError, match="other uses"):
        Fold(b).scale(head, np.ones(head.width))


def test_scales_must_be_positive_and_as_many(tmp_path: Path) -> None:
    fold = Fold(built(tmp_path, "llama-plain"))
    site = fold.sites[0]
    for bad in (np.zeros(site.width), np.full(site.width, np.nan), np.ones(site.width + 1)):
        with pytest.raises(UsageError, match="positive finite"):
            fold.scale(site, bad)


def test_rows_come_a_block_at_a_time(tmp_path: Path) -> None:
    """Any run of rows equals the same rows of the whole, maps that mix rows included; the rest stays as stored."""
    b = built(tmp_path, "llama-plain")
    untouched = b.checkpoint.dtype("model.layers.0.self_attn.q_proj.weight")
    fold = Fold(b)
    rotation.heads(fold, seed=1)
    assert b.checkpoint.dtype("model.layers.0.self_attn.v_proj.weight") == "f32"
    assert b.checkpoint.dtype("model.layers.0.self_attn.q_proj.weight") == untouched
    rotation.residual(fold, seed=2)
    for t in b.tensors:
        if isinstance(t, Matrix):
            for name in t.sources:
                whole = b.checkpoint.read(name)
                for start in range(0, len(whole), 3):
                    part = b.checkpoint.read_rows(name, start, min(start + 3, len(whole)))
                    np.testing.assert_array_equal(part, whole[start : start + 3])


def test_equal_vectors_part_when_one_changes(tmp_path: Path) -> None:
    """The builder stores equal norm weights once; a scale at one norm must not reach the other."""
    load_case("llama-plain").write_folder(tmp_path / "checkpoint")
    b = built(tmp_path, "llama-plain")
    norms = [s for s in sites(b) if s.kind == "norm"]
    first, second = (b._records[s.record] for s in norms[:2])
    second.weights[0] = first.weights[0]
    shared = b.tensors[first.weights[0]]
    assert isinstance(shared, Vector)
    ids = load_case("llama-plain").ids[:8]
    before = logits(b, tmp_path / "a.hb", ids)
    fold = Fold(b)
    fold.scale(fold.sites[0], np.full(fold.sites[0].width, 3.0))
    assert first.weights[0] != second.weights[0]
    np.testing.assert_array_equal(b.tensors[second.weights[0]].values, shared.values)
    assert difference(b, tmp_path / "b.hb", ids, before) < TOLERANCE
