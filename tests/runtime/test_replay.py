"""Answer logs: written by `run --log`, checked by `replay`; what was changed is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from story import story_folder

import halfbyte
from halfbyte.runtime.cli import main


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    halfbyte.convert(story_folder(folder / "story"), folder / "story.hb", recipe="q4")
    return folder / "story.hb"


@pytest.fixture
def log(file: Path, tmp_path: Path, backend: str, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "answers.jsonl"
    common = ["run", str(file), "--log", str(path), "-n", "12", "--backend", backend]
    assert main([*common, "-p", "Once upon", "--lookup"]) == 0
    assert main([*common, "-p", "a little “robot”", "--temp", "0.9", "--top-p", "0.9", "--seed", "7"]) == 0
    assert main([*common, "--ids", "0,5,9", "--kv", "f16", "--policy", "f32", "--repeat-penalty", "1.2"]) == 0
    capsys.readouterr()
    return path


def replayed(log: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict]:
    status = main(["replay", str(log), "--json", *options])
    return status, json.loads(capsys.readouterr().out)


def test_every_answer_comes_again(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for threads in ("1", "3"):
        status, found = replayed(log, capsys, "--threads", threads)
        assert status == 0 and found["ok"] and [o["same"] for o in found["lines"]] == [True] * 3
        assert all(o["tokens"] == 12 and not o["why"] for o in found["lines"])
    assert found["chain"] == json.loads(log.read_text().splitlines()[-1])["chain"]
    assert main(["replay", str(log)]) == 0
    assert "3 of 3 answers are the same (36 tokens)" in capsys.readouterr().out


def test_a_changed_log_is_found(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = log.read_text().splitlines()
    second = json.loads(good[1])
    changed = good[1].replace(f'"answer":[{second["answer"][0]},', f'"answer":[{second["answer"][0] + 1},')
    for lines, where in (([good[0], changed, good[2]], [1]), ([good[0], good[2]], [1]), (good[1:], [0])):
        log.write_text("".join(line + "\n" for line in lines))
        status, found = replayed(log, capsys)
        assert status == 1 and [i for i, o in enumerate(found["lines"]) if not o["same"]] == where
        assert "was changed" in found["lines"][where[0]]["why"]


def test_an_answer_that_the_model_does_not_give_is_found(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from halfbyte.runtime.replay import append

    records = [json.loads(line) for line in log.read_text().splitlines()]
    log.unlink()
    records[0]["answer"][3] ^= 1  # with a chain that is right
    records[1]["state"] = "0" * 64
    records[2]["isa"] = "another"
    records[2]["state"] = "1" * 64
    for record in records:
        del record["chain"]
        append(log, record)
    status, found = replayed(log, capsys)
    assert status == 1 and [o["same"] for o in found["lines"]] == [False, False, True]
    assert [o["why"][:20] for o in found["lines"]] == [
        "the answer differs f",
        "the same tokens from",
        "the same tokens; oth",
    ]


def test_another_or_a_damaged_model_is_found(log: Path, file: Path, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other.hb"
    halfbyte.convert(story_folder(tmp_path / "o"), other, recipe="q8")
    status, found = replayed(log, capsys, "--model", str(other))
    assert status == 1 and all("another file" in o["why"] for o in found["lines"])
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    other.write_bytes(data)
    assert main(["replay", str(log), "--model", str(other)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_what_is_not_a_log_is_one_line(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("{}\n", "not json", '{"version":1,"chain":"' + "0" * 64 + '"}\n', "\n"):
        (tmp_path / "l").write_text(text)
        assert main(["replay", str(tmp_path / "l")]) in (1, 2)
        out, err = capsys.readouterr()
        assert err.count("\n") + out.count("was changed") == 1
    assert main(["replay", str(tmp_path / "none")]) == 2
    (tmp_path / "l").write_text("half a line")
    assert main(["run", str(file), "-p", "x", "-n", "1", "--log", str(tmp_path / "l")]) == 2
    assert (tmp_path / "l").read_text() == "half a line"
