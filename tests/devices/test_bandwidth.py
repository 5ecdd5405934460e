"""The measurement gives sane numbers, its cache is robust, and its loops hold the instructions they count."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from halfbyte.devices import bandwidth
from halfbyte.devices.bandwidth import Speed, cached, choose, speed, working_set

KNOWN = Speed(2, 20.0, 30.0, "avx512vnni", 200.0, 400.0, 40.0, 80.0, 1 << 28)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and measuring replaced by a constant that counts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = [0]

    def measure() -> Speed:
        calls[0] += 1
        return replace(KNOWN, read_gb_per_s=30.0 + calls[0])

    monkeypatch.setattr(bandwidth, "measure", measure)
    yield tmp_path / "halfbyte" / "bandwidth.json"


def test_measured_once_and_again_when_fresh(home: Path) -> None:
    assert cached() is None
    assert speed().read_gb_per_s == 31.0
    assert speed().read_gb_per_s == 31.0 and cached() == speed()
    assert speed(fresh=True).read_gb_per_s == 32.0
    assert speed().read_gb_per_s == 32.0
    assert len(json.loads(home.read_text())) == 1
    assert [p.name for p in home.parent.iterdir()] == ["bandwidth.json"]


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        '{"%s": 3}',
        '{"%s": {"threads": 2}}',
        '{"%s": {"read_gb_per_s": NaN}}',
        "\xff\xfe",
        "[" * 100_000,
    ],
)
def test_a_damaged_cache_is_measured_again(home: Path, damage: str) -> None:
    speed()
    (key,) = json.loads(home.read_text())
    home.write_bytes((damage % key if "%s" in damage else damage).encode("latin-1"))
    assert cached() is None
    assert speed().read_gb_per_s == 32.0
    assert cached() is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [("read_gb_per_s", 0), ("int8_gmac_per_s", "fast"), ("instruction", 7), ("threads", True)],
)
def test_impossible_entries_are_not_believed(home: Path, field: str, value: object) -> None:
    speed()
    stored = json.loads(home.read_text())
    (key,) = stored
    stored[key][field] = value
    home.write_text(json.dumps(stored))
    assert cached() is None


def test_another_machine_keeps_its_entry(home: Path) -> None:
    home.parent.mkdir()
    home.write_text(json.dumps({"another cpu": {"kept": True}}))
    speed()
    assert json.loads(home.read_text())["another cpu"] == {"kept": True}


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert speed().read_gb_per_s == 31.0


def test_working_set_is_beyond_the_cache_and_within_memory() -> None:
    assert working_set({"last_level_cache": 32 << 20, "memory_available": 1 << 40}) == 256 << 20
    assert working_set({"last_level_cache": None, "memory_available": 1 << 40}) == 128 << 20
    assert working_set({"last_level_cache": 1 << 30, "memory_available": 1 << 40}) == 1 << 30
    assert working_set({"last_level_cache": 32 << 20, "memory_available": 400 << 20}) == 100 << 20


def test_choice_of_the_instruction() -> None:
    assert choose({"avx2": True, "avx512f": True, "avx512bw": True, "avx512vnni": True}) == "avx512vnni"
    assert choose({"avx2": True, "avx512f": True, "avx512vnni": False}) == "avx2"
    assert choose({"avx2": True, "avxvnni": True}) == "avxvnni"
    assert choose({"neon": True, "dotprod": True}) == "dotprod"
    assert choose({"neon": True, "dotprod": True, "i8mm": True}) == "i8mm"
    assert choose({}) == "plain"


@pytest.mark.parametrize(
    ("instruction", "triple", "features", "mnemonic", "count"),
    [
        ("avx512vnni", "x86_64-unknown-linux-gnu", "+avx512f,+avx512bw,+avx512vnni", "vpdpbusd", 48),
        ("avxvnni", "x86_64-unknown-linux-gnu", "+avx2,+avxvnni", "vpdpbusd", 48),
        ("avx2", "x86_64-unknown-linux-gnu", "+avx2", "vpmaddubsw", 48),
        ("plain", "x86_64-unknown-linux-gnu", "+avx2", "vpaddd", 96),
        ("dotprod", "aarch64-unknown-linux-gnu", "+neon,+dotprod", "sdot", 48),
        ("i8mm", "aarch64-unknown-linux-gnu", "+neon,+dotprod,+i8mm", "smmla", 48),
    ],
)
def test_the_loop_holds_what_it_counts(
    instruction: str, triple: str, features: str, mnemonic: str, count: int
) -> None:
    """Compiled for its CPU, each accumulator has its instruction in every round: nothing was optimised away."""
    from llvmlite import binding, ir

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = ir.Module("peak")
    i64 = ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(i64, [i64]), "peak")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    builder.ret(bandwidth._emit(builder, function.args[0], *bandwidth._int8_step(instruction)))
    try:
        target = binding.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip(f"this llvmlite has no code generator for {triple}")
    machine = target.create_target_machine(features=features, opt=3)
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    builder_ = binding.create_pass_builder(machine, options)
    builder_.getModulePassManager().run(parsed, builder_)
    code = machine.emit_assembly(parsed)
    assert len(re.findall(rf"^\s+(?:\{{vex\}}\s+)?{mnemonic}\b", code, re.MULTILINE)) == count


def test_measuring_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive numbers from real loops on a small array; how large they are is not judged."""
    monkeypatch.setattr(bandwidth, "_WINDOW_S", 0.002)
    monkeypatch.setattr(bandwidth, "_WINDOWS", 1)
    monkeypatch.setattr(bandwidth, "working_set", lambda facts: 4 << 20)
    found = bandwidth.measure(threads=2)
    assert found.threads == 2 and found.working_set == 4 << 20
    assert min(found.read_gb_per_s_1, found.read_gb_per_s, found.int8_gmac_per_s, found.f32_gmac_per_s) > 0
    assert 0 < found.processor_share <= 1 and replace(found, processor_share=0.5).busy
    assert bandwidth._entry(json.loads(json.dumps(vars(found)))) == found
