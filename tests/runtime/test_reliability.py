"""Whatever a user, a file or a machine does wrong: one line on stderr, status 2, and nothing destroyed."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_model import (
    REFERENCE,
    TEXT,
    checked_error,
    fails,
    quiet,
    tokenizer_json,
    write_checkpoint,
)

import halfbyte
from halfbyte.runtime import cli

EXACT = ("--recipe", "f32")
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
# SIGINT may arrive ignored, when the tests run in the background of a shell.
COMMAND = [
    sys.executable,
    "-c",
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from halfbyte.runtime.cli import main; sys.exit(main())",
]
posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("reliability") / "tiny")


@pytest.fixture(scope="module")
def good(folder: Path) -> Path:
    return halfbyte.convert(folder, folder.parent / "good.hb", recipe="q8")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output that exists already and must survive every failure, alone in its folder."""
    place = tmp_path / "out"
    place.mkdir()
    (place / "model.hb").write_bytes(b"precious")
    return place / "model.hb"


def convert_fails(capsys, source: Path, out: Path, *options: object) -> str:
    """`convert` must fail in one line and leave the old output, and nothing else, behind."""
    options = options or EXACT
    error = fails(capsys, "convert", source, "-o", out, *options)
    assert_untouched(out)
    return error


def assert_untouched(out: Path) -> None:
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    assert out.read_bytes() == b"precious"


def assert_can_go_on(out: Path) -> None:
    """The old output is as it was, and besides there is at most what a conversion is continued from."""
    assert {p.name for p in out.parent.iterdir()} <= {out.name, f".{out.name}.part"}
    assert out.read_bytes() == b"precious"


# ---- damaged .hb files --------------------------------------------------------------------------


def hb_commands(file: Path, text: Path) -> list[list[object]]:
    return [
        ["run", file, "--ids", "9", "-n", 1, *REFERENCE],
        ["info", file],
        ["explain", file],
        ["check", file, *REFERENCE],
        ["eval", file, "--text", text, *REFERENCE],
        ["bench", file, "-p", 1, "-n", 1, *REFERENCE],
    ]


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "empty", "text", "gguf", "half", "one byte short", "long"]
)
def test_every_command_refuses_what_is_no_file_of_ours(kind, good, tmp_path, capsys):
    path, data = tmp_path / "broken.hb", good.read_bytes()
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        content = {
            "empty": b"",
            "text": b"not a model\n" * 20,
            "gguf": b"GGUF" + bytes(100),
            "half": data[: len(data) // 2],
            "one byte short": data[:-1],
            "long": data + b"\0",
        }
        path.write_bytes(content[kind])
    for argv in hb_commands(path, text):
        assert str(path) in fails(capsys, *argv)


def test_a_newer_version_says_to_upgrade(good, tmp_path, capsys):
    data = bytearray(good.read_bytes())
    struct.pack_into("<H", data, 8, 2)
    (tmp_path / "new.hb").write_bytes(data)
    assert "upgrade halfbyte" in fails(capsys, "info", tmp_path / "new.hb")


def golden_errors() -> list[Path]:
    """Files made by hand: sizes that overflow, unknown ops, cycles, and every other law broken."""
    return sorted((Path(__file__).resolve().parent.parent / "formats" / "golden_errors").glob("*.hb"))


def test_every_hostile_file_is_refused(capsys):
    files = golden_errors()
    assert len(files) > 40
    for file in files:
        fails(capsys, "run", file, "--ids", "0", "--verify", *REFERENCE)


def test_any_flipped_bit_is_found_with_verify_and_never_a_bug_without(good, tmp_path, capsys):
    data = bytearray(good.read_bytes())
    path = tmp_path / "flipped.hb"
    rng = np.random.default_rng(0)
    sections = halfbyte.load(good, "reference").file.sections
    places = set(rng.integers(0, len(data), 150).tolist())
    for offset, length, _ in sections.values():  # the small ones are not missed
        places |= {offset, offset + length - 1, *(offset + rng.integers(0, length, 6)).tolist()}
    for i, place in enumerate(sorted(places)):
        bit = 1 << (i % 8)
        data[place] ^= bit
        path.write_bytes(data)
        data[place] ^= bit
        fails(capsys, "run", path, "--ids", "9", "-n", 1, "--verify", *REFERENCE)
        if i % 4 == 0:
            status = cli.main(["run", str(path), "--ids", "9", "-n", "1", *REFERENCE])
            captured = capsys.readouterr()
            assert status in (0, 2) and "Traceback" not in captured.err, (place, captured.err)


def test_a_truncation_at_any_length_is_refused(good, tmp_path, capsys):
    data, path = good.read_bytes(), tmp_path / "cut.hb"
    for length in [0, 1, 7, 8, 63, 64, 65, 127, *np.linspace(128, len(data) - 1, 60).astype(int)]:
        path.write_bytes(data[:length])
        fails(capsys, "info", path)


# ---- checkpoints --------------------------------------------------------------------------------


def spoil(name: str, value: float):
    def change(weights: dict[str, np.ndarray]) -> None:
        weights[name].reshape(-1)[-1] = value

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("recipe", ["q4", "q8", "f32", "f16"])
def test_weights_that_are_not_finite(value, recipe, tmp_path, out, capsys):
    for name in (EMBED, Q_PROJ, NORM):
        source = write_checkpoint(tmp_path / name, change=spoil(name, value))
        error = convert_fails(capsys, source, out, "--recipe", recipe)
        assert "not finite" in error and name.removeprefix("model.").removesuffix(".weight") in error


def test_a_weight_that_f16_cannot_hold(tmp_path, out, capsys):
    source = write_checkpoint(tmp_path / "big", change=spoil(Q_PROJ, 1e6))
    assert "bf16" in convert_fails(capsys, source, out, "--recipe", "f16")


def test_a_missing_an_extra_and_a_misshapen_tensor(tmp_path, out, capsys):
    def extra(weights):
        weights["model.layers.0.mystery.weight"] = np.zeros((4, 4), np.float32)

    def reshape(weights):
        weights[Q_PROJ] = weights[Q_PROJ][:, :-1].copy()

    def flatten(weights):
        weights[NORM] = weights[NORM].reshape(8, 8)

    changes = {
        Q_PROJ: lambda w: w.pop(Q_PROJ),
        NORM: lambda w: w.pop(NORM),
        EMBED: lambda w: w.pop(EMBED),
        "mystery": extra,
        "[64, 63]": reshape,
        "[8, 8]": flatten,
    }
    for i, (word, change) in enumerate(changes.items()):
        source = write_checkpoint(tmp_path / str(i), change=change)
        assert word in convert_fails(capsys, source, out)


def test_an_unsupported_model_type_lists_the_supported_ones(tmp_path, out, capsys):
    source = write_checkpoint(tmp_path / "m", config={"model_type": "mamba"})
    error = convert_fails(capsys, source, out)
    assert all(word in error for word in ("mamba", "llama", "qwen3", "gemma3", "phi3"))


JUNK = ["ABSENT", None, [], {}, "x", True, 0, -1, 7, 2**40, 1e400, [None], {"rope_type": "x"}]
JUNK += [{"rope_type": "yarn", "factor": 0}, {"rope_type": "yarn", "factor": 2, "beta_fast": -1}]
KEYS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
    *("rope_scaling", "rope_parameters", "head_dim", "hidden_act", "tie_word_embeddings", "attention_bias"),
    *("bos_token_id", "eos_token_id", "text_config", "quantization_config"),
)


@pytest.mark.parametrize("key", KEYS)
def test_a_config_with_junk_is_never_a_bug(key, folder, tmp_path, out, capsys):
    source = tmp_path / "m"
    source.mkdir()
    (source / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for value in JUNK:
        changed = {k: v for k, v in {**config, key: value}.items() if v != "ABSENT"}
        (source / "config.json").write_text(json.dumps(changed))
        status = cli.main(["convert", str(source), "-o", str(out), *EXACT])
        captured = capsys.readouterr()
        if status:
            checked_error(status, captured.out, captured.err)
            assert_untouched(out)
        else:  # a value that means something: what was written can be read
            quiet(capsys, "info", out)
            out.write_bytes(b"precious")


def test_a_program_that_could_not_be_read_back_is_not_written(tmp_path, out, capsys):
    source = write_checkpoint(tmp_path / "m", config={"rms_norm_eps": -1.0})
    assert "eps is negative" in convert_fails(capsys, source, out)


def test_names_and_templates_that_are_not_unicode(tmp_path, out, capsys):
    named = write_checkpoint(tmp_path / os.fsdecode(b"caf\xe9"))
    quiet(capsys, "convert", named, "-o", tmp_path / "m.hb", *EXACT)
    quiet(capsys, "info", tmp_path / "m.hb")
    (named / "chat_template.json").write_text(json.dumps({"chat_template": "a\ud800"}))
    assert "not valid Unicode" in convert_fails(capsys, named, out)


def test_folders_that_lack_something(folder, tmp_path, out, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in convert_fails(capsys, empty, out)
    (empty / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert "safetensors" in convert_fails(capsys, empty, out)
    for text in ("", "{", "[1]", "\ufeff{}", '{"a": 1'):
        (empty / "config.json").write_text(text)
        convert_fails(capsys, empty, out)
    (empty / "config.json").write_bytes(b"\xff\xfe\x00")
    convert_fails(capsys, empty, out)
    assert "no-such" in convert_fails(capsys, tmp_path / "no-such", out)


@pytest.mark.parametrize(
    "name", ["weights.gguf", "weights.bin", "weights.pt", "weights.safetensors", "weights.hb"]
)
def test_sources_that_are_no_checkpoints(name, tmp_path, out, capsys):
    source = tmp_path / name
    for data in (b"", b"GGUF", b"GGUF" + b"\xff" * 40, bytes(64), b"PK\x03\x04" + bytes(60), b"\xff" * 300):
        source.write_bytes(data)
        assert name in convert_fails(capsys, source, out)


def test_safetensors_that_are_cut_or_lie_about_their_sizes(folder, tmp_path, out, capsys):
    source = tmp_path / "m"
    source.mkdir()
    (source / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights, data = source / "model.safetensors", (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    cuts = [data[:n] for n in (0, 4, 8, 100, 8 + length, len(data) // 2, len(data) - 1)]
    lies = [struct.pack("<Q", n) + data[8:] for n in (0, 2, 1 << 40, (1 << 64) - 1, length - 1, length + 1)]
    for shape in ([1 << 62, 1 << 62], [1 << 31, 1 << 31], [-1, 64], [0, 64], ["64"], 64, [2.0, 3]):
        header = json.loads(data[8 : 8 + length])
        header[Q_PROJ]["shape"] = shape
        text = json.dumps(header).encode()
        lies.append(struct.pack("<Q", len(text)) + text + data[8 + length :])
    for content in cuts + lies:
        weights.write_bytes(content)
        convert_fails(capsys, source, out)


def test_tokenizers_that_do_not_belong_or_are_damaged(folder, tmp_path, out, capsys):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(tokenizer_json(extra=80))
    error = convert_fails(capsys, folder, out, *EXACT, "--tokenizer", tokenizer)
    assert "does not belong to this model" in error and "160 tokens" in error
    for data in (b"", b"{", b"[]", b"{}", b'{"model": {}}', b'{"model": {"type": "BPE"}}', b"\xff" * 50):
        tokenizer.write_bytes(data)
        convert_fails(capsys, folder, out, *EXACT, "--tokenizer", tokenizer)
    tokenizer.unlink()
    assert "tokenizer.json" in convert_fails(capsys, folder, out, *EXACT, "--tokenizer", tokenizer)


# ---- outputs ------------------------------------------------------------------------------------


def test_outputs_that_cannot_be(folder, out, tmp_path, capsys):
    assert "create it first" in fails(capsys, "convert", folder, "-o", tmp_path / "none" / "m.hb")
    assert "is a folder" in fails(capsys, "convert", folder, "-o", tmp_path)
    assert "create it first" in fails(capsys, "convert", folder, "-o", out / "m.hb")
    fails(capsys, "convert", folder, "-o", out.parent / ("n" * 300))
    fails(capsys, "convert", folder, "-o", "")
    if Path("/dev/null").exists():
        assert "regular file" in fails(capsys, "convert", folder, "-o", "/dev/null")
        assert not Path("/dev/null").is_file()
    assert_untouched(out)


def test_the_source_is_never_overwritten(folder, tmp_path, capsys):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for name in before:
        assert "overwritten" in fails(capsys, "convert", folder, "-o", folder / name)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(tokenizer_json())
    fails(capsys, "convert", folder, "-o", tokenizer, "--tokenizer", tokenizer)
    link = tmp_path / "link.safetensors"
    link.symlink_to(folder / "model.safetensors")
    fails(capsys, "convert", folder, "-o", link)
    single = tmp_path / "model.bin"
    single.write_bytes(b"GGUF" + bytes(100))
    fails(capsys, "convert", single, "-o", single)
    assert single.read_bytes() == b"GGUF" + bytes(100) and tokenizer.read_text() == tokenizer_json()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_no_space_left(folder, out, capsys, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full, raising=False)
        assert "No space left on device" in convert_fails(capsys, folder, out)
    for good_writes in (0, 3, 20):
        left, pwrite = good_writes, os.pwrite

        def write(*args):
            nonlocal left
            left -= 1
            return pwrite(*args) if left >= 0 else full()  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", write)
            assert "No space left on device" in fails(capsys, "convert", folder, "-o", out, *EXACT)
        assert_can_go_on(out)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert cli.main(["convert", str(folder), "-o", str(out), *EXACT]) == 2
    goes_on, error = capsys.readouterr().err.splitlines()
    assert goes_on.startswith("continuing: ") and "No space left on device" in error
    assert_can_go_on(out)
    quiet(capsys, "convert", folder, "-o", out, *EXACT)
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    assert out.read_bytes() == halfbyte.convert(folder, out.parent / "again.hb", recipe="f32").read_bytes()


@posix
def test_a_limit_on_file_size(folder, out):
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    argv = [*COMMAND, "convert", str(folder), "-o", str(out), *EXACT]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, preexec_fn=limit)
    assert "File too large" in checked_error(done.returncode, done.stdout, done.stderr)
    assert_untouched(out)


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "halfbyte: interrupted\n"),
        (cli.Terminated(signal.SIGTERM), 143, "halfbyte: terminated\n"),
        (MemoryError(), 2, "halfbyte: error: out of memory\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "x"),
            2,
            "halfbyte: error: x: Permission denied\n",
        ),
    ],
)
def test_whatever_stops_a_conversion_leaves_what_it_can_go_on_from(
    raised, status, said, folder, out, capsys, monkeypatch
):
    from halfbyte.runtime.cli import terminal

    calls = 0

    def stop(self, now: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            assert len(list(out.parent.glob(".*.part"))) == 1
            raise raised

    monkeypatch.setattr(terminal.Progress, "__call__", stop)
    assert cli.main(["convert", str(folder), "-o", str(out), *EXACT]) == status
    assert capsys.readouterr().err == said
    assert_can_go_on(out)
    assert cli.main(["convert", str(folder), "-o", str(out), *EXACT]) == 0
    assert capsys.readouterr().err.startswith("continuing: ")
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def write_large_checkpoint(folder: Path) -> Path:
    """A llama of 240 million zero weights in a sparse file: seconds of conversion, no bytes on disk."""
    n, hidden, layers, vocab = 1024, 4096, 15, 512
    folder.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": n,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
    }
    config |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": vocab}
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    shapes = {EMBED: [vocab, n], NORM: [n]}
    for i in range(layers):
        p = f"model.layers.{i}"
        shapes |= {f"{p}.self_attn.{m}_proj.weight": [n, n] for m in "qkvo"}
        shapes |= {f"{p}.mlp.{m}_proj.weight": [hidden, n] for m in ("gate", "up")}
        shapes |= {f"{p}.mlp.down_proj.weight": [n, hidden]}
        shapes |= {f"{p}.{m}_layernorm.weight": [n] for m in ("input", "post_attention")}
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * int(np.prod(shape))
        header[name], at = {"dtype": "F16", "shape": shape, "data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + at)
    return folder


@posix
@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGINT, 130, "halfbyte: interrupted\n"), (signal.SIGTERM, 143, "halfbyte: terminated\n")],
)
def test_a_signal_in_the_middle_of_a_conversion(number, status, said, tmp_path, out):
    source = write_large_checkpoint(tmp_path / "large")
    argv = [*COMMAND, "convert", str(source), "-o", str(out), "--recipe", "q4"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not list(out.parent.glob(".*.part")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.005)
        time.sleep(0.2)  # into the weights
        process.send_signal(number)
        printed, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, printed, err) == (status, "", said)
    assert_can_go_on(out)
