"""Speed of a file on this machine."""

from __future__ import annotations

import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.devices.fit import of_file
from halfbyte.formats import kv_modes
from halfbyte.formats.errors import UsageError
from halfbyte.runtime.model import load

REPEATS = 3


def bench(
    path: str,
    *,
    prompt: int = 512,
    tokens: int = 64,
    depth: int = 0,
    threads: int | None = None,
    kv: str = "auto",
    backend: str | None = None,
    policy: str | None = None,
) -> dict[str, Any]:
    """Median of three: prefill of `prompt` tokens and decode of `tokens`, both after `depth` tokens.

    Token ids are random (seeded): speed does not depend on them. read_gb_per_s counts the weights and the
    cache that one decoded token reads. Raises UsageError when the context is too short.
    """
    start = time.perf_counter()
    model = load(path, backend, threads, kv, policy)
    load_ms = 1e3 * (time.perf_counter() - start)
    if min(prompt, depth) < 0 or tokens < 1 or depth + max(prompt, tokens + 1) > model.context_length:
        raise UsageError(
            f"{depth} + {max(prompt, tokens + 1)} tokens do not fit the context of {model.context_length};"
            " lower -p, -n or -d"
        )
    ids = np.random.default_rng(0).integers(0, model.vocab_size, depth + max(prompt, tokens) + 1).tolist()
    session = model.session()
    session.feed(ids[: depth or 1])  # also compiles and faults in the weights
    session.rewind(session.position - depth)
    prefill, decode = [], []
    for _ in range(REPEATS):
        if prompt:
            start = time.perf_counter()
            session.feed(ids[depth : depth + prompt])
            prefill.append(prompt / (time.perf_counter() - start))
            session.rewind(prompt)
        session.feed(ids[depth : depth + 1])
        start = time.perf_counter()
        for i in range(tokens):
            session.feed(ids[depth + 1 + i : depth + 2 + i])
        decode.append(tokens / (time.perf_counter() - start))
        session.rewind(tokens + 1)
    rate = statistics.median(decode)
    load_of = of_file(model.file)
    weights, cache = load_of.read, load_of.kv_read(depth + 1 + tokens // 2, model.kv_mode)
    modes = kv_modes.by_cache(model.kv_mode, len(model.file.caches))
    bits = statistics.mean(
        m.bits_per_value(int(c["k_dim"]), int(c["v_dim"])) for m, c in zip(modes, model.file.caches)
    )
    return {
        "file": str(path),
        "prompt": prompt,
        "tokens": tokens,
        "depth": depth,
        "kv": model.kv_mode,
        "prefill_tokens_per_s": statistics.median(prefill) if prefill else None,
        "decode_tokens_per_s": rate,
        "weight_bytes_per_token": weights,
        "kv_bits_per_value": bits,
        "read_gb_per_s": rate * (weights + cache) / 1e9,
        "peak_rss_mb": peak_rss_mb(),
        "private_mb": private_mb(),
        "load_ms": load_ms,
        **model.backend.describe(),
        "machine": machine_name(),
        "commit": commit(),
    }


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in MiB (mapped weights included)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def private_mb() -> float | None:
    """Memory that this process shares with nobody, in MiB; None where the system does not say.

    Private_Clean + Private_Dirty of /proc/self/smaps_rollup (proc(5), Linux). Pages of the mapped weights
    count while no other process has them mapped.
    """
    try:
        rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return sum(
        int(row.split()[1]) for row in rows if row.startswith(("Private_Clean:", "Private_Dirty:"))
    ) / (1 << 10)


def machine_name() -> str:
    """Processor, core count and system, as a results file wants them."""
    from halfbyte.devices.probe import probe

    facts = probe()
    return f"{facts['cpu']}, {facts['cpus']} cpus, {platform.system()} {platform.machine()}"


def commit() -> str:
    """Short commit of the source tree, or the package's version outside one."""
    import halfbyte

    root = Path(halfbyte.__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return halfbyte.__version__
    return found.stdout.strip() if found.returncode == 0 else halfbyte.__version__
