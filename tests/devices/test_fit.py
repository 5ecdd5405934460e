"""What fit computes, against numbers worked out by hand on a file small enough for that; and its command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.devices import bandwidth, machine
from halfbyte.devices.bandwidth import Speed
from halfbyte.devices.fit import CHUNK, Load, fit, of_file, of_size
from halfbyte.devices.machine import (
    KEYS,
    Machine,
    load_profile,
    parse,
    parse_flat,
    profile_names,
    this_machine,
)
from halfbyte.formats import program, tiles
from halfbyte.formats.container import File
from halfbyte.formats.errors import UsageError
from halfbyte.formats.kv_modes import MODES
from halfbyte.formats.writer import TensorSpec, Writer
from halfbyte.runtime.arena import Arena
from halfbyte.runtime.cli import main
from halfbyte.runtime.kv import KV

N = 64
BOX = Machine("box", "a cpu", 4, 10**9, 1e9, 4e9, 2e9, False, "made up")
GOLDEN = Path(__file__).resolve().parents[1] / "formats" / "golden"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """embed, q8 linear, two caches of 2 heads (one with a window of 8) and attention, pick, q8 linear; N columns."""
    out = tmp_path_factory.mktemp("fit") / "tiny.hb"
    slots = [
        (N, 0, 0, program.TOKENS),
        (N, 1, 0, program.TOKENS),
        (N, 2, 0, program.PICKS),
        (N, 3, 0, program.PICKS),
    ]
    records = [
        program.record("embed", out=[0], weights=[0]),
        program.record("linear", out=[1], ins=[0], weights=[1]),
        program.record("kv_put", ins=[0, 1], cache=0),
        program.record("attend", out=[1], ins=[0], cache=0, scale=0.125, softcap=0.0),
        program.record("kv_put", ins=[0, 1], cache=1),
        program.record("attend", out=[1], ins=[0], cache=1, scale=0.125, softcap=0.0),
        program.record("pick", out=[2], ins=[1]),
        program.record("linear", out=[3], ins=[2], weights=[2]),
    ]
    with Writer(
        out,
        meta={"model.vocab_size": N, "model.context_length": 1000},
        slots=np.array(slots, program.SLOT_DTYPE),
        caches=np.array([(2, 32, 32, 0), (2, 32, 32, 8)], program.CACHE_DTYPE),
        program=np.array(records, program.OP_DTYPE),
        tensors=[
            TensorSpec("embed", "f32", (N, N)),
            TensorSpec("a", "q8", (N, N)),
            TensorSpec("b", "q8", (N, N)),
        ],
    ) as writer:
        writer.write(0, "values", 0, tiles.pack_groups(np.ones((N, N), np.float32)))
        for i in (1, 2):
            writer.write(i, "codes", 0, tiles.pack_codes(np.ones((N, N), np.int8), 8))
            writer.write(i, "scales", 0, tiles.pack_groups(np.ones((N, 2), np.float16)))
    return out


@pytest.fixture(scope="module")
def load(path: Path) -> Load:
    """The load of that file."""
    return of_file(File(path))


# By hand: a q8 matrix is 64*64 codes and 64*2 f16 scales; a token reads two of them and one embedding row.
MATRIX = 64 * 64 + 64 * 2 * 2
READ = 2 * MATRIX + 64 * 4
# A position of one cache is 2 heads * (32 + 32) numbers.
POSITION = 2 * 64


def test_load_of_a_file(path: Path, load: Load) -> None:
    assert load.weights == path.stat().st_size
    assert load.read == READ
    assert load.int8_macs == 2 * N * N and load.f32_macs == 0
    assert load.prefill_macs == N * N  # the other matrix meets picked rows only
    assert load.attention_macs(1) == 2 * (N + N)
    assert load.attention_macs(100) == (100 + 8) * (N + N)
    assert load.activations == (CHUNK * N + CHUNK * N + N + N) * 4
    assert load.records == 8 and load.context == 1000 and load.kv == "k8v8"


def test_activations_are_those_of_the_arena(path: Path, load: Load) -> None:
    assert load.activations == Arena(File(path).slots, CHUNK, 1).nbytes


@pytest.mark.parametrize("mode", sorted(MODES))
def test_cache_bytes_are_those_of_the_cache(path: Path, load: Load, mode: str) -> None:
    kv = KV(File(path).caches, mode)
    kv.reserve(512)
    assert load.kv_bytes(512, mode) == kv.nbytes


def test_a_window_bounds_what_is_read(load: Load) -> None:
    assert load.kv_read(100, "f16") == (100 + 8) * POSITION * 2
    assert load.kv_read(5, "f32") == 2 * 5 * POSITION * 4


def test_memory_and_the_largest_context(load: Load) -> None:
    found = fit(load, BOX, 1000, "f16")
    fixed = load.weights + load.activations + load.overhead
    assert found["memory"]["needed"] == fixed + 1000 * 2 * POSITION * 2
    assert found["memory"]["kv"] == 1000 * 2 * POSITION * 2
    assert found["fits"] and found["largest_context"] == 1000  # the model's own limit
    room = 300 * 2 * POSITION * 2
    small = fit(load, replace(BOX, memory=fixed + room), 301, "f16")
    assert not small["fits"] and small["largest_context"] == 300
    assert small["prefill_tokens_per_s"] is None
    assert [(d["tokens_per_s"], d["bound"]) for d in small["decode"]] == [(None, "memory size")] * 2
    assert fit(load, replace(BOX, memory=fixed + room), 300, "f16")["fits"]
    none = fit(load, replace(BOX, memory=fixed - 1), 1, "f16")
    assert not none["fits"] and none["largest_context"] == 0


def test_tokens_per_second_by_hand(load: Load) -> None:
    step = 100e-6 + 8e-6
    slow = fit(load, replace(BOX, bandwidth=1e6), 100, "f16")["decode"]
    assert [d["depth"] for d in slow] == [0, 100]
    assert slow[0]["tokens_per_s"] == pytest.approx(1 / (step + READ / 1e6))
    assert slow[1]["tokens_per_s"] == pytest.approx(1 / (step + (READ + 108 * POSITION * 2) / 1e6))
    assert slow[0]["bound"] == slow[1]["bound"] == "memory bandwidth"
    weak = fit(load, replace(BOX, int8_peak=1e6, f32_peak=1e6), 100, "f16")
    arithmetic = 2 * N * N / 0.25e6 + 108 * 2 * N / 0.25e6
    assert weak["decode"][1]["bound"] == "arithmetic"
    assert weak["decode"][1]["tokens_per_s"] == pytest.approx(1 / (step + arithmetic))
    assert weak["prefill_tokens_per_s"] == pytest.approx(0.5e6 / (N * N))
    assert (
        fit(load, replace(BOX, bandwidth=1e12, int8_peak=1e12))["decode"][0]["bound"]
        == "fixed cost of a step"
    )


def test_defaults_and_refusals(load: Load) -> None:
    assert fit(load, BOX)["context"] == 1000
    assert fit(replace(load, context=10**6), BOX)["context"] == 4096
    assert fit(load, BOX, kv="f32")["memory"]["kv"] == 1000 * 2 * POSITION * 4
    for context in (0, 1001):
        with pytest.raises(UsageError, match="1 to 1000"):
            fit(load, BOX, context)
    with pytest.raises(UsageError, match="f16"):
        fit(load, BOX, kv="k1v1")


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.hb")), ids=lambda p: p.stem)
def test_every_golden_file(file: Path) -> None:
    opened = File(file)
    load = of_file(opened)
    assert fit(load, BOX)["decode"][0]["tokens_per_s"] > 0


def test_a_planned_size() -> None:
    load = of_size(8e9, 4.25)
    assert load.weights == load.read == 4_250_000_000 and load.int8_macs == 8_000_000_000
    assert load.kv_bytes(1, "f16") == pytest.approx(2 * 65536, rel=0.01)  # as Llama-3-8B
    assert of_size(8e9, 4.25, 1000).kv_bytes(7, "f32") == 28_000
    assert of_size(1e6, 16).f32_macs == 1_000_000
    for bad in ((0, 4), (8e9, 0), (8e9, 33), (float("nan"), 4), (1e30, 4)):
        with pytest.raises(UsageError):
            of_size(*bad)
    with pytest.raises(UsageError):
        of_size(8e9, 4, 0)


# ---- profiles -------------------------------------------------------------------------------------


def test_there_are_profiles() -> None:
    assert {"raspberry-pi-4", "raspberry-pi-5", "rk3588", "jetson-orin-nano", "pixel-8"} <= set(
        profile_names()
    )


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_is_complete(name: str) -> None:
    text = (machine.PROFILES / f"{name}.toml").read_text()
    found = parse_flat(text)
    assert found.keys() == KEYS.keys() and found == parse(text)
    loaded = load_profile(name)
    assert not loaded.measured and len(loaded.source) > 20
    assert loaded.bandwidth == pytest.approx(found["bandwidth_gb_per_s"] * found["achievable"] * 1e9)
    assert loaded.memory == int((found["memory_gb"] - found["reserved_gb"]) * 2**30) > 0
    assert loaded.f32_peak < loaded.int8_peak + 1


GOOD = (machine.PROFILES / "rk3588.toml").read_text()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is missing"),
        (GOOD.replace("cores = 8", ""), "cores"),
        (GOOD.replace("cores = 8", "cores = 8.5"), "whole number"),
        (GOOD.replace("cores = 8", "cores = true"), "cores"),
        (GOOD.replace("cores = 8", "cores = 0"), "positive"),
        (GOOD.replace("memory_gb = 8", 'memory_gb = "8"'), "number"),
        (GOOD.replace("memory_gb = 8", "memory_gb = nan"), "positive"),
        (GOOD.replace("memory_gb = 8", "memory_gb = 0.5"), "less than memory_gb"),
        (GOOD.replace("achievable = 0.6", "achievable = 1.6"), "at most 1"),
        (GOOD + "colour = 3\n", "colour"),
        (GOOD + "cores = 8\n", "not a profile"),
        (GOOD + "\x00\n", "not a profile"),
        ("name\n", "not a profile"),
        ("[" * 5000, "not a profile"),
        ("#" * 70000, "longer"),
    ],
)
def test_bad_profiles_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, text: str, why: str
) -> None:
    file = tmp_path / "m.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=why) as error:
        load_profile(str(file))
    assert str(file) in str(error.value)
    assert main(["fit", "--parameters", "1e9", "--bits", "4", "--machine", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1


def test_a_profile_that_is_not_there(tmp_path: Path) -> None:
    for name in ("toaster", str(tmp_path / "none.toml"), str(tmp_path) + "/", "../raspberry-pi-5", "\0/x"):
        with pytest.raises(UsageError):
            load_profile(name)
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not a profile"):
        load_profile(str(tmp_path / "b.toml"))


@pytest.mark.parametrize(
    "line",
    ["a", "a = ", "= 1", "a = 'x'", 'a = "x', 'a = "x" y', 'a = "x\\n"', "a = 1\na = 2", "[t]", "a.b = 1"],
)
def test_the_flat_reader_is_strict(line: str) -> None:
    with pytest.raises(ValueError):
        parse_flat(line)
    assert parse_flat('# c\n\na = "x # y" # z\nb = 3 # three\nc=.5\n') == {"a": "x # y", "b": 3, "c": 0.5}


# ---- the command ----------------------------------------------------------------------------------


def run(capsys: Any, *argv: object) -> str:
    """Output of a command that must succeed."""
    status = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def test_fit_command(path: Path, capsys: pytest.CaptureFixture) -> None:
    found = json.loads(
        run(capsys, "fit", path, "--machine", "raspberry-pi-5", "--context", 50, "--kv", "f32", "--json")
    )
    assert found["context"] == 50 and found["kv"] == "f32" and found["fits"] is True
    assert found["machine"]["name"].startswith("Raspberry Pi 5")
    assert found["decode"][0]["tokens_per_s"] > found["decode"][1]["tokens_per_s"]
    text = run(capsys, "fit", path, "--machine", "raspberry-pi-5")
    assert "fits" in text and "tokens/s at depth 1000" in text
    assert "does NOT fit" in run(
        capsys, "fit", "--parameters", "70e9", "--bits", 4, "--machine", "raspberry-pi-5"
    )
    assert "raspberry-pi-5" in run(capsys, "fit", "--list")
    assert set(json.loads(run(capsys, "fit", "--list", "--json"))["profiles"]) == set(profile_names())


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--parameters", "1e9"),
        ("--bits", "4"),
        ("x.hb", "--bits", "4"),
        ("none.hb", "--machine", "rk3588"),
        ("--parameters", "1e9", "--bits", "4", "--machine", "rk3588", "--fresh"),
        ("--parameters", "1e9", "--bits", "4", "--machine", "rk3588", "--kv", "k1"),
        ("--parameters", "1e9", "--bits", "4", "--machine", "rk3588", "--context", "0"),
        ("--parameters", "inf", "--bits", "4", "--machine", "rk3588"),
    ],
)
def test_fit_refuses_in_one_line(argv: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    assert main(["fit", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("halfbyte: error: ") and err.count("\n") == 1


def test_this_machine_is_measured_once(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    known = Speed(2, 20.0, 30.0, "avx512vnni", 200.0, 400.0, 40.0, 80.0, 1 << 28)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bandwidth, "measure", lambda: known)
    here = this_machine()
    assert here.measured and here.bandwidth == 30e9 and here.int8_peak == 400e9 and here.memory > 0
    monkeypatch.setattr(bandwidth, "measure", lambda: pytest.fail("measured again"))
    assert "measured" in run(capsys, "fit", path)


def test_doctor_measures_only_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from halfbyte.runtime import backends

    known = Speed(2, 20.0, 30.0, "avx512vnni", 200.0, 400.0, 40.0, 80.0, 1 << 28)
    calls: list[int] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backends, "BACKENDS", {"reference": "Reference"})
    monkeypatch.setattr(bandwidth, "measure", lambda: calls.append(1) or known)
    assert "doctor --measure" in run(capsys, "doctor")
    assert json.loads(run(capsys, "doctor", "--json"))["machine"]["measured"] is None and calls == []
    assert "reads 20.0 GB/s with one thread, 30.0 with 2" in run(capsys, "doctor", "--measure")
    assert calls == [1]
    assert json.loads(run(capsys, "doctor", "--json"))["machine"]["measured"] == vars(known) and calls == [1]
