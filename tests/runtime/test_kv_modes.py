"""Modes of keys and values: distortion, size, what `auto` picks, a model that 3 bits ruin, long sessions."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import load_case

import halfbyte
from halfbyte.devices.fit import of_file
from halfbyte.formats import annotation, kv_gate, kv_modes
from halfbyte.formats.container import File
from halfbyte.formats.errors import FormatError, KvWarning, UsageError
from halfbyte.runtime.cli import main
from halfbyte.runtime.evaluate import kv_divergence
from halfbyte.runtime.kv_page import decode, dequantize, encode, quantize, rotate, unrotate
from halfbyte.runtime.session import Session

# research/quantization.md section 7.1 (arXiv 2504.19874): mean squared error of unit vectors by bits
TABLE = {"t1": 0.36338, "t2": 0.11748, "t3": 0.03455, "t4": 0.00950}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("side", TABLE)
def test_distortion_is_that_of_the_paper(side: str, dim: int) -> None:
    x = np.random.default_rng(dim).standard_normal((20000, dim)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    codes, scales = quantize(rotate(x), kv_modes.BY_SIDE[side])
    back = unrotate(dequantize(codes, scales, kv_modes.BY_SIDE[side]))
    assert ((back - x) ** 2).sum(axis=1).mean() <= 1.03 * TABLE[side]


# what the paper measures of its inner-product variant, times the dimension, for unit vectors
INNER = {"q2": 0.56, "q3": 0.18, "q4": 0.047}


def products(side: str, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Of random unit vectors q and k: q . k, and q . what a page gives back of k."""
    rng = np.random.default_rng(dim)
    q, k = (rng.standard_normal((40000, dim)).astype(np.float32) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, k))
    s = kv_modes.BY_SIDE[side]
    back = decode(encode(k, s), s).reshape(len(k), s.stages, dim).sum(axis=1)
    return (q * k).sum(axis=1), (q * back).sum(axis=1)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("side", INNER)
def test_inner_products_with_signs_are_unbiased(side: str, dim: int) -> None:
    """As the paper says of its second stage; the levels alone shrink products by what they lose of a key."""
    exact, got = products(side, dim)
    error, norm = got - exact, (exact**2).sum()
    slope = (got * exact).sum() / norm
    assert abs(slope - 1) < 4 * error.std() / norm**0.5 + 0.004  # four deviations, and the scales' rounding
    assert (error**2).mean() * dim <= INNER[side]
    lower = f"t{int(side[1]) - 1}"
    _, alone = products(lower, dim)
    assert (alone * exact).sum() / norm == pytest.approx(1 - TABLE[lower], abs=0.03)


@pytest.mark.parametrize("dim", [64, 128])
def test_the_error_of_signs_is_that_of_an_orthogonal_projection(dim: int) -> None:
    """pi / 2 - 1 times that of the levels before them (Gaussian: pi / 2), which is more than a bit of levels leaves."""
    for side, lower, same in (("q2", "t1", "t2"), ("q3", "t2", "t3"), ("q4", "t3", "t4")):
        exact, got = products(side, dim)
        mean = ((got - exact) ** 2).mean() * dim
        assert mean == pytest.approx((np.pi / 2 - 1) * TABLE[lower], rel=0.05)
        assert mean > 1.5 * TABLE[same]


def test_the_rotation_is_undone_and_spreads_outliers() -> None:
    x = np.zeros((1, 96), np.float32)
    x[0, 5] = 1
    np.testing.assert_allclose(unrotate(rotate(x)), x, atol=1e-6)
    np.testing.assert_allclose(np.abs(rotate(x))[0, :32], 32**-0.5, rtol=1e-6)


def test_scale_bytes() -> None:
    every = np.arange(256, dtype=np.uint8)
    values = kv_modes.e5m3_value(every)
    assert (
        values[0] == 0 and values[8 * 24] == 1 and values[8 * 24 + 3] == 1.375 and (np.diff(values) > 0).all()
    )
    for up in (False, True):
        np.testing.assert_array_equal(kv_modes.e5m3(values, up), every)
    between = values[1:-1] * np.float32(1.001)
    np.testing.assert_array_equal(kv_modes.e5m3(between, False), every[1:-1])
    np.testing.assert_array_equal(kv_modes.e5m3(between, True), every[2:])
    assert kv_modes.e5m3(np.float32([1e30, np.inf]), True).tolist() == [255, 255]


@pytest.mark.parametrize(
    ("name", "most"),
    [("tq3", 3.2), ("tq4", 4.2), ("k8v4", 6.2), ("k8v8", 8.2), ("tq2", 2.2), ("tq3-qjl", 3.2)],
)
def test_bits_of_a_value_as_stored(name: str, most: float) -> None:
    assert kv_modes.mode(name).bits_per_value(64, 64) <= most


@pytest.mark.parametrize(
    "name",
    ["q5", "k8", "k8v", "kf16v8", "k9v4", "k8vq3", "kq5v4", "tq3,7=k8v8", "tq3,x=k8v8", "tq3,0=f16", "tq3,0"],
)
def test_unknown_modes(name: str) -> None:
    with pytest.raises(UsageError, match="kv mode"):
        kv_modes.by_cache(name, 4)


def test_modes_by_layer() -> None:
    assert [m.name for m in kv_modes.by_cache("tq3,0=k8v8,-1=k8v4", 4)] == ["k8v8", "tq3", "tq3", "k8v4"]


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A tiny model whose heads are wide enough for packing to save memory."""
    source = load_case("llama-plain")
    source.write_folder(tmp_path / "c")
    return halfbyte.convert(tmp_path / "c", tmp_path / "m.hb", recipe="q8")


def store(path: Path, kld: dict[str, list[float]]) -> File:
    found = kv_gate.annotate("t", "0" * 64, 10, [8, 16], kld)
    annotation.rewrite_section(path, "KVMD", annotation.encode(found))
    return File(path)


def test_auto_picks_what_was_measured(wide: Path) -> None:
    file = File(wide)
    size = {name: kv_gate.nbytes(file, name, 4096) for name in kv_modes.MODES}
    nothing = "k8v8" if size["k8v8"] < size["f16"] else "f16"
    assert kv_gate.automatic(file) == halfbyte.load(wide).kv_mode == of_file(file).kv == nothing
    file = store(wide, {"tq4": [0.001, 0.009], "tq3": [0.003, 0.011], "tq2": [0.2, 0.1]})
    expected = "tq4" if size["tq4"] < size["f16"] else "f16"
    assert kv_gate.automatic(file) == halfbyte.load(wide).kv_mode == of_file(file).kv == expected
    assert kv_gate.automatic(file, 0.02) == ("tq3" if size["tq3"] < size["f16"] else "f16")
    assert kv_gate.automatic(store(wide, {"tq4": [0.011]})) == "f16"
    with pytest.warns(KvWarning, match="0.011 nats"):
        halfbyte.load(wide, kv="tq4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        halfbyte.load(wide, kv="tq3")  # not measured: nothing is known against it
    assert "tq4 was measured" in capsys_of(lambda: main(["check", str(wide), "--kv", "k8v8", "--json"]), wide)


def capsys_of(run: Callable[[], int], path: Path) -> str:
    """What the command line says on stderr when a failing mode is asked for."""
    import contextlib
    import io

    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        assert run() == 0
        assert main(["run", str(path), "--ids", "1 2", "-n", "1", "--kv", "tq4"]) in (0, 2)
    return err.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b'{"modes":3}',
        b'{"modes":{"tq3":{}}}',
        b'{"modes":{"tq3":{"kld":[]}}}',
        b'{"modes":{"tq3":{"kld":"x"}}}',
    ],
)
def test_a_damaged_annotation_is_one_line(wide: Path, data: bytes) -> None:
    annotation.rewrite_section(wide, "KVMD", data)
    with pytest.raises(FormatError, match="KVMD"):
        halfbyte.load(wide)


def change_weights(folder: Path, ending: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrite the float32 tensors of a folder whose names end so."""
    for path in folder.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name.endswith(ending):
                start, end = (8 + length + n for n in entry["data_offsets"])
                data[start:end] = change(np.frombuffer(data[start:end], "<f4")).astype("<f4").tobytes()
        path.write_bytes(data)


def test_a_large_key_bias_is_refused_by_the_gate(tmp_path: Path) -> None:
    """As Qwen2 has: keys with a huge constant part, of which few bits keep nothing of the rest."""
    folder = load_case("qwen2-plain").write_folder(tmp_path / "c")
    change_weights(folder, "k_proj.bias", lambda x: x + np.where(np.arange(x.size) % 4 == 0, 100, 0))
    change_weights(folder, "v_proj.weight", lambda x: x * 30)
    path = halfbyte.convert(folder, tmp_path / "m.hb", recipe="q8")
    model = halfbyte.load(path)
    rng = np.random.default_rng(0)
    n = min(model.context_length, 200)
    parts = [rng.integers(0, model.vocab_size, n).tolist() for _ in range(4)]
    found = kv_divergence(model, parts, ["k8v8", "tq4", "tq3"])
    kld = {name: [value[0]] for name, value in found.items()}
    assert kld["tq3"][0] > kv_gate.THRESHOLD, kld
    file = store(path, kld)
    assert kv_gate.automatic(file) not in ("tq3", "tq2")
    with pytest.warns(KvWarning, match="tq3"):
        halfbyte.load(path, kv="tq3")


@pytest.mark.parametrize("mode", kv_modes.MODES)
def test_a_long_life_holds_no_memory(wide: Path, mode: str) -> None:
    """Sessions opened, forked, rewound, saved and dropped again and again: the bytes held do not grow."""
    model = halfbyte.load(wide, kv=mode, threads=1)
    rng = np.random.default_rng(0)
    kept: list[Session] = []
    pages = []
    for turn in range(300):
        session = kept[int(rng.integers(len(kept)))].fork() if kept and turn % 3 else model.session()
        room = model.context_length - session.position
        if room > 1:
            session.feed(rng.integers(0, model.vocab_size, min(room, int(rng.integers(1, 40)))).tolist())
        session.rewind(int(rng.integers(0, session.position + 1)))
        kept = [*kept, session][-8:]
        if turn % 50 == 49:
            gc.collect()
            pages.append(sum(type(o).__name__ in ("PackedPage", "FloatPage") for o in gc.get_objects()))
    layers = len(model.file.caches)
    assert max(pages) <= 8 * layers * -(-model.context_length // kv_modes.PAGE) + layers, pages
