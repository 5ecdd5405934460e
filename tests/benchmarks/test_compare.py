"""The comparisons with peers: arguments, the arithmetic of the tables, the worker protocol, the peers' files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # the benchmarks are scripts beside each other, not a package

import compare  # noqa: E402
import compare_llamacpp  # noqa: E402
import compare_openvino  # noqa: E402
import compare_shapes  # noqa: E402
import compare_worker  # noqa: E402
import gguf_checkpoint  # noqa: E402
import openvino_ir  # noqa: E402
import random_checkpoint  # noqa: E402

from halfbyte.formats.errors import HalfbyteError, UsageError  # noqa: E402

TINY = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 96,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A random checkpoint of TINY."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return compare_shapes.shape(tmp_path / "tiny.json", tmp_path / "work", 0).checkpoint


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A benchmark run as a program."""
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("compare_llamacpp.py", ["--config", "/nowhere"], "--config"),
        ("compare_llamacpp.py", ["--rounds", "0"], "--rounds"),
        ("compare_llamacpp.py", ["--tokens", "5000"], "1024"),
        ("compare_openvino.py", ["--python", "/nowhere/python"], "not an interpreter"),
    ],
)
def test_impossible_requests_are_one_line(name: str, arguments: list[str], why: str) -> None:
    """Exit status 2, no traceback."""
    done = script(name, *arguments)
    assert done.returncode == 2 and why in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["-1", "0,x", ""])
def test_depths_that_are_no_numbers(text: str) -> None:
    """argparse turns the ValueError into its own message."""
    with pytest.raises(ValueError):
        compare.numbers(text)
    assert compare.numbers("0,2048") == [0, 2048]


def test_unknown_variants_are_refused(tmp_path: Path) -> None:
    """Before any file is made."""
    shape = compare_shapes.Shape("s", TINY, tmp_path)
    known = {"--cache": compare_llamacpp, "--flash": compare_llamacpp, "--precision": compare_openvino}
    for option, module in known.items():
        with pytest.raises(UsageError, match=option):
            module.peers(module.parser().parse_args([option, "nonsense"]), shape)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_sorted_and_named() -> None:
    """Prefill first; a prompt of 0 leaves it out."""
    rows = compare.plan([2048, 0, 2048], 512, 64, [4096, 0])
    assert [r.name for r in rows] == ["prefill 512", "prefill 512 at 4096", "decode 64", "decode 64 at 2048"]
    assert rows[-1].length == 2048 + 1 + 32
    assert {r.do for r in compare.plan([0], 0, 64, [0])} == {"decode"}


def test_ratios_and_shares() -> None:
    """Rates: larger is better; seconds and MiB: smaller. The best peer is the one that we beat by least."""
    samples = {
        "decode 64": {
            "ours": [40.0, 60.0, 50.0],
            "a": [25.0, 20.0, 30.0],
            "b": [100.0, 90.0, 110.0],
            "none": [],
        },
        "cold_s": {"ours": [0.5], "a": [1.0]},
        "peak_mib": {"ours": [200.0], "a": [100.0]},
    }
    table = compare.summary(samples)
    assert table["decode 64"] == {
        "ours": {"median": 50.0, "min": 40.0, "max": 60.0},
        "a": {"median": 25.0, "min": 20.0, "max": 30.0},
        "b": {"median": 100.0, "min": 90.0, "max": 110.0},
    }
    assert compare.ratios(table, "ours", ["a", "b"]) == {
        "decode 64": {"a": 2.0, "b": 0.5, "best peer": 0.5},
        "cold_s": {"a": 2.0, "best peer": 2.0},
        "peak_mib": {"a": 0.5, "best peer": 0.5},
    }
    row = compare.Measure("decode", 64, 0)
    facts = {"weight_bytes": 4e8, "kv_bytes": {"33": 1e8}}
    found = compare.shares(table, [row], "ours", facts, {"read_gb_per_s": 50.0})
    assert found == {"decode 64": {"read_gb_per_s": 25.0, "share": 0.5}}


ECHO = """
import sys; sys.path.insert(0, sys.argv[1])
import compare_worker
class Echo:
    def load(self, **o): print("noise"); return {"vocab_size": 7}
    def fill(self, ids, depths, room): return {d: list(ids[:d]) for d in depths}
    def feed(self, cache, ids):
        if len(cache) + len(ids) > 20: raise ValueError("too\\nlong")
        cache += ids
        return float(sum(cache))
    def rewind(self, cache, depth): del cache[depth:]
compare_worker.serve(Echo())
"""


def test_a_worker_keeps_its_caches(tmp_path: Path) -> None:
    """What libraries print does not disturb the answers; each measurement leaves the cache as it was."""
    variant = compare.Variant("echo", [sys.executable, "-c", ECHO, str(BENCHMARKS)], {})
    worker = compare.Worker(variant, tmp_path / "log")
    try:
        assert worker.load(3)["facts"] == {"vocab_size": 7}
        worker.ask("fill", depths=[4, 0, 4], room=8)
        ids = compare_worker.token_ids(7, 12, 3)
        for _ in range(2):
            assert worker.ask("prefill", depth=4, tokens=8)["logit"] == sum(ids[:12])
            assert worker.ask("decode", depth=0, tokens=5)["logit"] == sum(ids[:6])
        assert worker.ask("memory")["peak"] > 1
        rounds = compare.run_rounds({"echo": worker}, compare.plan([0, 4], 0, 2, []), 2, lambda text: None)
        assert [len(v["echo"]) for v in rounds.values()] == [2, 2]
        with pytest.raises(HalfbyteError, match="echo: fill: ValueError: too long"):
            worker.ask("fill", depths=[0], room=30)
    finally:
        worker.close()
    assert worker.process.returncode is not None


def test_gguf_names_cover_the_checkpoint() -> None:
    """Every tensor that random_checkpoint writes has a name in GGUF, and no two have the same."""
    for kind in compare_shapes.MODEL_TYPES:
        shapes = random_checkpoint.shapes(TINY | {"model_type": kind, "tie_word_embeddings": False})
        assert len({gguf_checkpoint.gguf_name(name) for name in shapes}) == len(shapes)


def test_interleaved_rows() -> None:
    """Row i of the first half comes beside row i of the second, head by head."""
    w = np.arange(8)[:, None].repeat(3, 1)
    assert gguf_checkpoint.interleaved(w, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(("bits", "group", "zero"), [(4, 32, True), (4, 64, False), (8, 0, True)])
def test_openvino_codes(bits: int, group: int, zero: bool) -> None:
    """No weight is off by more than half a step of its group (a whole one at the clipped end)."""
    w = np.random.default_rng(0).standard_normal((32, 128)).astype(np.float32)
    w[3] = 0
    codes, scale, points = openvino_ir.codes(w, bits, group, zero)
    back = (codes.astype(np.float32) - (0 if points is None else points)) * scale.astype(np.float32)
    error = np.abs(back - w.reshape(back.shape)) / np.maximum(np.abs(scale.astype(np.float32)), 1e-9)
    assert error.max() < (0.51 if bits == 4 and zero else 1.01) and error.mean() < 0.27
    assert (back[3] == 0).all()


def test_packed_halves() -> None:
    """The first code in the low half, also of negative ones."""
    assert openvino_ir.packed(np.array([1, 2, -1, -8], np.int8)).tolist() == [0x21, 0x8F]


def test_the_gguf_holds_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """Read back with the peer's own package."""
    gguf = pytest.importorskip("gguf")
    gguf_checkpoint.write(checkpoint, tmp_path / "t.gguf")
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "t.gguf").tensors}
    weights = dict(gguf_checkpoint.tensors(checkpoint / "model.safetensors"))
    assert found.keys() == {gguf_checkpoint.gguf_name(name) for name in weights}
    down = weights["model.layers.0.mlp.down_proj.weight"]
    assert (np.asarray(found["blk.0.ffn_down.weight"].data).view(np.uint16).reshape(down.shape) == down).all()


def test_the_openvino_model_runs(checkpoint: Path) -> None:
    """Compiles, and its prefill and decode agree."""
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed (extra bench-openvino)")
    import engine_openvino

    openvino_ir.write(checkpoint, checkpoint / "ir", "int8")
    engine = engine_openvino.OpenVino()
    engine.load(str(checkpoint / "ir"), 1, precision="f32")
    ids = compare_worker.token_ids(TINY["vocab_size"], 24, 0)
    caches = engine.fill(ids, [0, 16], 8)
    whole = engine.feed(caches[0], ids)
    for i in range(16, 24):
        last = engine.feed(caches[16], ids[i : i + 1])
    assert last == pytest.approx(whole, abs=0.1)
    engine.rewind(caches[16], 16)
    assert engine.feed(caches[16], ids[16:]) == pytest.approx(last, abs=0.02)
