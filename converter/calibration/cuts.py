"""Where calibration cuts a program: before every LINEAR. What lives across the cuts, and a file without matrices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.converter.builder import Builder, Vector
from halfbyte.formats import ops, program
from halfbyte.formats.writer import TensorSpec, Writer

EMBED, LINEAR, PICK, ADD = (ops.BY_NAME[name].code for name in ("embed", "linear", "pick", "add"))


@dataclass
class Stage:
    """Consecutive records that only EMBED, or LINEARs of one input; `first` is where the runtime stops."""

    first: int
    last: int
    live: list[int]  # base slots whose contents later records need, at `first`


def find_stages(records: np.ndarray, slots: np.ndarray) -> list[Stage]:
    """Where the runtime stops, in order, and what is live there."""
    live_at = live_slots(records, slots)
    stages: list[Stage] = []
    i = 0
    while i < len(records):
        code = int(records[i]["code"])
        if code not in (EMBED, LINEAR):
            i += 1
            continue
        j = i + 1
        while (
            j < len(records)
            and code == LINEAR == int(records[j]["code"])
            and int(records[j]["in"][0]) == int(records[i]["in"][0])
            and not any(overlap(slots, int(r["out"][0]), int(records[i]["in"][0])) for r in records[i:j])
        ):
            j += 1
        stages.append(Stage(i, j, live_at[i]))
        i = j
    return stages


def used(operands: np.ndarray) -> list[int]:
    return [int(v) for v in operands if int(v) != program.NONE]


def overlap(slots: np.ndarray, a: int, b: int) -> bool:
    (i, p, m), (j, q, n) = ((int(slots[s][f]) for f in ("base", "offset", "width")) for s in (a, b))
    return i == j and p < q + n and q < p + m


def live_slots(records: np.ndarray, slots: np.ndarray) -> list[list[int]]:
    """For every record, the base slots of which some column is read at it or later before it is written."""
    live = {i: np.zeros(int(s["width"]), bool) for i, s in enumerate(slots) if int(s["base"]) == i}
    out: list[list[int]] = []
    for r in records[::-1]:
        for value, field_ in ((False, "out"), (True, "in")):
            for slot in used(r[field_]):
                base, offset, width = (int(slots[slot][f]) for f in ("base", "offset", "width"))
                live[base][offset : offset + width] = value
        out.append([base for base, mask in live.items() if mask.any()])
    return out[::-1]


def write_program(
    b: Builder, path: Path, records: np.ndarray, slots: np.ndarray, caches: np.ndarray, context: int
) -> None:
    """A file of the same records without matrices: EMBED and LINEAR become an EMBED of one row of nothing, which
    the walk never executes, PICK takes every row, and all rows are tokens' rows.

    Record numbers and slots stay those of the builder's program.
    """
    tensors: list[TensorSpec] = []
    values: list[np.ndarray | None] = []
    where: dict[tuple[str, int], int] = {}
    for i, t in enumerate(b.tensors):
        if isinstance(t, Vector):
            where["vector", i] = len(tensors)
            tensors.append(TensorSpec(t.name, "f32", t.shape))
            values.append(t.values)

    def nothing(width: int) -> int:
        if ("nothing", width) not in where:
            where["nothing", width] = len(tensors)
            tensors.append(TensorSpec(f"nothing.{width}", "f16", (1, width)))
            values.append(None)
        return where["nothing", width]

    changed: list[Any] = []
    for r in records:
        code, layer, out = int(r["code"]), int(r["layer"]), int(r["out"][0])
        if code in (EMBED, LINEAR):
            changed.append(program.record("embed", layer, [out], [], [nothing(int(slots[out]["width"]))]))
        elif code == PICK:
            scale = ops.FUNCTIONS["scale"]
            changed.append(program.record("unary", layer, [out], [int(r["in"][0])], function=scale, p=1.0))
        else:
            r = r.copy()
            for k, w in enumerate(r["w"]):
                r["w"][k] = w if int(w) == program.NONE else where["vector", int(w)]
            changed.append(r)
    rows = slots.copy()
    rows["rows"] = program.TOKENS
    end = len(slots)
    ends = [(1, end, 0, program.TOKENS), (1, end + 1, 0, program.PICKS)]
    changed.append(program.record("embed", out=[end], weights=[nothing(1)]))
    changed.append(program.record("pick", out=[end + 1], ins=[end]))
    meta: Any = {
        "general.name": "calibration",
        "model.vocab_size": 1,
        "model.context_length": context,
    }
    with Writer(
        path,
        meta=meta,
        slots=np.concatenate([rows, np.array(ends, program.SLOT_DTYPE)]),
        caches=caches,
        program=np.array(changed, program.OP_DTYPE),
        tensors=tensors,
    ) as writer:
        for i, v in enumerate(values):
            if v is not None:
                writer.write(i, "values", 0, v)
