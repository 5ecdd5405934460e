"""What this machine is: processor, instruction sets, cores, caches, memory and the limits put on us."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

# Instruction sets that kernels care about, by the names the operating system uses.
_X86 = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "amx_int8")
_ARM = ("asimd", "asimddp", "i8mm", "sve", "sve2")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cpu_name() -> str:
    info = _read("/proc/cpuinfo")
    for key in ("model name", "Hardware", "Model"):
        found = re.search(rf"^{key}\s*:\s*(.+)$", info, re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def _flags() -> set[str]:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def _caches() -> dict[str, int]:
    """Bytes of the caches that cpu 0 sees, by level and type."""
    out: dict[str, int] = {}
    for entry in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(str(entry / f)).strip() for f in ("level", "type", "size"))
        if kind != "Instruction" and size.endswith("K"):
            out[f"L{level}"] = int(size[:-1]) << 10
    return out


def memory_limit() -> int | None:
    """Bytes that the control group allows, or None for no limit."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(path).strip()
        if text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def cpu_quota() -> float | None:
    """CPUs that the control group allows, or None for no limit."""
    parts = _read("/sys/fs/cgroup/cpu.max").split()
    if len(parts) == 2 and parts[0].isdigit() and int(parts[1]):
        return int(parts[0]) / int(parts[1])
    return None


def probe() -> dict[str, Any]:
    """Facts about the machine; sizes in bytes. Nothing is measured."""
    import psutil

    flags = _flags()
    memory = psutil.virtual_memory()
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "cpus": affinity or 1,
        "cores": psutil.cpu_count(logical=False) or affinity or 1,
        "cpu_quota": cpu_quota(),
        "isa": [f for f in (*_X86, *_ARM) if f in flags],
        "caches": _caches(),
        "memory": memory.total,
        "memory_available": memory.available,
        "memory_limit": memory_limit(),
    }
