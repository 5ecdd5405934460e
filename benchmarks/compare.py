"""Run halfbyte and peers side by side on one model shape: workers, interleaved rounds, the tables, the record.

`compare_llamacpp.py` and `compare_openvino.py` say who the peers are; `compare_worker.py` is what runs in each.
All engines stay loaded, one works at a time, and every round measures each once: a machine that drifts does so
for all. Rates are tokens/s, medians over the rounds (smallest and largest are in the record).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import compare_shapes
import compare_worker
from compare_shapes import FOLDER, Shape

from halfbyte.formats.errors import HalfbyteError, UsageError

SHARED = FOLDER.parents[1] / "shared" / "data" / "configs"
CONFIGS = [SHARED / "Llama-3.2-1B-Instruct", FOLDER / "configs" / "Qwen3-0.6B.json"]
SETTLE_S = 0.3  # between engines: lets the threads of the one before fall asleep
ANSWER_S = 1800  # longest wait for one answer


@dataclass
class Variant:
    """One column of the table: a name, the command of its worker, its `load` options and environment.

    cold_only: measured for cold start and memory, not for speed.
    """

    name: str
    command: list[str]
    options: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    cold_only: bool = False


@dataclass(frozen=True)
class Measure:
    """One row of the table."""

    do: str
    tokens: int
    depth: int

    @property
    def name(self) -> str:
        """As the table and the record print it."""
        return f"{self.do} {self.tokens}" + (f" at {self.depth}" if self.depth else "")

    @property
    def length(self) -> int:
        """Positions that attention reads for one token, on average."""
        return self.depth + 1 + self.tokens // 2


class Worker:
    """A running engine. Its stderr goes to a log file, named when it fails."""

    def __init__(self, variant: Variant, log: Path):
        self.variant, self.log = variant, log
        self.started = time.perf_counter()
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                variant.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | variant.environment,
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One command, its answer. Raises HalfbyteError when the worker fails or says nothing for long."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            with selectors.DefaultSelector() as wait:
                wait.register(self.process.stdout, selectors.EVENT_READ)
                if not wait.select(ANSWER_S):
                    raise HalfbyteError(f"{self.variant.name}: no answer to {do} for {ANSWER_S} s")
            answer = json.loads(self.process.stdout.readline() or '{"error": "the process ended"}')
        except OSError as error:
            answer = {"error": error.strerror or str(error)}
        if "error" in answer:
            raise HalfbyteError(f"{self.variant.name}: {do}: {answer['error']} (log: {self.log})")
        return answer

    def load(self, seed: int) -> dict[str, Any]:
        """Open the model."""
        return self.ask("load", seed=seed, **self.variant.options)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


# ---- what is measured ------------------------------------------------------------------------------


def plan(depths: Iterable[int], prompt: int, tokens: int, prefill_depths: Iterable[int]) -> list[Measure]:
    """The rows: prefill at its depths, then decode at its own."""
    rows = [Measure("prefill", prompt, d) for d in sorted(set(prefill_depths))] if prompt else []
    return rows + [Measure("decode", tokens, d) for d in sorted(set(depths))]


def cold_start(variant: Variant, seed: int, log: Path, prompt: int, tokens: int) -> dict[str, float]:
    """A fresh process, page cache warm: seconds to the first token's logits, then memory after some work.

    cold_s counts from the start of the process, Python and its imports included; load_s from the engine's own
    start. MiB: `peak` is the largest resident set (mapped weights included), `private` what is no mapped file.
    """
    worker = Worker(variant, log)
    try:
        loaded = worker.load(seed)
        first = worker.ask("first")
        cold = time.perf_counter() - worker.started
        worker.ask("prefill", depth=0, tokens=prompt or 1)
        worker.ask("decode", depth=0, tokens=tokens)
        memory = worker.ask("memory")
    finally:
        worker.close()
    return {
        "cold_s": cold,
        "load_s": loaded["load_s"] + first["first_s"],
        "peak_mib": memory["peak"],
        "private_mib": memory["private"],
    }


def run_rounds(
    workers: dict[str, Worker], rows: list[Measure], rounds: int, say: Callable[[str], None]
) -> dict[str, dict[str, list[float]]]:
    """tokens/s of every round: {row: {engine: [...]}}. Each round measures every engine once a row."""
    out: dict[str, dict[str, list[float]]] = {row.name: {name: [] for name in workers} for row in rows}
    for number in range(rounds):
        for row in rows:
            for name, worker in workers.items():
                time.sleep(SETTLE_S)
                took = worker.ask(row.do, depth=row.depth, tokens=row.tokens)["seconds"]
                out[row.name][name].append(row.tokens / took)
            rates = ", ".join(f"{name} {v[-1]:.1f}" for name, v in out[row.name].items())
            say(f"round {number + 1}/{rounds}  {row.name}: {rates}")
    return out


def machine_speed() -> dict[str, Any]:
    """Read bandwidth and int8 peak now; devices.bandwidth in a process of its own."""
    code = (
        "import json, dataclasses; from halfbyte.devices.bandwidth import measure;"
        " s = measure(); print(json.dumps(dataclasses.asdict(s) | {'busy': s.busy}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise HalfbyteError(f"the machine's speed cannot be measured: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


# ---- arithmetic of the tables ----------------------------------------------------------------------


def summary(samples: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """{row: {engine: {median, min, max}}}; an engine without samples is left out."""
    return {
        row: {
            name: {"median": statistics.median(v), "min": min(v), "max": max(v)}
            for name, v in engines.items()
            if v
        }
        for row, engines in samples.items()
    }


def ratios(
    table: dict[str, dict[str, dict[str, float]]], ours: str, peers: list[str]
) -> dict[str, dict[str, float]]:
    """How many times better `ours` is: {row: {peer: ratio, 'best peer': the smallest}}, of medians.

    Rates are better when larger; rows in seconds (`_s`) and MiB (`_mib`) when smaller.
    """
    out: dict[str, dict[str, float]] = {}
    for row, engines in table.items():
        less = row.endswith(("_s", "_mib"))
        found = {}
        for peer in peers:
            if peer in engines and ours in engines:
                mine, other = engines[ours]["median"], engines[peer]["median"]
                found[peer] = other / mine if less else mine / other
        if found:
            out[row] = {**found, "best peer": min(found.values())}
    return out


def shares(
    table: dict[str, dict[str, dict[str, float]]],
    rows: list[Measure],
    ours: str,
    facts: dict[str, Any],
    speed: dict[str, Any],
) -> dict[str, dict[str, float]]:
    """What halfbyte makes of the machine, by medians.

    Decode: GB/s of weights and of the keys and values read, over the read bandwidth. Prefill: the matrices'
    multiply-adds (no logits, no attention) over the int8 peak.
    """
    out = {}
    for row in rows:
        rate = table[row.name][ours]["median"]
        if row.do == "decode":
            used = rate * (facts["weight_bytes"] + facts["kv_bytes"][str(row.length)]) / 1e9
            out[row.name] = {"read_gb_per_s": used, "share": used / speed["read_gb_per_s"]}
        else:
            used = rate * facts["prefill_macs"] / 1e9
            out[row.name] = {"int8_gmac_per_s": used, "share": used / speed["int8_gmac_per_s"]}
    return out


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- the whole run ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every comparison has."""
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        default=CONFIGS,
        metavar="DIR",
        help="folders with a config.json, or such files",
    )
    parser.add_argument(
        "--work", type=Path, default=Path.home() / ".cache" / "halfbyte-bench", help="where models are kept"
    )
    parser.add_argument(
        "--depths", type=numbers, default=[0, 2048, 8192], help="decode at (default: 0,2048,8192)"
    )
    parser.add_argument(
        "--prefill-depths", type=numbers, default=[0, 4096], help="prefill at (default: 0,4096)"
    )
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prefill; 0: none")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a decode")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", type=int, default=3, metavar="N", help="cold starts of each; 0: none")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--recipes", type=names, default=["q4"], help="of halfbyte, the first leads the ratios"
    )
    parser.add_argument("--kv", default="auto", help="halfbyte's cache")
    parser.add_argument("--backend", help="of halfbyte")
    parser.add_argument("--isa", default="", help="force halfbyte's kernels (HALFBYTE_ISA), such as avx2")
    parser.add_argument(
        "--prepare", action="store_true", help="make the models and filled caches, measure nothing"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the record there")


def numbers(text: str) -> list[int]:
    """'0,2048' as numbers, none negative."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 0:
        raise ValueError(text)
    return found


def names(text: str) -> list[str]:
    """'a,b' as names without repetition."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what no run can do."""
    if args.prompt < 0 or args.tokens < 1 or args.rounds < 1 or args.threads < 1 or args.cold < 0:
        raise UsageError("--prompt and --cold are at least 0; --tokens, --rounds and --threads at least 1")
    if max(args.prompt, args.tokens) > compare_worker.FIRST_ROOM:
        raise UsageError(f"--prompt and --tokens are at most {compare_worker.FIRST_ROOM}")
    if not args.recipes:
        raise UsageError("--recipes names none")
    if not os.access(args.python, os.X_OK):
        raise UsageError(f"--python {args.python}: not an interpreter")


def run(
    args: argparse.Namespace, title: str, peers: Callable[[argparse.Namespace, Shape], list[Variant]]
) -> None:
    """Everything for each shape; `peers` prepares the peers' models and names their variants."""
    check(args)
    records = []
    for config in args.config:
        shape = compare_shapes.shape(config, args.work, args.seed)
        print(f"{shape.name}: preparing in {shape.folder}", file=sys.stderr)
        ours = [_halfbyte(args, shape, recipe) for recipe in args.recipes]
        others = peers(args, shape)
        records.append(_measure(args, title, shape, ours, others))
        if not args.prepare:
            print(report(records[-1]), flush=True)
            if args.json:
                text = json.dumps(records, indent=1)
                compare_shapes.replace(args.json, lambda part, text=text: part.write_text(text))


def _halfbyte(args: argparse.Namespace, shape: Shape, recipe: str) -> Variant:
    lengths = [row.length for row in _plan(args) if row.do == "decode"]
    options = {
        "path": str(compare_shapes.hb(shape, recipe)), "threads": args.threads, "kv": args.kv,
        "backend": args.backend, "lengths": lengths,
    }  # fmt: skip
    command = [sys.executable, str(FOLDER / "engine_halfbyte.py")]
    isa = {"HALFBYTE_ISA": args.isa} if args.isa else {}
    return Variant(f"halfbyte {recipe}", command, options, isa)


def _plan(args: argparse.Namespace) -> list[Measure]:
    return plan(args.depths, args.prompt, args.tokens, args.prefill_depths)


def _measure(
    args: argparse.Namespace, title: str, shape: Shape, ours: list[Variant], others: list[Variant]
) -> dict[str, Any]:
    from halfbyte.runtime.bench import commit, machine_name

    def say(text: str) -> None:
        print(f"{shape.name}: {text}", file=sys.stderr, flush=True)

    started, clock = datetime.now(timezone.utc), time.perf_counter()
    log = shape.folder / "workers.log"
    log.unlink(missing_ok=True)
    rows = _plan(args)
    depths, room = [row.depth for row in rows], max(args.prompt, args.tokens + 1, compare_worker.WARM_TOKENS)
    samples: dict[str, dict[str, list[float]]] = {}
    speeds = [] if args.prepare else [machine_speed()]
    for number in range(0 if args.prepare else args.cold):
        for variant in [*ours, *others]:
            for key, value in cold_start(variant, args.seed, log, args.prompt, args.tokens).items():
                samples.setdefault(key, {}).setdefault(variant.name, []).append(value)
        say(f"cold starts {number + 1}/{args.cold}")
    workers: dict[str, Worker] = {}
    facts: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        for variant in [*ours, *others]:
            if variant.cold_only or (args.prepare and "states" not in variant.options):
                continue
            workers[variant.name] = worker = Worker(variant, log)
            stack.callback(worker.close)
            facts[variant.name] = worker.load(args.seed)["facts"]
            took = worker.ask("fill", depths=depths, room=room)["fill_s"]
            say(f"{variant.name}: caches filled in {took:.0f} s")
        if args.prepare:
            return {}
        samples = run_rounds(workers, rows, args.rounds, say) | samples
    speeds.append(machine_speed())
    table = summary(samples)
    first = ours[0].name
    speed = max(speeds, key=lambda s: float(s["read_gb_per_s"]))
    return {
        "title": title, "shape": shape.name, "config": shape.config, "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - clock), "machine": machine_name(), "commit": commit(),
        "threads": args.threads, "rounds": args.rounds, "seed": args.seed, "load_average": os.getloadavg(),
        "speed": speeds, "engines": facts, "table": table, "samples": samples, "ours": [v.name for v in ours],
        "ratios": ratios(table, first, [v.name for v in others]),
        "shares": {v.name: shares(table, rows, v.name, facts[v.name], speed) for v in ours},
    }  # fmt: skip


UNITS = {
    "cold_s": "cold start, s (process to first token)",
    "load_s": "cold start, s (of it, after imports)",
    "peak_mib": "memory, MiB (largest resident set)",
    "private_mib": "memory, MiB (private)",
}


UNPRINTED = ("vocab_size", "kv_bytes", "prefill_macs", "kernels", "library")  # facts for the record only


def report(record: dict[str, Any]) -> str:
    """The record as text: settings, medians (and the slowest or largest), ratios, shares."""
    table = record["table"]
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    lines = [
        f"\n## {record['title']}, {record['shape']} shape, random weights",
        f"{record['machine']}; {record['threads']} threads; commit {record['commit']}; {record['started']};"
        f" {record['rounds']} interleaved rounds; {record['seconds']} s",
        "Tokens/s, medians (smallest round). Feeding token ids and computing the last logits, no tokenizer, no"
        " sampling; depth: the cache really holds that many tokens.",
    ]
    for speed in record["speed"]:
        lines.append(
            f"machine: reads {speed['read_gb_per_s']} GB/s ({speed['threads']} threads), int8 peak"
            f" {speed['int8_gmac_per_s']} GMAC/s ({speed['instruction']})"
            + ("; OTHER PROGRAMS RAN: not a quiet machine" if speed["busy"] else "")
        )
    for name, facts in record["engines"].items():
        kept = {k: v for k, v in facts.items() if k not in UNPRINTED}
        lines.append(f"{name}: " + ", ".join(f"{k} {v}" for k, v in kept.items()))

    def cell(row: str, name: str) -> str:
        found = table[row].get(name)
        if not found:
            return ""
        digits = 2 if row.endswith("_s") else 0 if row.endswith("_mib") else 1
        worst = found["max"] if row in UNITS else found["min"]
        return f"{found['median']:.{digits}f} ({worst:.{digits}f})"

    body = [[UNITS.get(row, row), *(cell(row, name) for name in columns)] for row in table]
    lines += ["", markdown(["", *columns], body), "", f"How many times better {record['ours'][0]} is:", ""]
    peers = [name for name in columns if name not in record["ours"]] + ["best peer"]
    body = [
        [UNITS.get(row, row), *(f"{found[p]:.2f}" if p in found else "" for p in peers)]
        for row, found in record["ratios"].items()
    ]
    lines += [markdown(["", *peers], body), ""]
    for name, rows in record["shares"].items():
        for row, found in rows.items():
            (unit, used), (_, share) = found.items()
            of = "read bandwidth" if unit == "read_gb_per_s" else "int8 peak"
            lines.append(f"{name}, {row}: {used:.1f} {unit}, {100 * share:.0f} % of the {of}")
    return "\n".join(lines)


def main(run_with: Callable[[], None]) -> None:
    """Run; an error that a user can cause is one line and exit status 2."""
    try:
        run_with()
    except HalfbyteError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
