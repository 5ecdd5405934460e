"""What a machine will do with a file: memory needed, the largest context, expected tokens/s and what bounds them.

Decoding one token reads every weight and every stored key and value once, so its time is at least their bytes over
the read bandwidth; it also takes the multiply-adds over the peak. The larger of the two bounds it, and a fixed
cost a step is added. The shares below are estimates for this project's kernels: predictions, not promises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from halfbyte.formats import kv_gate, kv_modes
from halfbyte.formats.container import File
from halfbyte.formats.encodings import BY_NAME
from halfbyte.formats.errors import UsageError
from halfbyte.formats.ops import BY_NAME as OPS
from halfbyte.formats.program import PICKS
from halfbyte.formats.tiles import P16, align

from .machine import Machine

DEFAULT_CONTEXT = 4096
CHUNK = 288  # rows of a prompt that are in memory at once
OVERHEAD = 64_000_000  # bytes of Python, NumPy and the compiled library
TOKENIZER_FACTOR = 8  # bytes of a loaded tokenizer for one of its JSON
STEP_S, RECORD_S = 100e-6, 1e-6  # seconds a step and a record cost beside the kernels
DECODE_SHARE = 0.25  # of the int8 peak for one row: unpacking codes takes most instructions
PREFILL_SHARE = 0.5  # of the int8 peak for many rows
FLOAT_SHARE = 0.25  # of the float peak, in attention and float matrices
MAX_PARAMETERS, MAX_CONTEXT = 1e13, 1 << 24


@dataclass(frozen=True)
class Cache:
    """Keys and values of one layer: numbers stored a position, window (0 = all), multiply-adds a position read."""

    values: int
    window: int
    macs: int
    heads: int = 0
    k_dim: int = 64
    v_dim: int = 64

    def nbytes(self, positions: int, mode: kv_modes.Mode) -> int:
        """Bytes of the first positions; heads are of 64 columns where they are not known."""
        heads = self.heads or self.values / (self.k_dim + self.v_dim)
        first, other = (mode.head_bytes(page, self.k_dim, self.v_dim) for page in (0, 1))
        early = min(positions, kv_modes.PAGE)
        return math.ceil(heads * (early * first + (positions - early) * other) / kv_modes.PAGE)

    def rows(self, length: int) -> int:
        """Positions that attention reads at this length."""
        return min(length, self.window or length)


@dataclass(frozen=True)
class Load:
    """What a model asks of a machine. Bytes, and multiply-adds for one token.

    weights: mapped; read: touched by a decoded token; int8_macs, f32_macs: of the matrices; prefill_macs: those
    of a prompt's token (no logits); activations: of CHUNK rows; context: the model's own limit.
    """

    name: str
    weights: int
    read: int
    int8_macs: int
    f32_macs: int
    prefill_macs: int
    caches: tuple[Cache, ...]
    activations: int
    overhead: int
    records: int
    context: int
    kv: str

    def kv_bytes(self, length: int, kv: str) -> int:
        """Bytes held by keys and values at this length: all positions, also those beyond a window."""
        return sum(c.nbytes(length, m) for c, m in zip(self.caches, kv_modes.by_cache(kv, len(self.caches))))

    def kv_read(self, length: int, kv: str) -> int:
        """Bytes of keys and values that a decoded token reads at this length."""
        modes = kv_modes.by_cache(kv, len(self.caches))
        return sum(c.nbytes(c.rows(length), m) for c, m in zip(self.caches, modes))

    def attention_macs(self, length: int) -> int:
        """Multiply-adds of attention for one token at this length."""
        return sum(c.rows(length) * c.macs for c in self.caches)


def of_file(file: File) -> Load:
    """The load of an open file."""
    embed, linear, attend = (OPS[name].code for name in ("embed", "linear", "attend"))
    widths = [int(s["width"]) for s in file.slots]
    read = sum(t.nbytes for t in file.tensors if t.tile != P16)
    multiplied: set[int] = set()
    embedded: set[int] = set()
    int8 = f32 = prefill = 0
    cache_macs = [0] * len(file.caches)
    for r in file.program:
        code, first = int(r["code"]), int(r["w"][0])
        if code == embed:
            embedded.add(first)
        elif code == linear:
            tensor = file.tensors[first]
            macs = math.prod(tensor.shape)
            multiplied.add(first)
            if BY_NAME[tensor.encoding].is_integer:
                int8 += macs
            else:
                f32 += macs
            if int(file.slots[int(r["out"][0])]["rows"]) != PICKS:
                prefill += macs
        elif code == attend:
            cache_macs[int(r["attr"][0])] += widths[int(r["in"][0])] + widths[int(r["out"][0])]
    read += sum(file.tensors[i].nbytes for i in multiplied)
    read += sum(file.tensors[i].nbytes // file.tensors[i].shape[0] for i in embedded - multiplied)
    tokenizer = file.sections["TOKN"][1] if "TOKN" in file.sections else 0
    context = file.metadata["model.context_length"]
    assert isinstance(context, int)
    return Load(
        name=str(file.path),
        weights=len(file.bytes),
        read=read,
        int8_macs=int8,
        f32_macs=f32,
        prefill_macs=prefill,
        caches=tuple(
            Cache(
                int(c["kv_heads"]) * (int(c["k_dim"]) + int(c["v_dim"])),
                int(c["window"]),
                macs,
                *(int(c[name]) for name in ("kv_heads", "k_dim", "v_dim")),
            )
            for c, macs in zip(file.caches, cache_macs)
        ),
        activations=_activations(file.slots),
        overhead=OVERHEAD + TOKENIZER_FACTOR * tokenizer,
        records=len(file.program),
        context=context,
        kv=kv_gate.automatic(file),
    )


def _activations(slots: np.ndarray) -> int:
    """Bytes of all base slots for CHUNK rows and one picked row, each from a cache line on."""
    total = 0
    for i, s in enumerate(slots):
        if int(s["base"]) == i:
            total += align((1 if int(s["rows"]) == PICKS else CHUNK) * int(s["width"]) * 4)
    return total


def of_size(parameters: float, bits: float, kv_values: int | None = None) -> Load:
    """The load of a model that does not exist yet: its size and bits a weight.

    kv_values: numbers stored a token, as `halfbyte info` prints them; by default 0.73 sqrt(parameters), which is
    what Llama-3-8B has. Activations are scaled from Llama-3.2-1B the same way. Raises UsageError when out of range.
    """
    if not 1 <= parameters <= MAX_PARAMETERS or not 0.5 <= bits <= 32:
        raise UsageError(f"{parameters:g} parameters of {bits:g} bits: give 1 to 1e13, and 0.5 to 32 bits")
    if kv_values is not None and not 0 < kv_values <= 1 << 24:
        raise UsageError(f"{kv_values} numbers a token: give 1 to {1 << 24}")
    count, root = int(parameters), math.sqrt(parameters)
    values = kv_values or max(1, round(0.73 * root))
    nbytes = math.ceil(count * bits / 8)
    return Load(
        name=f"{parameters:g} parameters of {bits:g} bits",
        weights=nbytes,
        read=nbytes,
        int8_macs=count if bits < 16 else 0,
        f32_macs=0 if bits < 16 else count,
        prefill_macs=count,
        caches=(Cache(values, 0, 4 * values),),  # four queries share a key, as in most models
        activations=round(1000 * root),
        overhead=OVERHEAD,
        records=200,
        context=MAX_CONTEXT,
        kv="k8v8",
    )


def fit(load: Load, machine: Machine, context: int | None = None, kv: str = "auto") -> dict[str, Any]:
    """What this machine will do with this load: the object that `halfbyte fit --json` prints.

    context: tokens (default: 4096 or the model's own, if less). kv: 'auto' or a mode. Speeds are
    expected tokens/s at depth 0 and with the whole context stored, None where the model does not fit.
    Raises UsageError for an unknown mode or a context longer than the model's.
    """
    kv = load.kv if kv == "auto" else kv
    kv_modes.by_cache(kv, len(load.caches))
    context = min(DEFAULT_CONTEXT, load.context) if context is None else context
    if not 1 <= context <= load.context:
        raise UsageError(f"a context of {context} tokens: the model's is 1 to {load.context}")
    fixed = load.weights + load.activations + load.overhead
    needed = fixed + load.kv_bytes(context, kv)
    fits = needed <= machine.memory
    page = kv_modes.PAGE
    a_token = max(1, (load.kv_bytes(2 * page, kv) - load.kv_bytes(page, kv)) // page) if load.caches else 0
    room = max(0, machine.memory - fixed)
    largest = min(load.context, room // a_token) if a_token else load.context if room else 0
    return {
        "load": load.name,
        "machine": {
            "name": machine.name,
            "cpu": machine.cpu,
            "cores": machine.cores,
            "read_gb_per_s": machine.bandwidth / 1e9,
            "int8_gmac_per_s": machine.int8_peak / 1e9,
            "f32_gmac_per_s": machine.f32_peak / 1e9,
            "measured": machine.measured,
            "source": machine.source,
        },
        "kv": kv,
        "context": context,
        "memory": {
            "weights": load.weights,
            "kv": load.kv_bytes(context, kv),
            "activations": load.activations,
            "overhead": load.overhead,
            "needed": needed,
            "available": machine.memory,
        },
        "fits": fits,
        "largest_context": largest,
        "decode": [_decode(load, machine, depth, kv, fits) for depth in (0, context)],
        "prefill_tokens_per_s": _prefill(load, machine) if fits else None,
    }


def _decode(load: Load, machine: Machine, depth: int, kv: str, fits: bool) -> dict[str, Any]:
    """One decoded token that reads `depth` stored positions."""
    nbytes = load.read + load.kv_read(depth, kv)
    seconds = {
        "memory bandwidth": nbytes / machine.bandwidth,
        "arithmetic": load.int8_macs / (machine.int8_peak * DECODE_SHARE)
        + (load.f32_macs + load.attention_macs(depth)) / (machine.f32_peak * FLOAT_SHARE),
        "fixed cost of a step": STEP_S + RECORD_S * load.records,
    }
    bound = max(seconds, key=lambda k: seconds[k])
    total = seconds["fixed cost of a step"] + max(seconds["memory bandwidth"], seconds["arithmetic"])
    return {
        "depth": depth,
        "read_bytes": nbytes,
        "tokens_per_s": 1 / total if fits else None,
        "bound": bound if fits else "memory size",
        "seconds": seconds,
    }


def _prefill(load: Load, machine: Machine) -> float | None:
    """Tokens/s of a long prompt at depth 0: arithmetic only."""
    int8 = load.prefill_macs if load.int8_macs else 0
    seconds = int8 / (machine.int8_peak * PREFILL_SHARE)
    seconds += (load.prefill_macs - int8) / (machine.f32_peak * FLOAT_SHARE)
    return 1 / seconds if seconds else None
