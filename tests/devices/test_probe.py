"""The probe on made-up /proc and /sys trees: boards, big.LITTLE, SMT, control groups of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.devices import cgroup
from halfbyte.devices.probe import (
    caches,
    core_classes,
    cpu_name,
    isa,
    mac_facts,
    memory,
    probe,
    sibling_groups,
)


def tree(root: Path, files: dict[str, str]) -> Path:
    """Write files below root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def cpus(count: int, **per_cpu: list[str]) -> dict[str, str]:
    """Files below /sys/devices/system/cpu: keys are paths with '__' for '/'."""
    base = "sys/devices/system/cpu"
    out = {f"{base}/online": f"0-{count - 1}\n"}
    for key, values in per_cpu.items():
        for i, value in enumerate(values):
            out[f"{base}/cpu{i}/{key.replace('__', '/')}"] = f"{value}\n"
    return out


RK3588 = {
    "proc/cpuinfo": "\n\n".join(
        f"processor\t: {i}\nFeatures\t: fp asimd asimddp{' i8mm' if i > 3 else ''}\nCPU implementer\t: 0x41\n"
        f"CPU part\t: {'0xd05' if i < 4 else '0xd0b'}"
        for i in range(8)
    )
    + "\n\nSerial\t\t: 0000\n",
    "proc/device-tree/model": "Radxa ROCK 5B\0",
    "proc/meminfo": "MemTotal:        8123456 kB\nMemFree:          100 kB\nMemAvailable:    7000000 kB\n",
    **cpus(
        8,
        cpu_capacity=["530"] * 4 + ["1024", "1024", "1004", "1004"],
        cpufreq__cpuinfo_max_freq=["1800000"] * 4 + ["2400000"] * 4,
        topology__core_cpus_list=[str(i) for i in range(8)],
    ),
}


def test_a_board_with_two_kinds_of_cores(tmp_path: Path) -> None:
    root = tree(tmp_path, RK3588)
    assert cpu_name(root) == "Radxa ROCK 5B"
    assert core_classes(root) == [
        {"cpus": [4, 5, 6, 7], "capacity": 1024, "max_mhz": 2400, "name": "Cortex-A76"},
        {"cpus": [0, 1, 2, 3], "capacity": 530, "max_mhz": 1800, "name": "Cortex-A55"},
    ]
    assert isa(root) == ["asimd", "asimddp"]  # what every core has
    assert memory(root) == (8123456 << 10, 7000000 << 10)
    facts = probe(root)
    assert facts["cores"] == 8 and facts["threads_per_core"] == 1
    assert facts["memory_available"] == 7000000 << 10 and facts["memory_limit"] is None


def test_siblings_and_favoured_cores(tmp_path: Path) -> None:
    info = (
        "processor : 0\nmodel name : Some CPU @ 3 GHz\nflags : fpu avx2 fma\n\nprocessor : 1\nflags : avx2\n"
    )
    files = cpus(
        4,
        topology__thread_siblings_list=["0,2", "1,3", "0,2", "1,3"],
        cpufreq__cpuinfo_max_freq=["5000000", "4800000", "5000000", "4800000"],
    )
    root = tree(tmp_path, {"proc/cpuinfo": info, **files})
    assert cpu_name(root) == "Some CPU @ 3 GHz" and isa(root) == ["avx2"]
    assert sibling_groups(root) == [(0, 2), (1, 3)]
    assert [c["cpus"] for c in core_classes(root)] == [[0, 1, 2, 3]]  # 4 % apart: one kind
    assert probe(root)["threads_per_core"] == 2


def test_hybrid_intel_by_its_two_devices(tmp_path: Path) -> None:
    files = {"sys/devices/cpu_core/cpus": "0-1\n", "sys/devices/cpu_atom/cpus": "2-3\n"}
    root = tree(tmp_path, {**cpus(4, cpufreq__cpuinfo_max_freq=["4000000"] * 4), **files})
    assert [(c["name"], c["cpus"]) for c in core_classes(root)] == [("P-core", [0, 1]), ("E-core", [2, 3])]


def test_offline_cpus_are_not_counted(tmp_path: Path) -> None:
    root = tree(tmp_path, cpus(4, topology__core_cpus_list=["0", "1", "2", "3"]))
    tree(tmp_path, {"sys/devices/system/cpu/online": "0,2-3\n"})
    assert sibling_groups(root) == [(0,), (2,), (3,)]


def test_caches_by_level_and_sharing(tmp_path: Path) -> None:
    files = {}
    for cpu in range(4):
        for index, (level, kind, size, shared) in enumerate(
            [
                ("1", "Data", "32K", str(cpu)),
                ("1", "Instruction", "64K", str(cpu)),
                ("2", "Unified", "512K" if cpu else "1M", str(cpu)),
                ("3", "Unified", "16M", "0-1" if cpu < 2 else "2-3"),
            ]
        ):
            folder = f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
            files |= {f"{folder}/level": level, f"{folder}/type": kind, f"{folder}/size": size}
            files[f"{folder}/shared_cpu_list"] = shared
    root = tree(tmp_path, files)
    assert caches(root) == {
        "L1": {"bytes": 32 << 10, "total": 128 << 10},
        "L2": {"bytes": 1 << 20, "total": 2560 << 10},
        "L3": {"bytes": 16 << 20, "total": 32 << 20},
    }
    assert probe(root)["last_level_cache"] == 32 << 20


def test_an_empty_tree_is_no_error(tmp_path: Path) -> None:
    facts = probe(tmp_path)
    assert facts["core_classes"] == [] and facts["caches"] == {} and facts["last_level_cache"] is None
    assert facts["cpus"] >= 1 and facts["cores"] >= 1 and facts["memory"] == 0


def test_garbage_is_no_error(tmp_path: Path) -> None:
    root = tree(
        tmp_path, {"proc/cpuinfo": "processor : x\nCPU part : zz\nflags\n", "proc/meminfo": "MemTotal: ?"}
    )
    tree(root, cpus(1, cpu_capacity=["fast"], cpufreq__cpuinfo_max_freq=["-"], cache__index0__size=["?K"]))
    tree(root, {"proc/self/cgroup": "nonsense\n", "sys/fs/cgroup/cgroup.controllers": ""})
    tree(root, {"sys/fs/cgroup/memory.max": "many\n", "sys/fs/cgroup/cpu.max": "1 0\n"})
    facts = probe(root)
    assert facts["memory_limit"] is None and facts["cpu_quota"] is None
    assert facts["core_classes"] == [{"cpus": [0], "capacity": None, "max_mhz": None, "name": None}]


# ---- control groups -------------------------------------------------------------------------------


def test_version_2_takes_the_tightest_of_nested_groups(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/app.service\n",
            "sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
            "sys/fs/cgroup/user.slice/memory.max": "2000000000\n",
            "sys/fs/cgroup/user.slice/memory.current": "900000000\n",
            "sys/fs/cgroup/user.slice/memory.stat": "anon 1\ninactive_file 300000000\nactive_file 100000000\n",
            "sys/fs/cgroup/user.slice/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/user.slice/app.service/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/app.service/cpu.max": "max 100000\n",
        },
    )
    assert cgroup.memory_limit(root) == 2_000_000_000
    assert cgroup.memory_room(root) == 1_500_000_000  # the page cache is given back
    assert cgroup.cpu_quota(root) == 1.5
    assert probe(root)["memory_limit"] == 2_000_000_000


def test_version_1_hierarchies(tmp_path: Path) -> None:
    memory_, cpu = "sys/fs/cgroup/memory", "sys/fs/cgroup/cpu"
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/box/inner\n2:cpu,cpuacct:/box\n0::/\n",
            f"{memory_}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{memory_}/box/memory.limit_in_bytes": "700000000\n",
            f"{memory_}/box/memory.usage_in_bytes": "800000000\n",
            f"{memory_}/box/inner/memory.limit_in_bytes": "900000000\n",
            f"{cpu}/cpu.cfs_quota_us": "-1\n",
            f"{cpu}/cpu.cfs_period_us": "100000\n",
            f"{cpu}/box/cpu.cfs_quota_us": "50000\n",
            f"{cpu}/box/cpu.cfs_period_us": "100000\n",
        },
    )
    assert cgroup.memory_limit(root) == 700_000_000
    assert cgroup.memory_room(root) == 0
    assert cgroup.cpu_quota(root) == 0.5


@pytest.mark.parametrize("path", ["/docker/0123", "/../../outside", "/"])
def test_in_a_container_only_the_mount_is_there(tmp_path: Path, path: str) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": f"0::{path}\n",
            "sys/fs/cgroup/cgroup.controllers": "memory",
            "sys/fs/cgroup/memory.max": "512000000\n",
            "outside/memory.max": "1\n",  # never followed out of the mount
        },
    )
    assert cgroup.memory_limit(root) == 512_000_000


# ---- macOS ----------------------------------------------------------------------------------------


def test_mac_facts_from_sysctl() -> None:
    values = {
        "machdep.cpu.brand_string": "Apple M1",
        "hw.physicalcpu": "8",
        "hw.perflevel0.logicalcpu": "4",
        "hw.perflevel1.logicalcpu": "4",
        "hw.perflevel0.l2cachesize": "12582912",
        "hw.l1dcachesize": "65536",
        "hw.optional.neon": "1",
        "hw.optional.arm.FEAT_DotProd": "1",
        "hw.optional.arm.FEAT_I8MM": "0",
    }
    facts = mac_facts(lambda name: values.get(name, ""))
    assert facts["cpu"] == "Apple M1" and facts["cores"] == 8
    assert facts["isa"] == ["asimd", "asimddp"]
    assert facts["caches"] == {"L1": 65536, "L2": 12582912} and facts["last_level_cache"] == 12582912
    assert [(c["name"], c["cpus"]) for c in facts["core_classes"]] == [
        ("P-core", [0, 1, 2, 3]),
        ("E-core", [4, 5, 6, 7]),
    ]
    assert mac_facts(lambda name: "") == {"isa": []}
