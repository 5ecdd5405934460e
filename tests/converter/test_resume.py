"""A conversion that was killed, by the same command continued: the bytes are those of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_model import TEXT, fails, write_checkpoint

import halfbyte
from halfbyte.converter import calibrate, sequential
from halfbyte.converter.blas import Products
from halfbyte.formats.container import File
from halfbyte.runtime.cli import main

posix = pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")

# A child that dies by SIGKILL, which nothing can catch, right after the journal has so many lines; with a share given,
# in the middle of the write after that, of which so much is on the disk.
KILLED = """
import os, signal, sys
from halfbyte.converter import unfinished
from halfbyte.runtime.cli import main

lines, share = int(sys.argv.pop(1)), float(sys.argv.pop(1))
append, pwrite = unfinished.Unfinished._append, os.pwrite
count = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counted(self, entry):
    global count
    append(self, entry)
    count += 1
    if count == lines and not share:
        die()

def torn(fd, data, offset):
    if count >= lines and share:
        pwrite(fd, memoryview(data)[: int(len(data) * share)], offset)
        die()
    return pwrite(fd, data, offset)

unfinished.Unfinished._append, os.pwrite = counted, torn
sys.exit(main(sys.argv[1:]))
"""
RECIPES = {
    "rtn": ("--method", "rtn"),
    "gptq": ("--calibrate", "{text}"),
    "own text": (),
    "mixed": ("--plan", "{plan}", "--calibrate", "{text}"),
    "awq": ("--method", "awq", "--calibrate", "{text}"),
    "autoround": ("--method", "autoround", "--calibrate", "{text}"),
    "weighted": ("--method", "rtn", "--calibrate", "{text}", "--rotate"),
    "budget": ("--target-bits", "4.5", "--calibrate", "{text}"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint `m`, a text and a plan."""
    folder = tmp_path_factory.mktemp("resume")
    write_checkpoint(
        folder / "m", config={"tie_word_embeddings": True}, change=lambda w: w.pop("lm_head.weight", None)
    )
    (folder / "text.txt").write_text(TEXT)
    (folder / "plan.toml").write_text(
        '[encodings]\n"*" = "q4"\n"*down_proj" = "q8"\n"*.0.*o_proj" = "f16"\n"embed" = "q6"\n'
    )
    return folder


def command(place: Path, out: Path, recipe: str) -> list[str]:
    options = [o.format(text=place / "text.txt", plan=place / "plan.toml") for o in RECIPES[recipe]]
    return ["convert", str(place / "m"), "-o", str(out), *options]


def killed(argv: list[str], lines: int, share: float = 0) -> bool:
    """Run the command in a child and kill it there; False if it ended before."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(lines), str(share), *argv],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def journal(out: Path) -> list[dict]:
    return [
        json.loads(line) for line in (out.with_name(f".{out.name}.part") / "journal").read_text().splitlines()
    ]


@posix
@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_and_continued(
    recipe: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Killed at points all over the conversion, of most recipes at two; once more while it is being continued."""
    whole = tmp_path / "whole.hb"
    assert main(command(place, whole, recipe)) == 0
    matrices = sum(len(t.shape) == 2 for t in File(whole).tensors)
    out = tmp_path / "out.hb"
    middle = 2 + matrices // 2
    for lines in (1, 2, 3, 5, middle, 1 + matrices) if recipe in ("gptq", "budget") else (5, middle):
        assert killed(command(place, out, recipe), lines)
        assert not out.exists() and len(journal(out)) == lines
        if lines == 5:
            assert killed(command(place, out, recipe), 2)  # lines of its own
            assert len(journal(out)) == 7
        capsys.readouterr()
        assert main(command(place, out, recipe)) == 0
        done = max(0, lines + 2 * (lines == 5) - 2 - (recipe == "budget"))
        said = capsys.readouterr().err
        assert said == (f"continuing: {done} of {matrices} matrices are done\n" if done else "")
        assert out.read_bytes() == whole.read_bytes()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out.hb", "whole.hb"]
        out.unlink()


@posix
@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
@pytest.mark.parametrize("share", [1e-9, 0.5, 1.0])
def test_killed_in_the_middle_of_a_tensor(recipe: str, share: float, place: Path, tmp_path: Path) -> None:
    """A tensor of which only a part was written is written anew."""
    whole, out = tmp_path / "whole.hb", tmp_path / "out.hb"
    assert main(command(place, whole, recipe)) == 0
    assert killed(command(place, out, recipe), 6, share)
    assert main(command(place, out, recipe)) == 0
    assert out.read_bytes() == whole.read_bytes()


@pytest.fixture
def stopped(place: Path, tmp_path: Path) -> Path:
    """An output whose conversion by GPTQ was killed half-way."""
    if os.name != "posix":
        pytest.skip("signals of POSIX")
    out = tmp_path / "out.hb"
    assert killed(command(place, out, "gptq"), 8)
    return out


def test_what_is_done_is_not_computed_again(
    place: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither codes nor Hessians: of the matrices left, each is quantised once on statistics of its own."""
    done = [e["name"] for e in journal(stopped) if "tensor" in e]
    coded, grams = [], []
    code, finish = sequential._Job.code, calibrate.Collector.finish

    def counting(self, i, *args, **kw):
        coded.append(self.wanted[i].name)
        return code(self, i, *args, **kw)

    monkeypatch.setattr(sequential._Job, "code", counting)
    monkeypatch.setattr(calibrate.Collector, "finish", lambda self: grams.append(1) or finish(self))
    assert main(command(place, stopped, "gptq")) == 0
    names = [t.name for t in File(stopped).tensors if len(t.shape) == 2]
    assert len(done) == 6 and sorted(coded + done) == sorted(names)
    assert len(grams) == len(coded)


@pytest.mark.parametrize(
    "damage", ["a tensor", "the last line", "the journal", "no journal", "no file", "a short file"]
)
def test_damage_costs_time_only(damage: str, place: Path, stopped: Path, tmp_path: Path) -> None:
    part = stopped.with_name(f".{stopped.name}.part")
    file, text = part / "model.hb", part / "journal"
    if damage == "a tensor":
        with file.open("r+b") as f:
            f.seek(file.stat().st_size // 8)
            f.write(bytes(100_000))
    elif damage == "the last line":
        text.write_bytes(text.read_bytes()[:-9])
    elif damage == "the journal":
        text.write_bytes(b"\xff\x00[[[\n" + text.read_bytes())
    elif damage == "a short file":
        os.truncate(file, 5000)
    else:
        (file if damage == "no file" else text).unlink()
    assert main(command(place, stopped, "gptq")) == 0
    whole = tmp_path / "whole.hb"
    assert main(command(place, whole, "gptq")) == 0
    assert stopped.read_bytes() == whole.read_bytes()


def test_another_conversion_starts_again(
    place: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Other options, another text, a checkpoint that was touched."""
    again = "starting again: the unfinished file has another source, options or version\n"
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    argv = [*command(place, stopped, "rtn"), "--calibrate", str(text)]
    assert killed(argv, 4)
    capsys.readouterr()
    text.write_text(TEXT[::-1])
    assert killed(argv, 4)
    assert main([*argv, "--recipe", "q5"]) == 0
    assert capsys.readouterr().err == again
    assert killed(argv, 4)
    model = place / "m" / "model.safetensors"
    os.utime(model, ns=(model.stat().st_atime_ns, model.stat().st_mtime_ns + 1))
    assert main(argv) == 0
    assert capsys.readouterr().err == again
    halfbyte.convert(place / "m", tmp_path / "w.hb", method="rtn", calibrate=text)
    assert stopped.read_bytes() == (tmp_path / "w.hb").read_bytes()


@posix
def test_one_conversion_to_an_output_at_a_time(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out.hb"
    waits = "import sys, time; from halfbyte.converter.plan import Plan; Plan.prepare = lambda *a: time.sleep(60);"
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            waits + "from halfbyte.runtime.cli import main; main()",
            *command(place, out, "rtn"),
        ]
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / ".out.hb.part" / "journal").exists():
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        assert "being written by another conversion" in fails(capsys, *command(place, out, "rtn"))
    finally:
        child.kill()
        child.wait()
    assert main(command(place, out, "rtn")) == 0  # the lock died with its holder


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_any_number_of_threads(
    recipe: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for threads in (1, 2, 5):
        with monkeypatch.context() as patch:
            patch.setattr("halfbyte.converter.blas._cpus", lambda n=threads: n)
            found.append(
                halfbyte.convert(place / "m", tmp_path / f"{threads}.hb", method=recipe).read_bytes()
            )
            with Products() as products:
                assert products.threads == threads
    assert found[0] == found[1] == found[2]
