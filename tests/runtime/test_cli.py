"""Every command on a tiny model: what it prints, its JSON keys, its exit status."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_model import REFERENCE, TEXT, fails, quiet, write_checkpoint

import halfbyte
from halfbyte.formats.container import File
from halfbyte.runtime import cli
from halfbyte.runtime.cli.run import prompt_ids
from halfbyte.runtime.lockstep import Outcome, lockstep


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "tiny-1.5b")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return halfbyte.convert(folder, folder.parent / "tiny.hb", recipe="q4")


@pytest.fixture(scope="module")
def exact(folder: Path) -> Path:
    return halfbyte.convert(folder, folder.parent / "exact.hb", recipe="f32")


@pytest.fixture(scope="module")
def chat_file(folder: Path) -> Path:
    source = write_checkpoint(folder.parent / "chatty", template=True)
    return halfbyte.convert(source, folder.parent / "chatty.hb", recipe="f32")


@pytest.fixture(scope="module")
def bare_file(folder: Path) -> Path:
    source = write_checkpoint(folder.parent / "bare", tokenizer=False)
    return halfbyte.convert(source, folder.parent / "bare.hb", recipe="f32")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


# ---- convert ------------------------------------------------------------------------------------


def test_convert_names_the_file_after_the_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = quiet(capsys, "convert", folder, "--recipe", "q8")
    assert re.fullmatch(
        r"tiny-1\.5b\.hb: [\d.]+ kB, (\d+\.\d\d) bits per weight, \d+\.\d s\nKL divergence [\d.]+ .*\n", out
    )  # two lines, and no progress bar in a pipe
    assert [p.name for p in tmp_path.iterdir()] == ["tiny-1.5b.hb"]
    assert File("tiny-1.5b.hb").metadata["general.name"] == "tiny-1.5b"


def test_convert_json(folder, tmp_path, capsys):
    out = json.loads(quiet(capsys, "convert", folder, "-o", tmp_path / "m.hb", "--json"))
    assert out.keys() == {
        "file", "recipe", "method", "file_bytes", "bits_per_weight", "seconds", "digest", "tokenizer",
        "plan",
    }  # fmt: skip
    assert out["recipe"] == "q4" and out["file_bytes"] == (tmp_path / "m.hb").stat().st_size
    assert out["digest"] == File(tmp_path / "m.hb").digest.hex()


def test_convert_takes_context_and_tokenizer(folder, bare_file, tmp_path, capsys):
    bare = folder.parent / "bare"
    options = ("--recipe", "f16", "--context", 32, "--tokenizer", folder / "tokenizer.json")
    quiet(capsys, "convert", bare, "-o", tmp_path / "m.hb", *options)
    file = File(tmp_path / "m.hb")
    assert file.metadata["model.context_length"] == 32 and "TOKN" in file.sections


# ---- run ----------------------------------------------------------------------------------------


def test_run_streams_what_generate_gives(file, capsys):
    expected = "".join(halfbyte.load(file, "reference").generate("once upon", max_tokens=12))
    status = cli.main(["run", str(file), "-p", "once upon", "-n", "12", *REFERENCE])
    out, err = capsys.readouterr()
    assert status == 0 and out.rstrip("\n") == expected.rstrip("\n") and expected
    assert re.fullmatch(r"prompt \d+ tokens at [\d.]+ tokens/s, answer \d+ tokens at [\d.]+ tokens/s\n", err)


def test_run_reads_stdin(file, capsys, monkeypatch):
    given = quiet(capsys, "run", file, "-p", "a big tree", "-n", 8, *REFERENCE)
    for argv in ((), ("-p", "-")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a big tree\n")))
        assert quiet(capsys, "run", file, *argv, "-n", 8, *REFERENCE) == given


def test_run_sampling_follows_the_seed(file, capsys):
    options = ("--temp", 5, "--top-k", 50, "--top-p", 0.99, "--min-p", 0.001, "--repeat-penalty", 1.1)
    options += ("--presence-penalty", 0.1, "--frequency-penalty", 0.1, "--policy", "f32", "--kv", "f32")

    def answer(seed: int) -> str:
        return quiet(capsys, "run", file, "-p", "the", "-n", 16, *options, "--seed", seed, *REFERENCE)

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_run_stops_at_a_stop_text(file, capsys):
    whole = quiet(capsys, "run", file, "-p", "the", "-n", 16, *REFERENCE).rstrip("\n")
    stop = whole[5:7]
    cut = quiet(capsys, "run", file, "-p", "the", "-n", 16, "--stop", "\x00", "--stop", stop, *REFERENCE)
    assert cut.rstrip("\n") == whole[: whole.index(stop)]


def test_run_with_ids(file, bare_file, capsys):
    expected = "".join(halfbyte.load(file, "reference").generate([1, 44, 50], max_tokens=9))
    assert quiet(capsys, "run", file, "--ids", "1, 44,50", "-n", 9, *REFERENCE) == f"{expected}\n" != "\n"
    ids = quiet(capsys, "run", bare_file, "--ids", "1 20 30", "-n", 4, "--verify", *REFERENCE).split()
    assert len(ids) == 4 and all(0 <= int(i) < 160 for i in ids)
    assert "--tokenizer" in fails(capsys, "run", bare_file, "-p", "hello", *REFERENCE)


def test_run_says_that_the_context_is_full(bare_file, capsys):
    status = cli.main(["run", str(bare_file), "--ids", "9," * 126 + "9", "-n", "64", *REFERENCE])
    out, err = capsys.readouterr()
    assert status == 0 and len(out.split()) == 2 and err.endswith("(the context is full)\n")


def test_run_renders_the_chat_template_once(chat_file):
    model = halfbyte.load(chat_file, "reference")
    tokenizer = model.tokenizer
    turn, end = tokenizer.id_of("<|turn|>"), tokenizer.id_of("<|end|>")
    ids = prompt_ids(model, " the dog ", raw=False)
    assert ids == tokenizer.encode("<s><|turn|>user the dog<|end|><|turn|>a ")
    assert ids[0] == 1 and ids.count(1) == 1  # BOS once, though the template writes it and add_bos is set
    raw = prompt_ids(model, "<|turn|>the dog", raw=True)
    assert raw == [1, turn, *tokenizer.encode("the dog", bos=False)]
    assert ids.count(turn) == 2 and ids.count(end) == 1


@pytest.mark.parametrize("prompt", ["a<|end|><|turn|>b", "<s>", " <|end|> "])
def test_run_takes_control_tokens_in_a_prompt_as_text(chat_file, file, prompt):
    model = halfbyte.load(chat_file, "reference")
    tokenizer = model.tokenizer
    ids = prompt_ids(model, prompt, raw=False)
    assert ids.count(tokenizer.id_of("<|turn|>")) == 2 and ids.count(tokenizer.id_of("<|end|>")) == 1
    assert ids.count(1) == 1
    shown = tokenizer.decode(ids, skip_special=False)
    assert shown == f"<s><|turn|>user {prompt.strip()}<|end|><|turn|>a "
    plain = halfbyte.load(file, "reference")
    assert not set(prompt_ids(plain, prompt, raw=False)[1:]) & {1, 2, 3, 4}
    assert set(prompt_ids(plain, prompt, raw=True)) & {1, 3, 4}


# ---- info, explain, check -----------------------------------------------------------------------


def test_info(file, capsys):
    found = json.loads(quiet(capsys, "info", file, "--json"))
    assert found["file_bytes"] == file.stat().st_size and found["format_version"] == "1.2"
    assert found["tokenizer"] is True and found["chat_template"] is False
    assert [s["kind"] for s in found["sections"]][-3:] == ["DATA", "PROF", "VOCB"]
    assert found["proof"].startswith("KL divergence 0.")
    parts = [found["encodings"][e] for e in ("q4", "q5")]  # the second of the matrix that makes the logits
    weights = sum(8 * p["bytes"] / p["bits_per_weight"] for p in parts)
    assert 8 * sum(p["bytes"] for p in parts) / weights == pytest.approx(found["bits_per_weight"])
    assert found["metadata"]["model.vocab_size"] == 160
    assert found["kv_values_per_token"] == 3 * 2 * 2 * 16
    text = quiet(capsys, "info", file)
    for word in (found["digest"], "q4", "tokenizer", "DATA", "model.context_length"):
        assert word in text


def test_info_escapes_what_could_steer_a_terminal(folder, tmp_path, capsys):
    config = {"_name_or_path": "evil\x1b[2J\nname"}
    halfbyte.convert(write_checkpoint(tmp_path / "m", config=config), tmp_path / "m.hb", recipe="f32")
    text = quiet(capsys, "info", tmp_path / "m.hb")
    assert "\x1b" not in text and "evil\\x1b[2J\\nname" in text


def test_explain(file, capsys):
    records = json.loads(quiet(capsys, "explain", file, "--json"))["records"]
    lines = quiet(capsys, "explain", file).splitlines()
    assert lines[0].split() == ["addr", "layer", "op", "out", "in", "weights", "attrs"]
    assert len(lines) == len(records) + 1 == len(File(file).program) + 1
    assert [line.split()[:3] for line in lines[1:3]] == [["0", "-", "embed"], ["1", "0", "rmsnorm"]]
    assert records[0]["op"] == "embed" and records[1]["attrs"]["dim"] == 64


def test_check(file, capsys):
    found = json.loads(quiet(capsys, "check", file, "--json", *REFERENCE))
    assert found["ok"] is True and found["backend"] == "reference"
    assert {o["policy"] for o in found["outcomes"]} == {"f32", "i8g32", "bf16", "f8"}
    assert {o["op"] for o in found["outcomes"]} >= {"embed", "linear", "attend", "rope", "kv_put"}
    text = quiet(capsys, "check", file, "--policy", "f32", *REFERENCE)
    assert "all digests match" in text and "i8g32" not in text and "WRONG" not in text


def test_check_has_status_1_when_an_op_is_wrong(file, capsys, monkeypatch):
    from halfbyte.runtime.backends import jit, reference

    class Wrong(reference.Reference):
        name = "jit"

        def glu(self, step, x, function):
            return super().glu(step, x, function) * np.float32(1.001)

    monkeypatch.setattr(jit, "Jit", Wrong)
    assert cli.main(["check", str(file), "--backend", "jit", "--policy", "f32"]) == 1
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.endswith("WRONG")] == ["glu"]


def test_lockstep_does_not_forget_a_nan(file, monkeypatch):
    from halfbyte.runtime.backends import jit, reference

    class Once(reference.Reference):
        spoiled = False

        def glu(self, step, x, function):
            y = super().glu(step, x, function)
            if not self.spoiled:
                self.spoiled, y = True, np.full_like(y, np.nan)
            return y

    monkeypatch.setattr(jit, "Jit", Once)
    outcomes: dict[str, Outcome] = {o.op: o for o in lockstep(File(file), "jit", "f32")}
    assert not outcomes["glu"].ok and np.isnan(outcomes["glu"].worst) and outcomes["rope"].ok


# ---- eval, bench, demo, doctor ------------------------------------------------------------------


def test_eval(file, exact, text, capsys):
    options = ("--text", text, "--ctx", 64, "--json", *REFERENCE)
    found = json.loads(quiet(capsys, "eval", file, "--against", exact, *options))
    keys = {"tokens", "nll_per_token", "ppl", "kld_mean", "kld_p99", "top1_agreement", "bits_per_weight"}
    assert keys | {"file_bytes"} <= found.keys()
    assert found["ppl"] == pytest.approx(np.exp(found["nll_per_token"])) and found["tokens"] > 100
    assert 0 < found["kld_mean"] < found["kld_p99"] and 0 < found["top1_agreement"] <= 1
    assert found["file_bytes"] == file.stat().st_size
    alone = json.loads(quiet(capsys, "eval", file, *options))
    assert alone["nll_per_token"] == found["nll_per_token"] and alone["kld_mean"] is None
    same = json.loads(quiet(capsys, "eval", exact, "--against", exact, *options))
    assert abs(same["kld_mean"]) < 1e-12 and same["top1_agreement"] == 1
    words = quiet(capsys, "eval", file, "--text", text, "--against", exact, *REFERENCE)
    assert "perplexity" in words and "KL divergence" in words  # and --ctx fell to the model's 128


def test_bench(file, capsys):
    options = ("-p", 8, "-n", 2, "-d", 4, "-t", 1, "--kv", "f32", *REFERENCE)
    found = json.loads(quiet(capsys, "bench", file, *options, "--json"))
    keys = {"prefill_tokens_per_s", "decode_tokens_per_s", "weight_bytes_per_token", "kv_bits_per_value"}
    keys |= {"read_gb_per_s", "peak_rss_mb", "load_ms", "machine", "commit"}
    assert keys <= found.keys()
    assert found["kv_bits_per_value"] == 32 and found["threads"] == 1 and found["depth"] == 4
    assert all(found[k] > 0 for k in keys - {"machine", "commit"})
    assert "prefill" in quiet(capsys, "bench", file, *options)
    nothing = json.loads(quiet(capsys, "bench", file, "-p", 0, "-n", 1, "--json", *REFERENCE))
    assert nothing["prefill_tokens_per_s"] is None


@pytest.mark.parametrize("source", ("shipped", "shipped, copied", "converted"))
def test_demo_tells_a_story_and_names_commands_that_work(source, folder, tmp_path, monkeypatch, capsys):
    """The shipped file as it is, a copy of it, and another checkpoint, which is converted into the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    cached, copied = tmp_path / "a cache" / "halfbyte" / "demo.hb", tmp_path / "a copy.hb"
    options = {"shipped": (), "shipped, copied": ("--out", copied), "converted": ("--model", folder)}[source]
    out = quiet(capsys, "demo", *options)
    assert cached.is_file() == ("converted in" in out) == (source == "converted")
    assert copied.is_file() == (source == "shipped, copied")
    assert "every byte verified" in out and "Once upon a time" in out
    import shlex

    commands = [shlex.split(line) for line in out.splitlines() if line.startswith("  halfbyte ")]
    assert len(commands) == 3
    for _, *argv in commands:
        assert quiet(capsys, *argv)


def test_demo_without_its_model_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("halfbyte.runtime.cli.demo.built_in_model", lambda: tmp_path / "demo_model")
    assert "install halfbyte again" in fails(capsys, "demo", "--out", tmp_path / "m.hb")


def test_demo_that_cannot_be_copied_says_so(tmp_path, capsys):
    assert "cannot write" in fails(capsys, "demo", "--out", tmp_path / "nowhere" / "m.hb")
    assert not list(tmp_path.iterdir())


def test_demo_that_was_damaged_is_not_run(monkeypatch, tmp_path, capsys):
    from halfbyte.runtime.cli import demo

    damaged = bytearray((demo.built_in_model() / demo.FILE).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / demo.FILE).write_bytes(damaged)
    monkeypatch.setattr(demo, "built_in_model", lambda: tmp_path)
    fails(capsys, "demo", *REFERENCE)


def test_doctor(monkeypatch, capsys):
    from halfbyte.runtime import backends

    monkeypatch.setenv("HALFBYTE_ISA", "scalar")
    monkeypatch.setattr(backends, "BACKENDS", {"absent": "Absent", "reference": "Reference"})
    found = json.loads(quiet(capsys, "doctor", "--json"))
    assert found.keys() == {"halfbyte", "machine", "packages", "native_library", "backends", "environment"}
    assert found["environment"]["HALFBYTE_ISA"] == "scalar"
    assert found["packages"]["numpy"] == np.__version__
    absent, reference = found["backends"]
    assert absent["available"] is False and "absent" in absent["why"]
    assert reference["ok"] is True and reference["details"]["backend"] == "reference"
    text = quiet(capsys, "doctor")
    assert "works" in text and "not available" in text and "processor" in text


# ---- the command itself -------------------------------------------------------------------------


def test_version_help_and_nothing(capsys):
    assert quiet(capsys, "--version") == f"halfbyte {halfbyte.__version__}\n"
    text = quiet(capsys, "--help")
    assert all(re.search(rf"^    {name}\s", text, re.MULTILINE) for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        assert quiet(capsys, name, "--help").startswith(f"usage: halfbyte {name} ")
    assert cli.main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from halfbyte.runtime.cli import main; main(['--help']);"
        "print([m for m in ('numpy', 'numba', 'tokenizers', 'rich', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_bug_shows_its_traceback_and_status_70(file, capsys, monkeypatch):
    monkeypatch.setattr("halfbyte.runtime.cli.info.facts", lambda file: 1 // 0)
    assert cli.main(["info", str(file)]) == 70
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err and err.splitlines()[-1].startswith("halfbyte: this is a bug")


def test_errors_are_one_line_whatever_they_say(file, capsys, monkeypatch):
    def broken(file: File) -> None:
        raise halfbyte.HalfbyteError("first\n  second\r\n\x1b[31mthird")

    monkeypatch.setattr("halfbyte.runtime.cli.info.facts", broken)
    assert fails(capsys, "info", file) == "halfbyte: error: first second \\x1b[31mthird\n"


def test_signal_handlers_are_put_back(file, capsys):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    quiet(capsys, "info", file)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.skipif(os.name != "posix", reason="pipes and /dev/full of POSIX")
def test_a_closed_pipe_is_quiet_and_a_full_disk_is_not(file):
    command = [sys.executable, "-c", "import sys; from halfbyte.runtime.cli import main; sys.exit(main())"]
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.run(
        [*command, "explain", str(file)], stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert (closed.returncode, closed.stderr) == (128 + signal.SIGPIPE, b"")
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb") as full:
        failed = subprocess.run(
            [*command, "explain", str(file)], stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert failed.returncode == 2
    assert failed.stderr.startswith(b"halfbyte: error: ") and failed.stderr.count(b"\n") == 1
