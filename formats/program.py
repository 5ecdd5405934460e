"""Programs: fixed-width records, their verification and their listing.

A program is a flat list of 64-byte records over *slots* (activation buffers), *caches* (keys and
values of a session) and tensors. It has no jumps: it ends. Normative with SPEC.md section 7.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import FormatError
from .ops import BY_CODE, BY_NAME, FUNCTION_NAMES, PARAMETRIC, Op
from .tiles import P16, ROWS

NONE = 0xFFFFFFFF  # an operand that is absent
NO_LAYER = 0xFFFF
TOKENS, PICKS = 0, 1  # what the rows of a slot are: one a token, or one a picked token
ROW_NAMES = {TOKENS: "T", PICKS: "r"}

# Bounds that keep every product below 2^63 and every arena allocation explicable.
MAX_WIDTH = 1 << 22
MAX_HEAD_DIM = 1 << 12
MAX_RECORDS = 1 << 16
MAX_SLOTS = 1 << 16
MAX_CACHES = 1 << 12
MAX_COLUMNS = 1 << 24  # of all base slots together: 64 MiB a row

OP_DTYPE = np.dtype(
    [("code", "<u2"), ("layer", "<u2"), ("flags", "<u4"), ("out", "<u4", 2), ("in", "<u4", 4),
     ("w", "<u4", 4), ("attr", "<u4", 4)]
)  # fmt: skip
SLOT_DTYPE = np.dtype([("width", "<u4"), ("base", "<u4"), ("offset", "<u4"), ("rows", "<u4")])
CACHE_DTYPE = np.dtype([("kv_heads", "<u4"), ("k_dim", "<u4"), ("v_dim", "<u4"), ("window", "<u4")])
assert OP_DTYPE.itemsize == 64 and SLOT_DTYPE.itemsize == 16 and CACHE_DTYPE.itemsize == 16


@dataclass(frozen=True)
class TensorShape:
    """What verification needs to know of a tensor. `reach` of a u32 vector is its largest element + 1, else 0."""

    name: str
    tile: int
    shape: tuple[int, ...]
    is_float32: bool
    reach: int = 0


def f32_bits(value: float) -> int:
    """A float attribute as the u32 stored in a record."""
    return int(np.float32(value).view(np.uint32))


def bits_f32(bits: int) -> float:
    """The inverse of `f32_bits`."""
    return float(np.uint32(bits).view(np.float32))


class _Check:
    """One record under verification; `fail` names its index and op."""

    def __init__(self, index: int, record: np.void, op: Op):
        self.index, self.record, self.op = index, record, op

    def fail(self, why: str) -> FormatError:
        return FormatError(f"program record {self.index} ({self.op.name}): {why}")

    def operands(self, field: str, names: tuple[str, ...]) -> list[int]:
        """Operand indices of `field`; absent optional ones are NONE, surplus ones are refused."""
        values = [int(v) for v in self.record[field]]
        for i, value in enumerate(values):
            if i >= len(names) and value != NONE:
                raise self.fail(f"{field}[{i}] must be absent")
            if i < len(names) and value == NONE and not names[i].endswith("?"):
                raise self.fail(f"operand {names[i]} is missing")
        return values[: len(names)]

    def attrs(self) -> dict[str, float | int]:
        out: dict[str, float | int] = {}
        for i, bits in enumerate(int(v) for v in self.record["attr"]):
            if i >= len(self.op.attrs):
                if bits:
                    raise self.fail(f"attr[{i}] must be zero")
                continue
            attr = self.op.attrs[i]
            if attr.kind == "f32":
                out[attr.name] = value = bits_f32(bits)
                if not np.isfinite(value):
                    raise self.fail(f"{attr.name} is not finite")
            else:
                out[attr.name] = bits
                if attr.kind == "function" and bits not in FUNCTION_NAMES:
                    raise self.fail(f"unknown function {bits}")
        return out


class _Slots:
    """Widths, row kinds and the columns written so far of every slot.

    `written` holds, for each base, the starts and ends of disjoint, sorted, non-adjacent intervals.
    """

    def __init__(self, slots: np.ndarray):
        self.table = slots
        self.written: dict[int, tuple[list[int], list[int]]] = {}
        total = 0
        if len(slots) > MAX_SLOTS:
            raise FormatError(f"{len(slots)} slots are more than {MAX_SLOTS}")
        for i, s in enumerate(slots):
            width, base, offset = int(s["width"]), int(s["base"]), int(s["offset"])
            if not 0 < width <= MAX_WIDTH:
                raise FormatError(f"slot {i}: width {width} is out of range")
            if s["rows"] not in ROW_NAMES:
                raise FormatError(f"slot {i}: unknown row kind {s['rows']}")
            if base == i:
                if offset:
                    raise FormatError(f"slot {i}: a base slot has offset {offset}")
                self.written[i] = ([], [])
                total += width
                if total > MAX_COLUMNS:
                    raise FormatError(f"slot {i}: the slots together are wider than {MAX_COLUMNS} columns")
            elif base >= len(slots) or int(slots[base]["base"]) != base:
                raise FormatError(f"slot {i}: base {base} is not a base slot")
            elif s["rows"] != slots[base]["rows"] or offset + width > int(slots[base]["width"]):
                raise FormatError(f"slot {i}: the view does not lie inside slot {base}")

    def span(self, i: int) -> tuple[int, int, int]:
        s = self.table[i]
        return int(s["base"]), int(s["offset"]), int(s["offset"]) + int(s["width"])

    def width(self, i: int) -> int:
        return int(self.table[i]["width"])

    def rows(self, i: int) -> int:
        return int(self.table[i]["rows"])

    def is_written(self, i: int) -> bool:
        base, a, b = self.span(i)
        starts, ends = self.written[base]
        j = bisect_right(starts, a) - 1
        return j >= 0 and ends[j] >= b

    def write(self, i: int) -> None:
        base, a, b = self.span(i)
        starts, ends = self.written[base]
        lo, hi = bisect_left(ends, a), bisect_right(starts, b)
        if lo < hi:
            a, b = min(a, starts[lo]), max(b, ends[hi - 1])
        starts[lo:hi], ends[lo:hi] = [a], [b]

    def overlap(self, i: int, j: int) -> bool:
        (bi, ai, ei), (bj, aj, ej) = self.span(i), self.span(j)
        return bi == bj and ai < ej and aj < ei


def verify(
    records: np.ndarray,
    slots: np.ndarray,
    caches: np.ndarray,
    tensors: Sequence[TensorShape],
    vocab_size: int,
) -> None:
    """Refuse any program that a backend could not run safely.

    After this, every slot is written before it is read, every shape fits, every index is in range,
    and the last record leaves the logits (picked rows x vocab_size). Raises FormatError naming the
    record and the reason.
    """
    if not 0 < len(records) <= MAX_RECORDS:
        raise FormatError(f"a program of {len(records)} records is out of range")
    if len(caches) > MAX_CACHES:
        raise FormatError(f"{len(caches)} caches are more than {MAX_CACHES}")
    for i, c in enumerate(caches):
        for field in ("kv_heads", "k_dim", "v_dim"):
            if not 0 < int(c[field]) <= MAX_HEAD_DIM:
                raise FormatError(f"cache {i}: {field} {int(c[field])} is out of range")
    state = _Slots(slots)
    filled: set[int] = set()
    for index, record in enumerate(records):
        op = BY_CODE.get(int(record["code"]))
        if op is None:
            raise FormatError(
                f"program record {index}: unknown op {int(record['code'])}; a newer halfbyte may know it"
            )
        check = _Check(index, record, op)
        if record["flags"]:
            raise check.fail(f"unknown flags {int(record['flags']):#x}")
        outs, ins = check.operands("out", op.outputs), check.operands("in", op.inputs)
        ws, attrs = check.operands("w", op.weights), check.attrs()
        for i in (*outs, *ins):
            if i >= len(slots):
                raise check.fail(f"slot {i} does not exist")
        for i in ws:
            if i != NONE and i >= len(tensors):
                raise check.fail(f"tensor {i} does not exist")
        for i in ins:
            if not state.is_written(i):
                raise check.fail(f"slot {i} is read before it is written")
            for o in outs:
                if state.overlap(i, o) and not (op.in_place and state.span(i) == state.span(o)):
                    raise check.fail(f"slot {o} overlaps its input {i}")
        shapes = [None if w == NONE else tensors[w] for w in ws]
        _check_shapes(check, state, caches, outs, ins, shapes, attrs, filled, vocab_size)
        for o in outs:
            state.write(o)
    last = records[-1]
    op = BY_CODE[int(last["code"])]
    if (
        not op.outputs
        or state.width(int(last["out"][0])) != vocab_size
        or state.rows(int(last["out"][0])) != PICKS
    ):
        raise FormatError(f"the last record does not produce logits of {vocab_size} columns for picked rows")


def _check_shapes(
    check: _Check,
    s: _Slots,
    caches: np.ndarray,
    outs: list[int],
    ins: list[int],
    ws: list[TensorShape | None],
    attrs: dict[str, float | int],
    filled: set[int],
    vocab_size: int,
) -> None:
    """The shape law of each op."""
    name = check.op.name
    width = [s.width(i) for i in ins]
    out = s.width(outs[0]) if outs else 0

    def need(ok: bool, why: str) -> None:
        if not ok:
            raise check.fail(why)

    def vector(t: TensorShape | None, n: int, what: str) -> None:
        if t is not None:
            need(t.tile == ROWS and t.shape == (n,) and t.is_float32, f"{what} must be an f32 vector of {n}")

    def matrix(t: TensorShape | None, rows: int | None, cols: int) -> None:
        assert t is not None
        need(t.tile == P16 and len(t.shape) == 2, f"{t.name} is not a matrix in p16 tiles")
        need(
            t.shape[1] == cols and rows in (None, t.shape[0]),
            f"{t.name} {t.shape} does not fit {rows} x {cols}",
        )

    kinds = {s.rows(i) for i in (*ins, *outs)}
    if name == "pick":
        need(s.rows(ins[0]) == TOKENS and s.rows(outs[0]) == PICKS, "must take token rows to picked rows")
    else:
        need(len(kinds) == 1, "operands disagree on what a row is")
    if name in ("embed", "rope", "kv_put", "attend"):
        need(kinds == {TOKENS}, "works on token rows only")

    if name == "embed":
        matrix(ws[0], None, out)
        assert ws[0] is not None
        need(ws[0].shape[0] >= vocab_size, f"{ws[0].name} has fewer rows than the {vocab_size} ids")
    elif name in ("pick", "add", "mul", "unary", "rmsnorm", "layernorm", "rope", "hadamard"):
        need(all(w == out for w in width), "widths differ")
    if name in ("rmsnorm", "layernorm"):
        dim = int(attrs["dim"])
        need(dim > 0 and out % dim == 0, f"dim {dim} does not divide {out}")
        need(float(attrs["eps"]) >= 0, "eps is negative")
        for t in ws:
            vector(t, dim, "weight")
    elif name == "linear":
        matrix(ws[0], out, width[0])
        vector(ws[1], out, "bias")
    elif name == "unary":
        need(
            FUNCTION_NAMES[int(attrs["function"])] != "softcap" or float(attrs["p"]) > 0,
            "softcap needs p > 0",
        )
    elif name == "glu":
        need(width[0] == 2 * out, f"input width {width[0]} is not twice {out}")
        function = FUNCTION_NAMES[int(attrs["function"])]
        need(function not in PARAMETRIC, f"function {function} takes a parameter, and glu has none")
    elif name == "rope":
        head, t = int(attrs["head_dim"]), ws[0]
        assert t is not None
        need(0 < head <= MAX_HEAD_DIM and out % head == 0, f"head_dim {head} does not divide {out}")
        need(
            len(t.shape) == 1 and 0 < 2 * t.shape[0] <= head,
            f"inv_freq {t.shape} does not fit head_dim {head}",
        )
        vector(t, t.shape[0], "inv_freq")
    elif name in ("kv_put", "attend"):
        cache = int(attrs["cache"])
        need(cache < len(caches), f"cache {cache} does not exist")
        kv_heads, k_dim, v_dim = (int(caches[cache][f]) for f in ("kv_heads", "k_dim", "v_dim"))
        if name == "kv_put":
            need(width == [kv_heads * k_dim, kv_heads * v_dim], f"widths {width} do not fit cache {cache}")
            need(cache not in filled, f"cache {cache} is filled twice")
            filled.add(cache)
        else:
            heads = width[0] // k_dim
            need(
                width[0] % k_dim == 0 and heads % kv_heads == 0,
                f"width {width[0]} does not fit cache {cache}",
            )
            need(out == heads * v_dim, f"output width {out} is not {heads} heads of {v_dim}")
            need(cache in filled, f"cache {cache} is read before kv_put")
            need(float(attrs["softcap"]) >= 0, "softcap is negative")
    elif name == "gather":
        t = ws[0]
        assert t is not None
        need(t.reach > 0 and t.shape == (out,), f"index must be a u32 vector of {out}")
        need(t.reach <= width[0], f"index reaches column {t.reach - 1} of {width[0]}")
    elif name == "hadamard":
        dim = int(attrs["dim"])
        need(dim > 0 and dim & (dim - 1) == 0, f"dim {dim} is not a power of two")
        need(out % dim == 0, f"dim {dim} does not divide {out}")


def explain(
    records: np.ndarray, slots: np.ndarray, caches: np.ndarray, tensors: Sequence[TensorShape]
) -> list[dict[str, object]]:
    """One dict a record: index, layer, op, outputs, inputs, weights, attributes, all in words."""
    rows: list[dict[str, object]] = []
    for index, r in enumerate(records):
        op = BY_CODE[int(r["code"])]
        attrs: dict[str, object] = {}
        for a, bits in zip(op.attrs, (int(v) for v in r["attr"])):
            attrs[a.name] = (
                bits_f32(bits) if a.kind == "f32" else FUNCTION_NAMES[bits] if a.kind == "function" else bits
            )

        def slot(i: int) -> str:
            s = slots[i]
            base = int(s["base"])
            view = "" if base == i else f" = s{base}+{int(s['offset'])}"
            return f"s{i}[{ROW_NAMES[int(s['rows'])]},{int(s['width'])}]{view}"

        if "cache" in attrs:
            c = caches[int(r["attr"][0])]
            attrs["window"] = int(c["window"])
            attrs["kv_heads"] = int(c["kv_heads"])
        rows.append(
            {
                "index": index,
                "layer": None if int(r["layer"]) == NO_LAYER else int(r["layer"]),
                "op": op.name,
                "out": [slot(int(i)) for i in r["out"] if int(i) != NONE],
                "in": [slot(int(i)) for i in r["in"] if int(i) != NONE],
                "weights": [tensors[int(i)].name for i in r["w"] if int(i) != NONE],
                "attrs": attrs,
                "formula": op.formula,
            }
        )
    return rows


def record(
    op: str,
    layer: int = NO_LAYER,
    out: Sequence[int] = (),
    ins: Sequence[int] = (),
    weights: Sequence[int | None] = (),
    **attrs: float | int,
) -> np.ndarray:
    """One record as a 0-d array of OP_DTYPE; attributes by the names of the op table."""
    spec = BY_NAME[op]
    r = np.zeros((), OP_DTYPE)
    r["code"], r["layer"] = spec.code, layer
    for field, values in (("out", out), ("in", ins), ("w", weights)):
        r[field] = NONE
        for i, v in enumerate(values):
            r[field][i] = NONE if v is None else v
    unknown = set(attrs) - {a.name for a in spec.attrs}
    assert not unknown, f"{op} has no attribute {unknown}"
    for i, a in enumerate(spec.attrs):
        value = attrs[a.name]
        r["attr"][i] = f32_bits(value) if a.kind == "f32" else int(value)
    return r
