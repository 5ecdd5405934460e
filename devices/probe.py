"""What this machine is: processor, instruction sets, core classes, caches, memory and the limits put on us.

Nothing is measured and nothing fails: what cannot be read is left out. `root` is the root of the file
system; tests give a made-up one.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import cgroup
from .cgroup import ROOT, read_text

# Instruction sets that kernels care about, by the names Linux uses.
_X86 = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "amx_int8")
_ARM = ("asimd", "asimddp", "i8mm", "sve", "sve2")
_MAC = {
    "asimd": "hw.optional.neon",
    "asimddp": "hw.optional.arm.FEAT_DotProd",
    "i8mm": "hw.optional.arm.FEAT_I8MM",
    "avx2": "hw.optional.avx2_0",
    "avx512f": "hw.optional.avx512f",
    "avx512_vnni": "hw.optional.avx512vnni",
}

# "CPU part" of implementer 0x41 (Arm) in /proc/cpuinfo; source: the cores' technical reference manuals (MIDR_EL1).
_ARM_PARTS = {
    0xD03: "Cortex-A53", 0xD04: "Cortex-A35", 0xD05: "Cortex-A55", 0xD08: "Cortex-A72", 0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1", 0xD0D: "Cortex-A77", 0xD40: "Neoverse-V1", 0xD41: "Cortex-A78",
    0xD42: "Cortex-A78AE", 0xD44: "Cortex-X1", 0xD46: "Cortex-A510", 0xD47: "Cortex-A710", 0xD48: "Cortex-X2",
    0xD49: "Neoverse-N2", 0xD4D: "Cortex-A715", 0xD4E: "Cortex-X3", 0xD4F: "Neoverse-V2", 0xD80: "Cortex-A520",
    0xD81: "Cortex-A720", 0xD82: "Cortex-X4",
}  # fmt: skip
_SAME_CLASS = 0.9  # cores of one kind differ by some percent of their top clock (favoured cores)


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes that the control groups allow, or None for no limit."""
    return cgroup.memory_limit(root)


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs that the control groups allow, or None for no limit."""
    return cgroup.cpu_quota(root)


def _cpuinfo(root: Path) -> list[dict[str, str]]:
    """The blocks of /proc/cpuinfo: one a processor, and on ARM sometimes one of the board."""
    blocks = []
    for text in read_text(root / "proc/cpuinfo").split("\n\n"):
        pairs = (line.partition(":") for line in text.splitlines())
        block = {key.strip(): value.strip() for key, _, value in pairs}
        if block:
            blocks.append(block)
    return blocks


def cpu_name(root: Path = ROOT) -> str:
    """The processor as its maker calls it, or the board where the processor has no name."""
    blocks = _cpuinfo(root)
    for block in blocks:
        if "model name" in block:
            return block["model name"]
    board = read_text(root / "proc/device-tree/model").strip("\0\n ")
    for key in ("Hardware", "Model"):
        board = board or next((b[key] for b in blocks if b.get(key)), "")
    return board or platform.processor() or platform.machine()


def isa(root: Path = ROOT) -> list[str]:
    """Instruction sets that every core has, among those that kernels use."""
    lists = [b.get("flags") or b.get("Features") for b in _cpuinfo(root)]
    sets = [set(text.split()) for text in lists if text]
    everywhere = set.intersection(*sets) if sets else set()
    return [f for f in (*_X86, *_ARM) if f in everywhere]


def _cpu_list(text: str) -> tuple[int, ...]:
    """'0-3,8' as (0, 1, 2, 3, 8)."""
    out: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        out += range(int(first), min(int(last or first), int(first) + 4096) + 1)
    return tuple(out)


def _cpu_folders(root: Path) -> list[tuple[int, Path]]:
    base = root / "sys/devices/system/cpu"
    online = _cpu_list(read_text(base / "online"))
    found = [(int(p.name[3:]), p) for p in base.glob("cpu[0-9]*") if p.name[3:].isdecimal()]
    return sorted((n, p) for n, p in found if not online or n in online)


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMG]?)", text.strip())
    return int(found.group(1)) << {"": 0, "K": 10, "M": 20, "G": 30}[found.group(2)] if found else 0


def caches(root: Path = ROOT) -> dict[str, dict[str, int]]:
    """Data and unified caches by level: `bytes` of the largest one and `total` of all of them."""
    seen: dict[tuple[str, str], int] = {}
    for number, folder in _cpu_folders(root):
        for entry in folder.glob("cache/index*"):
            level, kind, size, shared = (
                read_text(entry / f).strip() for f in ("level", "type", "size", "shared_cpu_list")
            )
            if kind in ("Data", "Unified") and _size(size):
                seen[f"L{level}", shared or str(number)] = _size(size)
    return {
        level: {
            "bytes": max(n for (at, _), n in seen.items() if at == level),
            "total": sum(n for (at, _), n in seen.items() if at == level),
        }
        for level in sorted({level for level, _ in seen})
    }


def sibling_groups(root: Path = ROOT) -> list[tuple[int, ...]]:
    """The processors of each physical core, in order."""
    found = set()
    for number, folder in _cpu_folders(root):
        text = read_text(folder / "topology/core_cpus_list") or read_text(
            folder / "topology/thread_siblings_list"
        )
        found.add(_cpu_list(text) or (number,))
    return sorted(found)


def core_classes(root: Path = ROOT) -> list[dict[str, Any]]:
    """Kinds of cores, fastest first: `cpus`, `capacity` (1024 = the fastest), `max_mhz`, `name`; absent: None.

    Told apart by the kind of core (ARM part; Intel's cpu_core and cpu_atom), then by capacity, else by clock.
    """
    parts = {}
    for block in _cpuinfo(root):
        if block.get("processor", "").isdecimal() and "CPU part" in block:
            parts[int(block["processor"])] = _part_name(block)
    for kind in ("core", "atom"):
        for number in _cpu_list(read_text(root / f"sys/devices/cpu_{kind}/cpus")):
            parts[number] = {"core": "P-core", "atom": "E-core"}[kind]
    rows = []
    for number, folder in _cpu_folders(root):
        capacity = read_text(folder / "cpu_capacity").strip()
        khz = read_text(folder / "cpufreq/cpuinfo_max_freq").strip()
        speed = int(capacity) if capacity.isdecimal() else None
        mhz = int(khz) // 1000 if khz.isdecimal() else None
        rows.append((number, parts.get(number), speed, mhz))
    out: list[dict[str, Any]] = []
    for number, name, speed, mhz in sorted(rows, key=lambda r: (-(r[2] or 0), -(r[3] or 0), r[0])):
        for row in out:
            key, value = ("capacity", speed) if speed is not None else ("max_mhz", mhz)
            if row["name"] == name and (value or 0) >= _SAME_CLASS * (row[key] or 0):
                row["cpus"].append(number)
                break
        else:
            out.append({"cpus": [number], "capacity": speed, "max_mhz": mhz, "name": name})
    for row in out:
        row["cpus"].sort()
    return out


def _part_name(block: dict[str, str]) -> str:
    try:
        part, maker = int(block["CPU part"], 16), int(block.get("CPU implementer", "0x41"), 16)
    except ValueError:
        return block["CPU part"]
    return _ARM_PARTS.get(part, f"part {part:#x}") if maker == 0x41 else f"part {maker:#x}/{part:#x}"


def memory(root: Path = ROOT) -> tuple[int, int]:
    """(total, available) bytes of this machine; (0, 0) when unknown."""
    found: dict[str, str] = dict(
        re.findall(r"^(MemTotal|MemAvailable):\s*(\d+) kB", read_text(root / "proc/meminfo"), re.M)
    )
    if total := found.get("MemTotal"):
        return int(total) << 10, int(found.get("MemAvailable", total)) << 10
    if root != ROOT:
        return 0, 0
    import psutil

    now = psutil.virtual_memory()
    return now.total, now.available


def _sysctl(name: str) -> str:
    """One value of macOS' sysctl, or ''."""
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def mac_facts(sysctl: Callable[[str], str] = _sysctl) -> dict[str, Any]:
    """What sysctl tells on macOS, in the keys of `probe`; what it does not know is left out."""

    def numbers(names: Iterable[str]) -> list[int]:
        return [int(text) for text in map(sysctl, names) if text.isdecimal()]

    facts: dict[str, Any] = {"isa": [name for name, key in _MAC.items() if sysctl(key) == "1"]}
    if name := sysctl("machdep.cpu.brand_string"):
        facts["cpu"] = name
    if cores := numbers(["hw.physicalcpu"]):
        facts["cores"] = cores[0]
    sizes: dict[str, int] = {}
    for level in ("l1d", "l2", "l3"):
        keys = (f"hw.perflevel0.{level}cachesize", f"hw.perflevel1.{level}cachesize", f"hw.{level}cachesize")
        if found := numbers(keys):  # of all kinds of cores the largest, as in `caches`
            sizes[level[:2].upper()] = max(found)
    if sizes:
        facts["caches"] = sizes
        facts["last_level_cache"] = sizes[max(sizes)]
    classes, at = [], 0
    for rank, kind in enumerate(("P-core", "E-core")):
        for count in numbers([f"hw.perflevel{rank}.logicalcpu"]):
            cpus = list(range(at, at + count))
            classes.append({"cpus": cpus, "capacity": None, "max_mhz": None, "name": kind})
            at += count
    if classes:
        facts["core_classes"] = classes
    return facts


def probe(root: Path = ROOT) -> dict[str, Any]:
    """Facts about the machine; sizes in bytes. Nothing is measured.

    `cpus`: processors this process may use; `cores`: physical ones of the machine; `caches`: the largest
    one of each level; `last_level_cache`: all of that level together; `memory_available`: what this process
    can still take, control groups considered.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    siblings, levels = sibling_groups(root), caches(root)
    total, available = memory(root)
    room = cgroup.memory_room(root)
    facts: dict[str, Any] = {
        "cpu": cpu_name(root),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "cpus": affinity or 1,
        "cores": len(siblings) or affinity or 1,
        "threads_per_core": max((len(s) for s in siblings), default=1),
        "core_classes": core_classes(root),
        "cpu_quota": cpu_quota(root),
        "isa": isa(root),
        "caches": {level: row["bytes"] for level, row in levels.items()},
        "last_level_cache": levels[max(levels)]["total"] if levels else None,
        "memory": total,
        "memory_available": available if room is None else min(available, room),
        "memory_limit": memory_limit(root),
    }
    if sys.platform == "darwin" and root == ROOT:
        facts.update(mac_facts())
    return facts
