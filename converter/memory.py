"""What a conversion holds in memory, and what may give way to `--max-memory`: the size of blocks, and activations.

Neither changes a bit of the result. The sizes of everything else follow from the model; they are summed up from
what the code holds at its worst moments, and tests/converter/test_memory.py compares them with what processes take.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.converter import assemble, calibrate, sequential
from halfbyte.converter.allocation.table import bytes_of
from halfbyte.converter.builder import Builder, Matrix
from halfbyte.converter.calibration.cuts import used
from halfbyte.converter.calibration.route import Route
from halfbyte.converter.quantizers import gptq
from halfbyte.formats.errors import UsageError

COMPILED = 120_000_000  # kernels, and the compiler that makes them the first time
BLOCK_BYTES = 16  # held for every weight of a block while it is rounded
SMALLEST_BLOCK = 1 << 16
PROOF_BYTES = 28  # held for every weight of a block while it is compared
TOKENIZER = 200_000_000  # one of 128000 tokens, and a text in it
# What a process holds of its libraries before it begins depends on what the system has cached of them.
VARIES = 40_000_000


@dataclass(frozen=True)
class Budget:
    """block: weights rounded at once; activations: bytes of them in memory, None for what is usual."""

    block: int = assemble.BLOCK_WEIGHTS
    activations: int | None = None


def budget(
    cap: int | None,
    b: Builder,
    method: str,
    tokens: int,
    calibrated: bool,
    proves: bool = False,
    measures: bool = False,
) -> Budget:
    """How to keep a process below `cap` bytes. tokens: to calibrate on, at most; calibrated: whether by a text of the
    user's, which is then in memory already. proves: whether a proof is written, measures: on a text.

    Raises UsageError where it cannot be done, with a number of bytes that is enough the next time too.
    """
    if cap is None:
        return Budget()
    if method not in ("rtn", "gptq"):
        raise UsageError(f"how much memory {method} takes is not known; --max-memory goes with rtn and gptq")
    import psutil

    matrices = [t for t in b.tensors if isinstance(t, Matrix)]
    fixed = psutil.Process().memory_info().rss + COMPILED
    least = max(SMALLEST_BLOCK, 16 * max((t.shape[1] for t in matrices), default=0))
    needed = fixed + BLOCK_BYTES * least
    if method == "gptq" or calibrated:
        walk = _walk(b, method, tokens, calibrated)
        needed = max(needed, fixed + walk)
    without, needed = (
        needed,
        max(needed, fixed + _proof(matrices, measures, calibrated)) if proves else needed,
    )
    if needed > cap:
        instead = f" ({_megabytes(without + VARIES)} with --no-proof)" if needed > without else ""
        needs = f"{_megabytes(cap)} of memory are too little: {method} of this model needs"
        raise UsageError(f"{needs} {_megabytes(needed + VARIES)}{instead}")
    room = (cap - fixed) // BLOCK_BYTES
    return Budget(min(assemble.BLOCK_WEIGHTS, max(least, room)), min(calibrate.ACTIVATIONS, cap - needed))


def _proof(matrices: list[Matrix], measures: bool, calibrated: bool) -> int:
    """Bytes of a proof: the file, mapped, beside blocks of it and of its source, or beside the float model's file."""
    from halfbyte.converter import proof
    from halfbyte.converter.plan import OWN_TEXT_WEIGHTS

    weights = sum(t.shape[0] * t.shape[1] for t in matrices)
    block = min(proof.BLOCK_WEIGHTS, max((t.shape[0] * t.shape[1] for t in matrices), default=0))
    compared = sum(map(bytes_of, matrices)) + PROOF_BYTES * block
    if not measures:
        return compared
    return compared + (0 if calibrated else TOKENIZER) + (4 if weights <= OWN_TEXT_WEIGHTS else 2) * weights


def _walk(b: Builder, method: str, tokens: int, calibrated: bool) -> int:
    """Bytes of a walk through the program that holds no activations, at its worst moment."""
    route = Route(b, None)
    if not route.stages:
        return 0
    length = min(calibrate.LENGTH, b.context_limit)
    reached = route.records[: route.stages[-1].first]
    slots = {int(route.slots[i]["base"]) for r in reached for i in (*used(r["out"]), *used(r["in"]))}
    widths = [int(route.slots[i]["width"]) for i in slots]  # the logits are never reached
    # the arena, copies of the inputs and residuals of one sequence, and products on their way
    always = 4 * length * (sum(widths) + 6 * max(widths, default=0)) + _text(b, calibrated)
    drift = method == "gptq"
    worst = 0
    before = (1 + drift) * 4 * tokens * b.hidden  # the embedding's rows
    for stage in route.stages:
        visited = [
            t for w, i in route.visits.items() if stage.first <= i < stage.last for t in [b.tensors[w]]
        ]
        shapes = [t.shape for t in visited if isinstance(t, Matrix)]
        if not shapes:
            continue
        cols = shapes[0][1]
        square = cols * cols
        sums = 8 * square if drift else 0
        if drift:
            sums += 8 * square if any(rows > cols for rows, _ in shapes) else 0
            sums += sum(12 * rows * cols for rows, _ in shapes if rows <= cols)
        block = min(sequential.BLOCK_WEIGHTS, max(rows for rows, _ in shapes) * cols)
        # the factors of the Hessian, then a block and its planes, and lanes in work; and what later layers see
        visit = sums + 8 * square + (28 * block + 64 * gptq.LANES * cols if drift else BLOCK_BYTES * block)
        after = (1 + drift) * sum(4 * rows * cols for rows, _ in shapes)
        last = stage is route.stages[-1]
        worst = max(worst, before + sums, visit + (0 if last else after))
        before = after
    return always + worst


def _text(b: Builder, calibrated: bool) -> int:
    """Bytes for what is calibrated on, where it is not in memory yet: a small model also writes text itself."""
    from halfbyte.converter.plan import OWN_TEXT_WEIGHTS

    weights = sum(t.shape[0] * t.shape[1] for t in b.tensors if isinstance(t, Matrix))
    if calibrated:
        return 0
    return TOKENIZER + (4 * weights if weights <= OWN_TEXT_WEIGHTS else 0)


def _megabytes(n: int) -> str:
    return f"{-(-n // 10**6)}M"
