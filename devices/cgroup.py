"""Limits that Linux control groups (version 1 and 2) put on this process.

A process sits in a nested group; every group above it may hold a tighter limit, so all of them are
read, up to the root of the mount. `root` is the root of the file system; tests give a made-up one.
Sources: Linux Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
_UNLIMITED = 1 << 60  # version 1 says "no limit" with the largest multiple of a page


def read_text(path: Path) -> str:
    """What a small file says, or '' where it cannot be read."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _upward(mount: Path, group: str) -> Iterator[Path]:
    """The group's folder and all above it, innermost first; what is not mounted here is skipped.

    In a container without its own cgroup namespace the path is the host's and only the mount's root
    exists; one outside the namespace starts with '..'.
    """
    parts = [p for p in group.split("/") if p not in ("", ".", "..")]
    for n in range(len(parts), -1, -1):
        folder = mount.joinpath(*parts[:n])
        if folder.is_dir():
            yield folder


def groups(controller: str, root: Path = ROOT) -> Iterator[tuple[int, Path]]:
    """(version, folder) of every group that limits this process by `controller` ('memory' or 'cpu')."""
    base = root / "sys/fs/cgroup"
    own: dict[str, str] = {}
    for line in read_text(root / "proc/self/cgroup").splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3:
            for name in fields[1].split(","):  # the version 2 hierarchy has no name
                own[name] = fields[2]
    unified = base if (base / "cgroup.controllers").exists() or not (base / controller).is_dir() else None
    if unified is None and (base / "unified").is_dir():
        unified = base / "unified"
    if unified is not None:
        yield from ((2, folder) for folder in _upward(unified, own.get("", "/")))
    for mount in (base / controller, base / "cpu,cpuacct"):
        if mount.is_dir() and (mount.name == controller or controller == "cpu"):
            yield from ((1, folder) for folder in _upward(mount, own.get(controller, "/")))


def _number(path: Path) -> int | None:
    text = read_text(path).strip()
    return int(text) if text.isdecimal() and text.isascii() and int(text) < _UNLIMITED else None


def _file_pages(folder: Path) -> int:
    """Bytes of the page cache charged to a group: they are given back when memory is wanted."""
    total = 0
    for line in read_text(folder / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key in ("inactive_file", "active_file") and value.strip().isdecimal():
            total += int(value)
    return total


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes that the tightest group allows, or None for no limit."""
    limits = [
        _number(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        for version, folder in groups("memory", root)
    ]
    return min((n for n in limits if n is not None), default=None)


def memory_room(root: Path = ROOT) -> int | None:
    """Bytes this process may still take before some group's limit, or None for no limit."""
    rooms = []
    for version, folder in groups("memory", root):
        names = ("memory.max", "memory.current")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_number(folder / name) for name in names)
        if limit is not None:
            rooms.append(max(0, limit - max(0, (used or 0) - _file_pages(folder))))
    return min(rooms, default=None)


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs that the tightest group allows, or None for no limit."""
    quotas = []
    for version, folder in groups("cpu", root):
        if version == 2:
            parts = read_text(folder / "cpu.max").split()
        else:
            parts = [read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(parts) == 2 and all(p.isdecimal() for p in parts) and int(parts[1]):
            quotas.append(int(parts[0]) / int(parts[1]))
    return min(quotas, default=None)
