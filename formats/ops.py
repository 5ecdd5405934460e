"""The op table: the whole vocabulary of a program. Normative with SPEC.md section 8.

Activations are float32, row-major, one row a token (T rows) or one row a picked token (r rows).
Each operand names what it must be; `program.verify` enforces it, `emit_c` writes the C enum, the
reference backend has one function per row, and every other backend is tested row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

# Functions of UNARY and GLU, by number. `p` is the op's parameter.
FUNCTIONS: dict[str, int] = {
    "scale": 1,  # p * x
    "softcap": 2,  # p * tanh(x / p)
    "silu": 3,  # x / (1 + exp(-x))
    "gelu": 4,  # x * (1 + erf(x / sqrt 2)) / 2
    "gelu_tanh": 5,  # x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2
    "relu": 6,  # max(x, 0)
    "sigmoid": 7,  # 1 / (1 + exp(-x))
    "tanh": 8,
}
FUNCTION_NAMES = {v: k for k, v in FUNCTIONS.items()}
PARAMETRIC = ("scale", "softcap")  # functions of p: UNARY only


@dataclass(frozen=True)
class Attr:
    """An attribute: its name and kind ('u32', 'f32' or 'function')."""

    name: str
    kind: str


@dataclass(frozen=True)
class Op:
    """One op. `inputs`, `outputs` and `weights` name the operands in order; a trailing '?' is optional."""

    code: int
    name: str
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    attrs: tuple[Attr, ...]
    formula: str
    in_place: bool = False  # an output may be exactly the same slot as an input
    minor: int = 0  # first minor version of the format that has the op


def _attrs(*specs: str) -> tuple[Attr, ...]:
    return tuple(Attr(*s.split(":")) for s in specs)


OPS: tuple[Op, ...] = (
    Op(1, "embed", ("y",), (), ("table",), (), "y[t] = table[ids[t]]"),
    Op(2, "pick", ("y",), ("x",), (), (), "y[j] = x[picks[j]]"),
    Op(3, "rmsnorm", ("y",), ("x",), ("weight?",), _attrs("eps:f32", "dim:u32"),
       "every run of dim columns: y = x / sqrt(mean(x^2) + eps) * weight", True),
    Op(4, "layernorm", ("y",), ("x",), ("weight?", "bias?"), _attrs("eps:f32", "dim:u32"),
       "every run of dim columns: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias", True),
    Op(5, "linear", ("y",), ("x",), ("matrix", "bias?"), (), "y = x @ matrix^T + bias"),
    Op(6, "add", ("y",), ("a", "b"), (), _attrs("scale:f32"), "y = a + scale * b", True),
    Op(7, "mul", ("y",), ("a", "b"), (), (), "y = a * b", True),
    Op(8, "unary", ("y",), ("x",), (), _attrs("function:function", "p:f32"), "y = function(x; p)", True),
    Op(9, "glu", ("y",), ("x",), (), _attrs("function:function"),
       "x = [gate | up]: y = function(gate) * up"),
    Op(10, "rope", ("y",), ("x",), ("inv_freq",), _attrs("head_dim:u32", "mscale:f32"),
       "first 2n columns of every head, n = len(inv_freq), angle = position * inv_freq[i]: "
       "(x[i], x[i+n]) rotated by angle, times mscale", True),
    Op(11, "kv_put", (), ("k", "v"), (), _attrs("cache:u32"), "cache[session[t], position[t]] = k[t], v[t]"),
    Op(12, "attend", ("y",), ("q",), (), _attrs("cache:u32", "scale:f32", "softcap:f32"),
       "y = softmax(cap(scale * q @ K^T)) @ V over positions p - window < j <= p of the row's session"),
    Op(13, "gather", ("y",), ("x",), ("index",), (), "y[t, j] = x[t, index[j]]", minor=1),
    Op(14, "hadamard", ("y",), ("x",), (), _attrs("dim:u32"),
       "every run of dim columns: y = H x / sqrt(dim), H the Hadamard matrix in Sylvester's order", True, 1),
)  # fmt: skip

BY_NAME = {op.name: op for op in OPS}
BY_CODE = {op.code: op for op in OPS}

MAX_OPS = 24  # the house test fails beyond this until someone raises it and says why
