"""Parity: two backends, or two policies, over one file, op by op and in free running, held against a stated bound.

*Lockstep* gives every record of B the inputs that A had, so an error is that record's own. *Free running* lets each
go its own way over the same tokens: that is what a user would see.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from halfbyte.formats.container import File
from halfbyte.formats.errors import UsageError
from halfbyte.formats.ops import BY_CODE
from halfbyte.runtime.backends import backend_class
from halfbyte.runtime.backends.backend import operands
from halfbyte.runtime.evaluate import log_softmax
from halfbyte.runtime.lockstep import lockstep
from halfbyte.runtime.model import Model, load

WORST = 10  # records that are named


@dataclass(frozen=True)
class Bound:
    """What two runs may differ by: logits relative to the largest of a row, and the mean KL in nats per token.

    why: where the numbers come from.
    """

    logits: float
    kld: float
    why: str

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


_ROUNDING = "the same numbers, summed in another order"
# By the two policies, in alphabetical order. Bounds of unequal policies hold for models that were trained; one that
# was not, or a far lower-bit file, may pass them without a fault of either side.
BOUNDS = {
    ("f32", "f32"): Bound(1e-3, 1e-6, _ROUNDING),
    ("i8g32", "i8g32"): Bound(
        0.05,
        1e-3,
        "identical integers from identical inputs; a float step whose last bit "
        "differs may still flip the rounding of an activation",
    ),
    ("bf16", "bf16"): Bound(0.05, 1e-3, "sums in another order may round to the neighbouring bf16"),
    ("f8", "f8"): Bound(0.1, 5e-3, "one bf16 step away, an activation may round to the neighbouring E4M3"),
    ("f32", "i8g32"): Bound(0.1, 5e-3, "activations of 8 bits per 32 columns"),
    ("bf16", "f32"): Bound(0.1, 5e-3, "8 bits of mantissa"),
    ("bf16", "i8g32"): Bound(0.15, 1e-2, "both roundings"),
    ("f32", "f8"): Bound(0.5, 5e-2, "weights and activations of 4 bits of significand"),
    ("bf16", "f8"): Bound(0.5, 5e-2, "weights and activations of 4 bits of significand"),
    ("f8", "i8g32"): Bound(0.5, 5e-2, "weights and activations of 4 bits of significand"),
}


def bound_of(a: str, b: str) -> Bound:
    """The bound of two policies."""
    first, second = sorted((a, b))
    return BOUNDS[first, second]


def compare(
    path: str | os.PathLike[str],
    a: tuple[str, str],
    b: tuple[str, str],
    *,
    kv: str = "f16",
    text: str | None = None,
    tokens: int = 256,
    steps: int = 64,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Hold (backend, policy) b against a.

    kv: how both keep keys and values. text: what both read, up to `tokens` tokens; without one, or without a
    tokenizer, seeded random ids. steps: tokens of greedy decoding after the first eighth of it.

    Returns ok, checks (name -> value, bound, ok), bound, lockstep (a row an op and encoding), worst (records with the
    largest error), logits (the relative error of every position), kld_mean, kld_max, top1_agreement and
    first_divergence (the first greedy token that differs, or None). Raises UsageError for an unknown backend or policy.
    """
    say = progress or (lambda _: None)
    models = [load(path, backend, threads, kv, policy) for backend, policy in (a, b)]
    file, bound = models[0].file, bound_of(a[1], b[1])
    say("op by op")
    by_record: dict[int, float] = {}
    first = backend_class(a[0])(file, a[1], threads)
    rows = lockstep(file, b[0], b[1], seed, threads, kv="f32", against=first, by_record=by_record)
    say("free running")
    ids = _ids(models[0], text, tokens, seed)
    start = max(1, len(ids) // 8)
    ours, theirs = ([m.session().feed_all(ids) for m in models]) if len(ids) else (np.zeros((0, 1)),) * 2
    logs = [log_softmax(x) for x in (ours, theirs)]
    kld = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1)
    error = np.abs(ours.astype(np.float64) - theirs).max(axis=1) / np.abs(ours).max(axis=1)
    say("greedy decoding")
    steps = min(steps, models[0].context_length - start)
    greedy = [_greedy(m, ids[:start], steps) for m in models]
    differs = next((i for i, (x, y) in enumerate(zip(*greedy)) if x != y), None)
    checks = {
        "logits": {"value": float(error.max()), "bound": bound.logits},
        "kld_mean": {"value": float(kld.mean()), "bound": bound.kld},
    }
    if a[1] == b[1]:  # with unequal policies the rounding of a record is what is being looked at
        worst = max(rows, key=lambda o: o.worst / o.tolerance if o.tolerance else o.worst)
        checks["lockstep"] = {"value": worst.worst, "bound": worst.tolerance}
    for check in checks.values():
        check["ok"] = bool(check["value"] <= check["bound"])  # NaN is not
    return {
        "file": str(path), "digest": file.digest.hex(), "kv": models[0].kv_mode, "tokens": len(ids),
        "a": {**models[0].backend.describe(), "policy": a[1]}, "b": {**models[1].backend.describe(), "policy": b[1]},
        "ok": all(c["ok"] for c in checks.values()), "checks": checks, "bound": bound.as_dict(),
        "kld_mean": float(kld.mean()), "kld_max": float(kld.max()),
        "top1_agreement": float((ours.argmax(1) == theirs.argmax(1)).mean()),
        "greedy_tokens": steps, "first_divergence": differs,
        "lockstep": [o.as_dict() for o in rows], "worst": _worst(file, by_record),
        "logits": [float(f"{e:.4g}") for e in error],
    }  # fmt: skip


def _ids(model: Model, text: str | None, tokens: int, seed: int) -> list[int]:
    """Ids of the text, or random ones."""
    tokens = min(tokens, model.context_length)
    if text is not None:
        ids = model.tokenizer.encode(text)[:tokens]
        if len(ids) < 2:
            raise UsageError("the text is too short: it needs at least two tokens")
        return ids
    rng = np.random.default_rng(seed)
    return [int(i) for i in rng.integers(0, model.vocab_size, tokens)]


def _greedy(model: Model, prompt: list[int], steps: int) -> list[int]:
    session, out = model.session(), list[int]()
    logits = session.feed(prompt)
    for _ in range(steps):
        out.append(int(np.argmax(logits)))
        if session.position == model.context_length:
            break
        logits = session.feed(out[-1:])
    return out


def _worst(file: File, by_record: dict[int, float]) -> list[dict[str, Any]]:
    """The records with the largest errors, with the tensor that they multiply by."""
    order = sorted(by_record, key=lambda i: -by_record[i])[:WORST]
    out = []
    for i in order:
        tensor = operands(file.program[i], "w")[0]
        name = file.tensors[tensor].name if tensor is not None else ""
        op = BY_CODE[int(file.program[i]["code"])].name
        out.append({"record": i, "op": op, "tensor": name, "error": by_record[i]})
    return out
