"""Predicted cycles of the inner loops of LINEAR on ARM cores, by llvm-mca over the cross-built library.

    make native-arm && python benchmarks/arm_cycles.py [--json]

llvm-mca models ports and latencies with every load in the first cache, so a prediction is a limit of the core, not a
measurement. For decode it is set against the memory of a board with that core (devices/profiles): `memory` is the
share of what the board's memory delivers that `cores` such cores can consume; at 1 decode is bound by memory alone.
Where LLVM has no detailed model of a core, its nearest relative stands in (`model`).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from halfbyte.devices.machine import load_profile
from halfbyte.formats.errors import HalfbyteError, UsageError

OBJECTS = Path("build/native-arm/CMakeFiles/halfbyte.dir/kernels/linear")
ROWS, COLS = 16, 32  # what one round of a decode loop covers; prefill takes several tokens by half the rows
BYTES = {"q4": ROWS * COLS // 2 + ROWS, "q8": ROWS * COLS + 2 * ROWS}  # codes and scales
MACS = {"smull": 8, "smull2": 8, "smlal": 8, "smlal2": 8, "sdot": 16, "smmla": 32}  # of one instruction
# core, llvm's model, GHz, cores of that kind, a machine of devices/profiles for the bandwidth, kernels
CORES = [
    ("Cortex-A55", "cortex-a55", 1.8, 4, "rk3588", ("neon", "dotprod")),
    ("Cortex-A76", "neoverse-n1", 2.4, 4, "raspberry-pi-5", ("neon", "dotprod")),
    ("Cortex-X4", "neoverse-v2", 3.3, 1, "snapdragon-8-gen-3", ("dotprod", "i8mm")),
]

Instruction = tuple[int, str, str]


def find(name: str) -> str:
    """A tool, the newest version of it. Raises UsageError when it is absent."""
    for candidate in (*(f"{name}-{v}" for v in range(29, 15, -1)), name):
        if path := shutil.which(candidate):
            return path
    raise UsageError(f"{name} is not installed (Debian: llvm-19 binutils-aarch64-linux-gnu)")


def disassemble(path: Path) -> dict[str, list[Instruction]]:
    """Functions of an object file: address, mnemonic and operands of each instruction."""
    if not path.is_file():
        raise UsageError(f"{path} is not there; run `make native-arm`")
    text = subprocess.run(
        [find("aarch64-linux-gnu-objdump"), "-d", "--no-show-raw-insn", str(path)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    functions: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if m := re.match(r"[0-9a-f]+ <(.+)>:", line):
            functions[m[1]] = current = []
        elif m := re.match(r"\s+([0-9a-f]+):\t(\S+)\s*(.*)", line):
            current.append((int(m[1], 16), m[2], m[3].split(" //")[0].split("\t//")[0]))
    return functions


def inner_loops(body: list[Instruction]) -> list[list[Instruction]]:
    """The loops of a function that hold no other loop."""
    index = {address: i for i, (address, _, _) in enumerate(body)}
    spans = []
    for end, (_, mnemonic, operands) in enumerate(body):
        target = re.search(r"([0-9a-f]+) <", operands)
        if mnemonic.startswith(("b.", "cb", "tb")) or mnemonic == "b":
            start = index.get(int(target[1], 16)) if target else None
            if start is not None and start <= end:
                spans.append((start, end))
    inside = [(a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]
    return [body[a : b + 1] for a, b in inside]


def cycles(loop: list[Instruction], model: str) -> float:
    """Cycles of one round, in the steady state."""
    lines = []
    for _, mnemonic, operands in loop:
        lines.append(f"{mnemonic} {re.sub(r'([0-9a-f]+) <.*>', '#8', operands)}")
    out = subprocess.run(
        [find("llvm-mca"), "-mtriple=aarch64", f"-mcpu={model}", "-mattr=+dotprod,+i8mm", "-iterations=200"],
        input="\n".join(lines), capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    total = re.search(r"Total Cycles:\s+(\d+)", out)
    assert total is not None, out
    return int(total[1]) / 200


def measure() -> list[dict[str, Any]]:
    """One dict a core, kernel, encoding and phase."""
    out = []
    for core, model, ghz, count, board, isas in CORES:
        bandwidth = load_profile(board).bandwidth / 1e9
        for isa in isas:
            functions = disassemble(OBJECTS / f"linear_arm_{isa}.c.o")
            for encoding in ("q4", "q8"):
                one = {"decode": f"hb_linear_{encoding}_{isa}", "prefill": "blocked_32"}
                for phase, function in one.items():
                    loops = {}  # by multiply-adds of a round
                    for loop in inner_loops(functions[function]):
                        loops[sum(MACS.get(mnemonic, 0) for _, mnemonic, _ in loop)] = loop
                    macs = ROWS * COLS if phase == "decode" else max(loops)
                    n = cycles(loops[macs], model)
                    row: dict[str, Any] = {
                        "core": core, "model": model, "isa": isa, "encoding": encoding, "phase": phase,
                        "macs": macs, "instructions": len(loops[macs]), "cycles": round(n, 1),
                        "gmac_per_s": round(macs / n * ghz, 1),
                    }  # fmt: skip
                    if phase == "decode":
                        gb_per_s = BYTES[encoding] / n * ghz * count
                        row |= {
                            "gb_per_s": round(BYTES[encoding] / n * ghz, 1),
                            "cores": count,
                            "board": board,
                        }
                        row["memory"] = round(min(1.0, gb_per_s / bandwidth), 2)
                    out.append(row)
    return out


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        rows = measure()
    except HalfbyteError as error:
        sys.exit(str(error))
    if args.json:
        print(json.dumps(rows))
        return
    for r in rows:
        text = f"{r['core']:11} {r['isa']:8} {r['encoding']} {r['phase']:8} {r['macs']:5} multiply-adds"
        text += f" {r['instructions']:4} instructions {r['cycles']:7.1f} cycles {r['gmac_per_s']:7.1f} GMAC/s"
        if r["phase"] == "decode":
            text += f" {r['gb_per_s']:6.1f} GB/s a core; {r['cores']} on {r['board']}: {r['memory']:.0%} of its memory"
        print(text)


if __name__ == "__main__":
    main()
