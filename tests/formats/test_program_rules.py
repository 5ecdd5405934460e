"""`program.verify` refuses each broken rule, by name. One case a rule: a good program and one change."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from parts import put

from halfbyte.formats import program
from halfbyte.formats.errors import FormatError
from halfbyte.formats.ops import FUNCTIONS, OPS
from halfbyte.formats.program import NONE, PICKS, TOKENS, TensorShape
from halfbyte.formats.tiles import P16, ROWS

VOCAB, WIDTH = 20, 16


@dataclass
class Good:
    """A program that verifies: its parts are plain lists, so that a test can change one of them."""

    slots: list[list[int]] = field(
        default_factory=lambda: [
            [WIDTH, 0, 0, TOKENS],  # 0 x
            [48, 1, 0, TOKENS],  # 1 qkv
            [16, 1, 0, TOKENS],  # 2 q
            [16, 1, 16, TOKENS],  # 3 k
            [16, 1, 32, TOKENS],  # 4 v
            [16, 5, 0, TOKENS],  # 5 attended
            [8, 6, 0, TOKENS],  # 6 inner
            [WIDTH, 7, 0, PICKS],  # 7 picked
            [VOCAB, 8, 0, PICKS],  # 8 logits
            [WIDTH, 9, 0, PICKS],  # 9 permuted
        ]
    )
    caches: list[list[int]] = field(default_factory=lambda: [[2, 8, 8, 0], [2, 8, 8, 0]])
    tensors: list[TensorShape] = field(
        default_factory=lambda: [
            TensorShape("embed", P16, (VOCAB, WIDTH), False),
            TensorShape("norm", ROWS, (WIDTH,), True),
            TensorShape("qkv", P16, (48, WIDTH), False),
            TensorShape("bias", ROWS, (48,), True),
            TensorShape("freq", ROWS, (4,), True),
            TensorShape("half", ROWS, (WIDTH,), False),
            TensorShape("index", ROWS, (WIDTH,), False, WIDTH),
        ]
    )
    records: list[np.ndarray] = field(
        default_factory=lambda: [
            put("embed", [0], [], [0]),
            put("rmsnorm", [0], [0], [1], eps=1e-5, dim=WIDTH),
            put("linear", [1], [0], [2, 3]),
            put("rope", [2], [2], [4], head_dim=8, mscale=1.0),
            put("kv_put", [], [3, 4], cache=0),
            put("attend", [5], [2], cache=0, scale=1.0, softcap=0.0),
            put("glu", [6], [5], function=FUNCTIONS["silu"]),
            put("layernorm", [5], [5], [1, None], eps=1e-5, dim=WIDTH),
            put("add", [0], [0, 5], scale=1.0),
            put("mul", [0], [0, 5]),
            put("unary", [0], [0], function=FUNCTIONS["softcap"], p=30.0),
            put("pick", [7], [0]),
            put("gather", [9], [7], [6]),
            put("hadamard", [9], [9], dim=8),
            put("linear", [8], [9], [0, None]),
        ]
    )
    vocab: int = VOCAB

    def verify(self) -> None:
        """Run the check."""
        program.verify(
            np.array(self.records, program.OP_DTYPE),
            np.array([tuple(s) for s in self.slots], program.SLOT_DTYPE),
            np.array([tuple(c) for c in self.caches], program.CACHE_DTYPE),
            self.tensors,
            self.vocab,
        )


# Indices of the records of Good.
(
    EMBED,
    RMSNORM,
    LINEAR,
    ROPE,
    KV_PUT,
    ATTEND,
    GLU,
    LAYERNORM,
    ADD,
    MUL,
    UNARY,
    PICK,
    GATHER,
    HADAMARD,
    HEAD,
) = range(15)


def test_the_good_program_verifies() -> None:
    """Otherwise nothing below means anything."""
    Good().verify()
    assert {int(r["code"]) for r in Good().records} == {op.code for op in OPS}


def attr(record: int, i: int, value: float | int) -> Callable[[Good], None]:
    """Set an attribute."""

    def change(g: Good) -> None:
        g.records[record]["attr"][i] = program.f32_bits(value) if isinstance(value, float) else value

    return change


def operand(record: int, name: str, i: int, value: int) -> Callable[[Good], None]:
    """Set an operand."""

    def change(g: Good) -> None:
        g.records[record][name][i] = value

    return change


def slot(i: int, *values: int) -> Callable[[Good], None]:
    """Replace a slot."""
    return lambda g: g.slots.__setitem__(i, list(values))


def tensor(
    i: int, tile: int, shape: tuple[int, ...], is_float32: bool = False, reach: int = 0
) -> Callable[[Good], None]:
    """Replace what a tensor is."""
    return lambda g: g.tensors.__setitem__(i, TensorShape(f"changed{i}", tile, shape, is_float32, reach))


def insert(at: int, record: np.ndarray) -> Callable[[Good], None]:
    """Add a record."""
    return lambda g: g.records.insert(at, record)


def drop(at: int) -> Callable[[Good], None]:
    """Leave a record out."""
    return lambda g: g.records.__delitem__(at)


def fresh(*values: int) -> Callable[[Good], None]:
    """Add a slot (its number is 10)."""
    return lambda g: g.slots.append(list(values))


def both(*changes: Callable[[Good], None]) -> Callable[[Good], None]:
    """Several changes."""

    def change(g: Good) -> None:
        for c in changes:
            c(g)

    return change


def many(what: str, count: int, row: list[int]) -> Callable[[Good], None]:
    """A table of `count` equal rows more."""
    return lambda g: getattr(g, what).extend([row] * count)


RULES: dict[str, tuple[str, Callable[[Good], None]]] = {
    "no records": ("program of 0 records", lambda g: g.records.clear()),
    "too many records": ("is out of range", lambda g: g.records.extend([g.records[MUL]] * program.MAX_RECORDS)),
    "too many slots": ("slots are more than", many("slots", program.MAX_SLOTS, [1, 0, 0, TOKENS])),
    "too many caches": ("caches are more than", many("caches", program.MAX_CACHES, [1, 1, 1, 0])),
    "slots too wide together": (
        "the slots together are wider",
        lambda g: g.slots.extend([program.MAX_WIDTH, 10 + i, 0, TOKENS] for i in range(5)),
    ),
    "slot without columns": ("slot 0: width 0", slot(0, 0, 0, 0, TOKENS)),
    "slot too wide": ("out of range", slot(0, program.MAX_WIDTH + 1, 0, 0, TOKENS)),
    "slot row kind": ("unknown row kind 2", slot(0, WIDTH, 0, 0, 2)),
    "base with an offset": ("a base slot has offset 4", slot(0, WIDTH, 0, 4, TOKENS)),
    "view of a view": ("base 3 is not a base slot", slot(2, 16, 3, 0, TOKENS)),
    "view of nothing": ("base 77 is not a base slot", slot(2, 16, 77, 0, TOKENS)),
    "view outside its base": ("does not lie inside slot 1", slot(4, 16, 1, 33, TOKENS)),
    "view of other rows": ("does not lie inside slot 1", slot(4, 16, 1, 32, PICKS)),
    "cache without heads": ("cache 0: kv_heads 0", lambda g: g.caches.__setitem__(0, [0, 8, 8, 0])),
    "cache of huge heads": ("cache 0: v_dim 4097", lambda g: g.caches.__setitem__(0, [2, 8, 4097, 0])),
    "unknown op": ("unknown op 999", lambda g: g.records[MUL].__setitem__("code", 999)),
    "op zero": ("unknown op 0", lambda g: g.records[MUL].__setitem__("code", 0)),
    "flags": ("unknown flags 0x8", lambda g: g.records[MUL].__setitem__("flags", 8)),
    "missing input": ("operand b is missing", operand(MUL, "in", 1, NONE)),
    "missing output": ("operand y is missing", operand(MUL, "out", 0, NONE)),
    "missing weight": ("operand matrix is missing", operand(LINEAR, "w", 0, NONE)),
    "surplus input": ("in[1] must be absent", operand(UNARY, "in", 1, 0)),
    "surplus output": ("out[1] must be absent", operand(UNARY, "out", 1, 0)),
    "surplus weight": ("w[2] must be absent", operand(LINEAR, "w", 2, 0)),
    "surplus attribute": ("attr[1] must be zero", attr(ADD, 1, 1)),
    "infinite attribute": ("scale is not finite", attr(ADD, 0, float("inf"))),
    "unknown function": ("unknown function 9", attr(GLU, 0, 9)),
    "slot does not exist": ("slot 10 does not exist", operand(MUL, "in", 1, 10)),
    "tensor does not exist": ("tensor 7 does not exist", operand(LINEAR, "w", 1, 7)),
    "read before written": ("slot 0 is read before it is written", drop(EMBED)),
    "view read before written": (
        "slot 3 is read before",
        both(tensor(2, P16, (16, WIDTH)), lambda g: g.records.__setitem__(LINEAR, put("linear", [2], [0], [2, None]))),
    ),
    "output overlaps input": ("slot 1 overlaps its input 2", insert(ROPE, put("linear", [1], [2], [2, None]))),
    "output partly overlaps": (
        "slot 10 overlaps its input 2",
        both(fresh(16, 1, 8, TOKENS), insert(ROPE, put("unary", [10], [2], function=6, p=0.0))),
    ),
    "in place where it is not allowed": ("overlaps its input", insert(RMSNORM, put("linear", [0], [0], [5, None]))),
    "logits of another width": ("does not produce logits of 19", lambda g: setattr(g, "vocab", 19)),
    "logits of token rows": (
        "does not produce logits",
        both(drop(HEAD), drop(HADAMARD), drop(GATHER), drop(PICK), lambda g: setattr(g, "vocab", 16)),
    ),
    "no logits": ("does not produce logits", insert(15, put("kv_put", [], [3, 4], cache=1))),
    "pick of picked rows": (
        "must take token rows",
        both(fresh(16, 10, 0, PICKS), insert(HEAD, put("pick", [10], [7]))),
    ),
    "pick into token rows": (
        "must take token rows",
        both(fresh(16, 10, 0, TOKENS), insert(PICK, put("pick", [10], [0]))),
    ),
    "rows disagree": ("disagree on what a row is", insert(HEAD, put("mul", [7], [7, 0]))),
    "embed of picked rows": ("token rows only", operand(EMBED, "out", 0, 7)),
    "rope of picked rows": ("token rows only", insert(HEAD, put("rope", [7], [7], [4], head_dim=8, mscale=1.0))),
    "embed from a vector": ("is not a matrix", operand(EMBED, "w", 0, 1)),
    "embed of another width": ("does not fit None x 16", tensor(0, P16, (VOCAB, 12))),
    "embed with too few rows": ("fewer rows than the 20 ids", tensor(0, P16, (VOCAB - 1, WIDTH))),
    "unequal widths": ("widths differ", operand(MUL, "in", 1, 1)),
    "pick of another width": ("widths differ", slot(7, 12, 7, 0, PICKS)),
    "norm dim zero": ("dim 0 does not divide", attr(RMSNORM, 1, 0)),
    "norm dim": ("dim 5 does not divide 16", attr(LAYERNORM, 1, 5)),
    "norm eps": ("eps is negative", attr(RMSNORM, 0, -1e-5)),
    "norm weight width": ("weight must be an f32 vector of 16", operand(RMSNORM, "w", 0, 3)),
    "norm weight matrix": ("weight must be an f32 vector", operand(RMSNORM, "w", 0, 0)),
    "norm weight f16": ("weight must be an f32 vector", operand(RMSNORM, "w", 0, 5)),
    "norm bias": ("must be an f32 vector", operand(LAYERNORM, "w", 1, 5)),
    "linear rows": ("does not fit 48 x 16", tensor(2, P16, (47, WIDTH))),
    "linear cols": ("does not fit 48 x 16", tensor(2, P16, (48, 17))),
    "linear vector": ("is not a matrix", operand(LINEAR, "w", 0, 3)),
    "linear bias": ("bias must be an f32 vector of 48", operand(LINEAR, "w", 1, 1)),
    "softcap of zero": ("softcap needs p > 0", attr(UNARY, 1, 0.0)),
    "glu width": ("is not twice", operand(GLU, "in", 0, 1)),
    "glu of a parametric function": ("takes a parameter", attr(GLU, 0, FUNCTIONS["scale"])),
    "rope head": ("head_dim 5 does not divide", attr(ROPE, 0, 5)),
    "rope head zero": ("head_dim 0 does not divide", attr(ROPE, 0, 0)),
    "rope too many frequencies": ("does not fit head_dim 8", tensor(4, ROWS, (5,), True)),
    "rope matrix": ("does not fit head_dim 8", operand(ROPE, "w", 0, 0)),
    "rope f16": ("inv_freq must be an f32 vector", tensor(4, ROWS, (4,), False)),
    "cache does not exist": ("cache 2 does not exist", attr(KV_PUT, 0, 2)),
    "attend to no cache": ("cache 2 does not exist", attr(ATTEND, 0, 2)),
    "kv_put widths": ("do not fit cache 0", operand(KV_PUT, "in", 0, 1)),
    "kv_put twice": ("cache 0 is filled twice", insert(ATTEND, put("kv_put", [], [3, 4], cache=0))),
    "attend before kv_put": ("is read before kv_put", drop(KV_PUT)),
    "attend to another cache": ("is read before kv_put", attr(ATTEND, 0, 1)),
    "attend width": ("width 12 does not fit cache 0", both(drop(ROPE), slot(2, 12, 1, 0, TOKENS))),
    "attend output": ("is not 2 heads of 8", slot(5, 24, 5, 0, TOKENS)),
    "gather of floats": ("index must be a u32 vector of 16", operand(GATHER, "w", 0, 1)),
    "gather length": ("index must be a u32 vector of 16", tensor(6, ROWS, (15,), False, 15)),
    "gather beyond the input": ("index reaches column 16 of 16", tensor(6, ROWS, (WIDTH,), False, WIDTH + 1)),
    "gather in place": ("slot 7 overlaps its input 7", operand(GATHER, "out", 0, 7)),
    "gather from other rows": ("disagree on what a row is", operand(GATHER, "in", 0, 0)),
    "hadamard dim zero": ("dim 0 is not a power of two", attr(HADAMARD, 0, 0)),
    "hadamard dim": ("dim 12 is not a power of two", attr(HADAMARD, 0, 12)),
    "hadamard dim too large": ("dim 32 does not divide 16", attr(HADAMARD, 0, 32)),
    "hadamard widths": ("widths differ", operand(HADAMARD, "out", 0, 8)),
    "attend softcap": ("softcap is negative", attr(ATTEND, 2, -1.0)),
}  # fmt: skip


@pytest.mark.parametrize("rule", list(RULES))
def test_rule(rule: str) -> None:
    """The change is refused for its own reason."""
    fragment, change = RULES[rule]
    good = Good()
    change(good)
    with pytest.raises(FormatError) as caught:
        good.verify()
    assert fragment in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_every_message_of_program_py_is_tested() -> None:
    """Each literal fragment of a refusal in the source occurs in a message that some rule above causes."""
    messages = []
    for _, change in RULES.values():
        good = Good()
        change(good)
        with pytest.raises(FormatError) as caught:
            good.verify()
        messages.append(str(caught.value))
    source = ast.parse(inspect.getsource(program))
    refusals = []
    for node in ast.walk(source):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            text = {"FormatError": 0, "fail": 0, "need": 1}.get(name)
            if text is not None and not isinstance(node.args[text], ast.Name):
                constants = [n.value for n in ast.walk(node.args[text]) if isinstance(n, ast.Constant)]
                refusals.append([c for c in constants if isinstance(c, str) and len(c) > 4 and c != "matrix"])
    assert len(refusals) > 35
    for parts in refusals:
        assert any(all(p in m for p in parts) for m in messages), f"no rule causes {parts}"


def test_adjacent_views_make_a_whole() -> None:
    """Columns written view by view, in any order, count as written; a gap of one column does not."""
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        good = Good()
        good.tensors[2] = TensorShape("part", P16, (16, WIDTH), False)
        good.records[LINEAR : LINEAR + 1] = [put("linear", [2 + i], [0], [2, None]) for i in order]
        good.records.insert(LINEAR + 3, put("unary", [1], [1], function=FUNCTIONS["relu"], p=0.0))
        good.verify()
        good.slots[1][0] = 49
        with pytest.raises(FormatError, match="slot 1 is read before"):
            good.verify()


def test_explain_names_everything() -> None:
    """The listing gives ops, slots with views, weights and attributes in words."""
    good = Good()
    rows = program.explain(
        np.array(good.records, program.OP_DTYPE),
        np.array([tuple(s) for s in good.slots], program.SLOT_DTYPE),
        np.array([tuple(c) for c in good.caches], program.CACHE_DTYPE),
        good.tensors,
    )
    assert [r["index"] for r in rows] == list(range(15))
    assert rows[RMSNORM]["attrs"] == {"eps": float(np.float32(1e-5)), "dim": 16}
    assert rows[ROPE]["in"] == ["s2[T,16] = s1+0"] and rows[ROPE]["weights"] == ["freq"]
    assert rows[GLU]["attrs"] == {"function": "silu"}
    assert rows[ATTEND]["attrs"]["kv_heads"] == 2 and rows[ATTEND]["attrs"]["window"] == 0
    assert rows[HEAD]["op"] == "linear" and rows[HEAD]["out"] == ["s8[r,20]"] and rows[HEAD]["layer"] is None
    assert rows[KV_PUT]["out"] == [] and rows[KV_PUT]["in"] == ["s3[T,16] = s1+16", "s4[T,16] = s1+32"]
