"""Requests that make no sense: one line on stderr that names the fault, status 2, nothing touched."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from small_model import REFERENCE, TEXT, fails, write_checkpoint

import halfbyte

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("requests") / "tiny")


@pytest.fixture(scope="module")
def good(folder: Path) -> Path:
    return halfbyte.convert(folder, folder.parent / "good.hb", recipe="q8")


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ("frobnicate", "frobnicate"),
        ("run", "file"),
        ("run FILE --frobnicate", "--frobnicate"),
        ("run FILE --ids 9 --backend tpu", "native, jit, reference"),
        ("run FILE --ids 9 --kv f8 --backend reference", "unknown kv mode"),
        ("run FILE --ids 9 --policy f64 --backend reference", "f32, i8g32"),
        ("run FILE --ids 9 --threads 0", "between 1 and 1024"),
        ("run FILE --ids 9 --threads 100000", "between 1 and 1024"),
        ("run FILE --ids 9 --threads two", "'two'"),
        ("run FILE --ids 9 -n -1", "-1"),
        ("run FILE --ids 9 -n 1e3", "1e3"),
        ("run FILE --ids 9 -n", "-n"),
        ("run FILE --ids 9 --temp -1 --backend reference", "temperature"),
        ("run FILE --ids 9 --temp nan --backend reference", "temperature"),
        ("run FILE --ids 9 --temp warm", "'warm'"),
        ("run FILE --ids 9 --top-p 1.5 --backend reference", "top_p"),
        ("run FILE --ids 9 --min-p -0.1 --backend reference", "min_p"),
        ("run FILE --ids 9 --top-k 99999999999 --backend reference", "top_k"),
        ("run FILE --ids 9 --seed 99999999999999999999999 --backend reference", "seed"),
        ("run FILE --ids 9 --repeat-penalty 0 --backend reference", "repetition_penalty"),
        ("run FILE --ids 160 --backend reference", "0..159"),
        ("run FILE --ids 99999999999", "--ids"),
        ("run FILE --ids 1,x", "--ids"),
        ("run FILE --ids=-1", "--ids"),
        ("run FILE --ids ,", "--ids"),
        ("run FILE --ids 9 -p hello", "not both"),
        ("check FILE --backend tpu", "native, jit, reference"),
        ("check FILE --backend reference --policy f64", "f32, i8g32"),
        ("check FILE --backend reference --threads 0", "between 1 and 1024"),
        ("eval FILE", "--text"),
        ("eval FILE --text NOWHERE --backend reference", "nowhere"),
        ("eval FILE --text FOLDER --backend reference", "directory"),
        ("eval FILE --text BINARY --backend reference", "UTF-8"),
        ("eval FILE --text SHORT --backend reference", "too short"),
        ("eval FILE --text TEXT --ctx 1 --backend reference", "at least 2"),
        ("eval FILE --text TEXT --ctx 129 --backend reference", "128"),
        ("eval FILE --text TEXT --against NOWHERE --backend reference", "nowhere"),
        ("eval FILE --text TEXT --kv q4 --backend reference", "unknown kv mode"),
        ("bench FILE -p 129 --backend reference", "-p"),
        ("bench FILE -n 0 --backend reference", "at least 1"),
        ("bench FILE -p -5 --backend reference", "at least 0"),
        ("bench FILE -d 128 -p 1 -n 1 --backend reference", "context"),
        ("bench FILE -t 0 --backend reference", "between 1 and 1024"),
        ("convert", "source"),
        ("convert SOURCE -o OUT --recipe q7", "q4"),
        ("convert SOURCE -o OUT --recipe Q4", "q4"),
        ("convert SOURCE -o OUT --recipe f32 --context 0", "between 1"),
        ("convert SOURCE -o OUT --recipe f32 --context 129", "128"),
        ("convert SOURCE -o OUT --recipe f32 --context 99999999999999", "between"),
        ("convert SOURCE -o OUT --recipe", "--recipe"),
        ("info", "file"),
        ("info FILE extra", "extra"),
        ("demo --model NOWHERE --out OUT", "nowhere"),
    ],
)
def test_requests_that_make_no_sense(argv, word, good, folder, tmp_path, capsys):
    out = tmp_path / "model.hb"
    out.write_bytes(b"precious")
    paths = {"FILE": good, "SOURCE": folder, "OUT": out, "NOWHERE": tmp_path / "nowhere", "FOLDER": folder}
    for name, data in (("TEXT", TEXT.encode()), ("BINARY", b"abc\xff\xfe"), ("SHORT", b"")):
        paths[name] = tmp_path / name.lower()
        paths[name].write_bytes(data)
    assert word in fails(capsys, *(paths.get(a, a) for a in argv.split(" ")))
    assert out.read_bytes() == b"precious" and not list(tmp_path.glob(".*"))


def test_a_prompt_that_cannot_be_fed(good, capsys, monkeypatch):
    assert "128" in fails(capsys, "run", good, "-p", TEXT, *REFERENCE)
    assert "128" in fails(capsys, "run", good, "--ids", "9," * 129, *REFERENCE)
    fails(capsys, "run", good, "-p", "a\udcffb", *REFERENCE)  # an argument that was not UTF-8
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert "UTF-8" in fails(capsys, "run", good, *REFERENCE)


def test_an_empty_prompt_needs_a_start_token(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "m", config={"bos_token_id": None})
    (source / "tokenizer_config.json").write_text("{}")
    file = halfbyte.convert(source, tmp_path / "m.hb", recipe="f32")
    assert "empty" in fails(capsys, "run", file, "-p", "", *REFERENCE)


def test_a_model_whose_output_is_not_finite(tmp_path, capsys):
    """Finite weights whose products overflow: the user is told, in one line."""
    source = write_checkpoint(
        tmp_path / "m", change=lambda w: w.update({NORM: np.full(64, 3e38, np.float32)})
    )
    file = halfbyte.convert(source, tmp_path / "m.hb", recipe="f32")
    (tmp_path / "text.txt").write_text(TEXT)
    assert "--verify" in fails(capsys, "run", file, "--ids", "9", *REFERENCE)
    assert "not finite" in fails(capsys, "eval", file, "--text", tmp_path / "text.txt", *REFERENCE)
