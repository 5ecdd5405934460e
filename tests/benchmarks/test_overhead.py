"""The measurement of what a token costs outside the kernels."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from halfbyte.runtime.backends import native

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import overhead
import random_checkpoint


def test_a_file_is_taken_apart(tmp_path, capsys, monkeypatch):
    if native.library_path() is None:
        pytest.skip("the native library is not built (make native)")
    import halfbyte

    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(
        sys, "argv", ["random_checkpoint.py", str(tmp_path / "config.json"), str(tmp_path / "c")]
    )
    random_checkpoint.main()
    halfbyte.convert(tmp_path / "c", tmp_path / "m.hb", recipe="q8")
    monkeypatch.setattr(overhead, "CALLS", 20)
    monkeypatch.setattr(sys, "argv", ["overhead.py", str(tmp_path / "m.hb"), "--rounds", "3", "--json"])
    overhead.main()
    row = json.loads(capsys.readouterr().out)
    assert row["records"] == len(halfbyte.load(tmp_path / "m.hb").file.program)
    assert 0 < row["kernels_us"] < row["feed_us"] and row["overhead_us"] > 0
    assert row["overhead_us"] == pytest.approx(row["feed_us"] - row["kernels_us"], abs=0.02)
    assert row["tokens_per_s"] == pytest.approx(1e6 / row["feed_us"], rel=1e-3)
