"""Look at this machine and installation: processor, memory, packages, and which backends work here.

Every backend runs a tiny model of every kind of matrix beside the reference, so "works" is seen, not assumed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.runtime.cli.arguments import add_json
from halfbyte.runtime.cli.terminal import Progress, one_line, print_json, print_table, printable, size

if TYPE_CHECKING:
    from halfbyte.formats.container import File

HELP = "show what this machine and installation can do"
PACKAGES = (
    *("numpy", "numba", "llvmlite", "cffi", "psutil", "tokenizers", "safetensors", "ml_dtypes", "jinja2"),
    "rich",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `doctor`."""
    parser.add_argument(
        "--measure", action="store_true", help="measure read bandwidth and int8 peak first (about a second)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Probe and print."""
    import halfbyte
    from halfbyte.devices.bandwidth import cached, speed
    from halfbyte.devices.probe import probe

    machine = probe()
    measured = speed(fresh=True) if args.measure else cached(machine)
    found = {
        "halfbyte": halfbyte.__version__,
        "machine": {**machine, "measured": None if measured is None else vars(measured)},
        "packages": {name: installed(name) for name in PACKAGES},
        "native_library": native_library(),
        "backends": backends(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("HALFBYTE_")},
    }
    if args.json:
        print_json(found)
    else:
        _print(found)
    return 0


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def native_library() -> str | None:
    """Path of the compiled library, or None where there is none."""
    try:
        path = importlib.import_module("halfbyte.runtime.backends.native").library_path()
    except Exception:  # a broken installation is what `doctor` is for; `backends` says why
        return None
    return None if path is None else str(path)


def backends() -> list[dict[str, Any]]:
    """One dict a backend, best first: name, available, ok (agrees with the reference), why not, details."""
    from halfbyte.formats.container import File
    from halfbyte.runtime.backends import BACKENDS

    out = []
    with tempfile.TemporaryDirectory() as folder, Progress("trying backends") as progress:
        path = Path(folder) / "tiny.hb"
        _write_tiny(path)
        for i, name in enumerate(BACKENDS):
            progress(name, i, len(BACKENDS))
            out.append(_try(name, File(path)))
    return out


def _try(name: str, file: File) -> dict[str, Any]:
    from halfbyte.runtime.backends import backend_class
    from halfbyte.runtime.backends.backend import POLICIES
    from halfbyte.runtime.lockstep import lockstep

    start = time.perf_counter()
    try:
        details = backend_class(name)(file).describe()
        ok = all(outcome.ok for policy in POLICIES for outcome in lockstep(file, name, policy))
        why = None if ok else "differs from the reference: please report it"
    except Exception as error:
        details, ok, why = {}, None, one_line(error) or type(error).__name__
    found = {"name": name, "available": ok is not None, "ok": ok, "why": why}
    return {**found, "seconds": time.perf_counter() - start, "details": details}


def _write_tiny(path: Path) -> None:
    """A seeded model of an embedding, an int8 and a 4-bit matrix, and attention between them."""
    import numpy as np

    from halfbyte.formats import program, tiles
    from halfbyte.formats.writer import TensorSpec, Writer

    rng, n = np.random.default_rng(0), 64
    matrices = [
        TensorSpec("embed", "f32", (n, n)),
        TensorSpec("q8", "q8", (n, n)),
        TensorSpec("q4", "q4", (n, n)),
    ]
    slots = [
        (n, 0, 0, program.TOKENS),
        (n, 1, 0, program.TOKENS),
        (n, 2, 0, program.PICKS),
        (n, 3, 0, program.PICKS),
    ]
    records = [
        program.record("embed", out=[0], weights=[0]),
        program.record("linear", out=[1], ins=[0], weights=[1]),
        program.record("kv_put", ins=[0, 1], cache=0),
        program.record("attend", out=[1], ins=[0], cache=0, scale=0.125, softcap=0.0),
        program.record("pick", out=[2], ins=[1]),
        program.record("linear", out=[3], ins=[2], weights=[2]),
    ]
    with Writer(
        path,
        meta={"model.vocab_size": n, "model.context_length": 64},
        slots=np.array(slots, program.SLOT_DTYPE),
        caches=np.array([(2, n // 2, n // 2, 0)], program.CACHE_DTYPE),
        program=np.array(records, program.OP_DTYPE),
        tensors=matrices,
    ) as writer:
        writer.write(0, "values", 0, tiles.pack_groups(rng.standard_normal((n, n)).astype(np.float32)))
        writer.write(1, "codes", 0, tiles.pack_codes(rng.integers(-127, 128, (n, n)).astype(np.int8), 8))
        writer.write(1, "scales", 0, tiles.pack_groups(rng.uniform(1e-3, 2e-3, (n, 2)).astype(np.float16)))
        writer.write(2, "codes", 0, tiles.pack_codes(rng.integers(0, 16, (n, n)).astype(np.uint8), 4))
        writer.write(2, "scales", 0, tiles.pack_groups(rng.integers(0, 256, (n, 2)).astype(np.uint8)))
        writer.write(2, "row", 0, tiles.pack_groups(np.full((n, 1), 180, np.uint8)))


def _core_class(row: dict[str, Any]) -> str:
    facts = [f"{row['max_mhz']} MHz"] if row["max_mhz"] else []
    facts += [f"capacity {row['capacity']}"] if row["capacity"] is not None else []
    return f"{len(row['cpus'])} x {row['name'] or 'core'}" + (f" ({', '.join(facts)})" if facts else "")


def _speed(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "not measured: halfbyte doctor --measure"
    values = {k: (measured[f"{k}_1"], measured[k]) for k in ("read_gb_per_s", "int8_gmac_per_s")}
    one, all_ = values["read_gb_per_s"]
    one8, all8 = values["int8_gmac_per_s"]
    return (
        f"reads {one:.1f} GB/s with one thread, {all_:.1f} with {measured['threads']};"
        f" int8 peak {one8:.0f} and {all8:.0f} GMAC/s ({measured['instruction']})"
        + ("; too low: other programs were running" if measured["processor_share"] < 0.9 else "")
    )


def _print(found: dict[str, Any]) -> None:
    machine = found["machine"]
    limits = [f"{machine['cpu_quota']:g} cpus by quota"] if machine["cpu_quota"] else []
    if machine["memory_limit"]:
        limits.append(f"{size(machine['memory_limit'])} of memory by limit")
    caches = ", ".join(f"{level} {size(n)}" for level, n in machine["caches"].items())
    rows = [
        ("halfbyte", found["halfbyte"]),
        (
            "processor",
            f"{machine['cpu']} ({machine['architecture']}), {machine['cpus']} cpus, {machine['cores']} cores",
        ),
        ("core classes", "; ".join(map(_core_class, machine["core_classes"])) or "unknown"),
        ("isa", " ".join(machine["isa"]) or "unknown"),
        ("caches", caches or "unknown"),
        ("speed", _speed(machine["measured"])),
        ("memory", f"{size(machine['memory'])}, {size(machine['memory_available'])} available"),
        ("limits", ", ".join(limits) or "none"),
        ("system", f"{machine['system']}, Python {machine['python']}"),
        ("packages", ", ".join(f"{k} {v or 'MISSING'}" for k, v in found["packages"].items())),
        ("native library", found["native_library"] or "none: the jit backend takes its place"),
        (
            "environment",
            " ".join(f"{k}={v}" for k, v in found["environment"].items()) or "no HALFBYTE_ variable is set",
        ),
    ]
    for key, value in rows:
        print(f"{key:<14}  {printable(value)}")
    print()
    table = []
    for b in found["backends"]:
        state = "works" if b["ok"] else "WRONG" if b["available"] else "not available"
        facts = b["why"] or ", ".join(
            f"{k} {v}"
            for k, v in b["details"].items()
            if k not in ("backend", "policy") and not isinstance(v, dict)
        )
        table.append((b["name"], state, f"{b['seconds']:.1f} s", facts))
    print_table(table, ("backend", "state", "time", "details"), "  r")
    for b in found["backends"]:
        if chosen := b["details"].get("kernels"):
            print()
            print_table(list(chosen.items()), (f"{b['name']} kernel", "chosen"))
