"""nll, perplexity and KL divergence against numbers computed another way."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from story import TEXT, story_folder
from tiny import load_case

import halfbyte
from halfbyte.formats.errors import UsageError
from halfbyte.runtime.evaluate import evaluate, measure


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny story model in three recipes."""
    folder = tmp_path_factory.mktemp("story")
    source = story_folder(folder / "c")
    return {r: halfbyte.convert(source, folder / f"{r}.hb", recipe=r) for r in ("f32", "q8", "q4")}


def test_against_plain_sums(files: dict[str, Path]) -> None:
    f32, q4 = (halfbyte.load(files[r], backend="reference") for r in ("f32", "q4"))
    text, ctx = TEXT[:300], 40
    ids = f32.tokenizer.encode(text, bos=False, special=False)
    nll, kld, top = [], [], []
    for i in range(0, len(ids), ctx - 1):
        window = [0, *ids[i : i + ctx - 1]]
        p, q = (m.session().feed_all(window[:-1]).astype(np.float64) for m in (f32, q4))
        p, q = (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in (p, q))
        nll += [-np.log(q[j, t]) for j, t in enumerate(window[1:])]
        kld += (p * np.log(p / q)).sum(axis=1).tolist()
        top += (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
    got = evaluate(q4, text, ctx=ctx, against=f32)
    assert got["tokens"] == len(nll) == len(ids)
    np.testing.assert_allclose(got["nll_per_token"], np.mean(nll), rtol=1e-9)
    np.testing.assert_allclose(got["ppl"], np.exp(np.mean(nll)), rtol=1e-9)
    np.testing.assert_allclose(got["kld_mean"], np.mean(kld), rtol=1e-7)
    np.testing.assert_allclose(got["kld_p99"], np.quantile(kld, 0.99), rtol=1e-7)
    assert got["top1_agreement"] == np.mean(top)


def test_more_bits_are_closer(files: dict[str, Path]) -> None:
    f32 = halfbyte.load(files["f32"], backend="reference")
    kld = {}
    for recipe in ("f32", "q8", "q4"):
        model = halfbyte.load(files[recipe], backend="reference", kv="f32")
        kld[recipe] = evaluate(model, TEXT[:400], ctx=64, against=f32)["kld_mean"]
    assert abs(kld["f32"]) < 1e-12 < kld["q8"] < kld["q4"] / 5


def test_memory_does_not_grow_with_the_text(files: dict[str, Path]) -> None:
    """But for 8 bytes a token: less than the logits of the seven windows more, even as float32."""
    f32, q4 = (halfbyte.load(files[r], backend="reference") for r in ("f32", "q4"))
    window = TEXT[:400]
    part = q4.tokenizer.encode(window, bos=True)[:128]
    peaks = []
    for count in (1, 1, 8):  # the first fills caches
        tracemalloc.start()
        measure(q4, [part] * count, against=f32)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(part) == 128 and peaks[2] - peaks[1] < 7 * 128 * 320 * 4


def test_refusals(files: dict[str, Path], tmp_path: Path) -> None:
    model = halfbyte.load(files["q4"], backend="reference")
    for text, ctx in (("", 64), (TEXT, 1), (TEXT, 1 << 20)):
        with pytest.raises(UsageError):
            evaluate(model, text, ctx=ctx)
    load_case("llama-plain").write_folder(tmp_path / "c")
    other = halfbyte.load(halfbyte.convert(tmp_path / "c", tmp_path / "m.hb"), backend="reference")
    with pytest.raises(UsageError, match="different tokenizers"):
        evaluate(model, TEXT, ctx=16, against=other)
