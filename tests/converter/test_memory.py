"""`--max-memory`: what a process takes stays below it, the result is the same, and what cannot be met is said."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_model import TEXT, fails, tokenizer_json

import halfbyte
from halfbyte.converter.calibration.activations import Activations
from halfbyte.formats.container import File
from halfbyte.formats.errors import HalfbyteError, UsageError

linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="resident memory is read from Linux"
)
# Not by getrusage: its maximum starts at the size of the process that started this one.
MEASURED = """
import re, sys
from halfbyte.runtime.cli import main
status = main(sys.argv[1:])
print(1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]))
sys.exit(status)
"""


def write_llama(folder: Path, hidden: int, inner: int, layers: int, vocab: int, zeros: bool) -> Path:
    """A llama of f16 weights: zeros in a sparse file, or small random ones; with a tokenizer."""
    folder.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
    }
    config |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    (folder / "tokenizer.json").write_text(tokenizer_json())
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(layers):
        p = f"model.layers.{i}"
        shapes |= {f"{p}.self_attn.{m}_proj.weight": (hidden, hidden) for m in "qkvo"}
        shapes |= {f"{p}.mlp.{m}_proj.weight": (inner, hidden) for m in ("gate", "up")}
        shapes |= {f"{p}.mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{p}.{m}_layernorm.weight": (hidden,) for m in ("input", "post_attention")}
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * int(np.prod(shape))
        header[name], at = {"dtype": "F16", "shape": shape, "data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        if not zeros:
            for shape in shapes.values():
                w = np.ones(shape) if len(shape) == 1 else 0.03 * rng.standard_normal(shape)
                f.write(w.astype(np.float16).tobytes())
        f.truncate(8 + len(text) + at)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 640 MB, `large`, and one whose activations are 600 MB, `wide`, with a text for it."""
    folder = tmp_path_factory.mktemp("memory")
    write_llama(folder / "large", 1024, 4096, 20, 512, True)
    write_llama(folder / "wide", 256, 2048, 1, 160, False)
    (folder / "text.txt").write_text(TEXT * 100)
    return folder


def peak(place: Path, name: str, out: Path, *options: str) -> int:
    """The most resident bytes that a process takes to convert."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "convert", str(place / name), "-o", str(out), *options],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@linux
def test_rounding_to_nearest_stays_below_a_cap_far_below_the_model(place: Path, tmp_path: Path) -> None:
    # the libraries alone map 120 to 150 MB, by what the system has cached
    cap, size = 330_000_000, (place / "large" / "model.safetensors").stat().st_size
    assert size > 1.8 * cap
    assert (
        peak(place, "large", tmp_path / "o.hb", "--method", "rtn", "--no-proof", "--max-memory", f"{cap}")
        <= cap
    )
    File(tmp_path / "o.hb").verify()


@linux
def test_calibration_stays_below_a_cap_far_below_its_activations(place: Path, tmp_path: Path) -> None:
    options = ("--calibrate", str(place / "text.txt"))
    cap = 450_000_000
    assert peak(place, "wide", tmp_path / "free.hb", *options) > 1.3 * cap
    assert peak(place, "wide", tmp_path / "capped.hb", *options, "--max-memory", "450M") <= cap
    assert (tmp_path / "free.hb").read_bytes() == (tmp_path / "capped.hb").read_bytes()


def test_a_cap_that_cannot_be_met(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The number that is said is enough."""
    text = place / "text.txt"
    for options in (("--method", "rtn"), ("--calibrate", text)):
        argv = ("convert", place / "wide", "-o", tmp_path / "o.hb", *options, "--max-memory")
        error = fails(capsys, *argv, "20M")
        assert re.search(r"20M of memory are too little: \w+ of this model needs \d+M", error)
    for options in (("--method", "awq", "--calibrate", text), ("--target-bits", "4")):
        argv = ("convert", place / "wide", "-o", tmp_path / "o.hb", *options, "--max-memory")
        assert "is not known" in fails(capsys, *argv, "2G")
    assert "is not a size" in fails(capsys, *argv, "much")
    assert list(tmp_path.iterdir()) == []


@linux
def test_the_number_that_is_said_is_enough(place: Path, tmp_path: Path) -> None:
    for options in (("--method", "rtn"), ("--calibrate", str(place / "text.txt"))):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, "convert", str(place / "wide"), "-o", str(tmp_path / "o.hb"), *options,
             "--max-memory", "20M"], capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        found = re.search(r"needs (\d+)M", done.stderr)
        assert done.returncode == 2 and found
        needed = int(found[1])
        assert (
            peak(place, "wide", tmp_path / "o.hb", *options, "--max-memory", f"{needed}M") <= needed * 10**6
        )


@linux
def test_the_proof_is_counted_with_the_float_file_that_it_reads(place: Path, tmp_path: Path) -> None:
    """30 M weights: the float file alone is 120 MB. What is said to be needed is enough, and little more than that."""
    write_llama(tmp_path / "m", 1024, 4096, 2, 160, True)
    (tmp_path / "t.txt").write_text(TEXT[:400])
    options = ("--method", "rtn", "--heldout", str(tmp_path / "t.txt"), "--max-memory")
    script = [
        sys.executable,
        "-c",
        MEASURED,
        "convert",
        str(tmp_path / "m"),
        "-o",
        str(tmp_path / "o.hb"),
        *options,
    ]
    done = subprocess.run([*script, "20M"], capture_output=True, text=True, timeout=600)
    found = re.search(r"needs (\d+)M \((\d+)M with --no-proof\)", done.stderr)
    assert done.returncode == 2 and found
    assert int(found[1]) > int(found[2]) + 120
    needed = int(found[1])
    took = peak(tmp_path, "m", tmp_path / "o.hb", *options, f"{needed}M")
    assert 120 * 10**6 < took <= needed * 10**6
    File(tmp_path / "o.hb").verify()


def test_results_do_not_depend_on_the_cap(place: Path, tmp_path: Path) -> None:
    files = [
        halfbyte.convert(place / "wide", tmp_path / "o.hb", method="rtn", max_memory=cap).read_bytes()
        for cap in (None, "40G", 2_000_000_000)
    ]
    assert files[0] == files[1] == files[2]
    with pytest.raises(UsageError, match="too little"):
        halfbyte.convert(place / "wide", tmp_path / "o.hb", method="rtn", max_memory=1)


@pytest.mark.parametrize("limit", [0, 4 * 40 * 5, 1 << 20])
def test_activations_come_back_wherever_they_lie(limit: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {n: rng.standard_normal((40, w)).astype(np.float32) for n, w in (("a", 3), ("b", 5), ("c", 2))}
    spans = [slice(0, 7), slice(7, 8), slice(8, 40)]
    with Activations(40, tmp_path, limit) as activations:
        for _ in range(2):
            for span in reversed(spans):
                for name, a in values.items():
                    activations.store(name, span, a[span])
            for name, a in values.items():
                for span in spans:
                    out = np.empty((40, 9), np.float32)[: span.stop - span.start, 2 : 2 + a.shape[1]]
                    activations.load(name, span, out)
                    assert np.array_equal(out, a[span])
            activations.drop("b")
            values = {n: 2 * a for n, a in values.items()}
        assert list(tmp_path.iterdir()) == []  # what lies there has no name


def test_a_disk_without_room_for_activations(tmp_path: Path) -> None:
    with Activations(4, tmp_path / "gone", 0) as a, pytest.raises(HalfbyteError, match="gone: cannot put"):
        a.store("x", slice(0, 4), np.zeros((4, 1), np.float32))
    if Path("/dev/full").exists():
        with Activations(4, tmp_path, 0) as a, open("/dev/full", "r+b", buffering=0) as full:
            a._open = lambda: full  # type: ignore[method-assign]
            with pytest.raises(HalfbyteError, match="No space left"):
                a.store("x", slice(0, 4), np.zeros((4, 1), np.float32))
