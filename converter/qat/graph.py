"""A program under autograd: the records of a builder, executed on batches of whole sequences.

Whatever model type the converter supports trains, since only the ops of `formats.ops` are known here. Activations are
float32[batch, T, width]; every row is picked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from halfbyte.converter.builder import Builder, Matrix
from halfbyte.converter.qat.activations import hadamard, round_activations, round_cache
from halfbyte.converter.qat.fake_quant import FakeQuant, Planes
from halfbyte.converter.weights import Weights
from halfbyte.formats import kv_modes, ops, program
from halfbyte.formats.encodings import BY_NAME

FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "scale": lambda x, p: p * x,
    "softcap": lambda x, p: p * torch.tanh(x / p),
    "silu": lambda x, p: functional.silu(x),
    "gelu": lambda x, p: functional.gelu(x),
    "gelu_tanh": lambda x, p: functional.gelu(x, approximate="tanh"),
    "relu": lambda x, p: functional.relu(x),
    "sigmoid": lambda x, p: torch.sigmoid(x),
    "tanh": lambda x, p: torch.tanh(x),
}
NOT_TRAINED = ("rope", "gather")  # ops whose vectors are not weights


class Frozen(nn.Module):
    """A matrix that does not train: the teacher's, and codes that arrived quantised."""

    values: Tensor

    def __init__(self, values: np.ndarray):
        super().__init__()
        self.register_buffer("values", torch.from_numpy(np.array(values, np.float32)), persistent=False)

    def forward(self) -> Tensor:
        """The matrix."""
        return self.values


class _Slots:
    """What the slots hold: for each base, the runs of columns written, apart from each other."""

    def __init__(self, table: np.ndarray):
        self.table = [(int(s["base"]), int(s["offset"]), int(s["width"])) for s in table]
        self.runs: dict[int, list[tuple[int, Tensor]]] = {}

    def write(self, slot: int, y: Tensor) -> None:
        """Replace the columns of a slot."""
        base, first, width = self.table[slot]
        kept = []
        for at, x in self.runs.get(base, []):
            end = at + x.shape[-1]
            if at < first:
                kept.append((at, x[..., : min(end, first) - at]))
            if end > first + width:
                start = max(at, first + width)
                kept.append((start, x[..., start - at :]))
        self.runs[base] = sorted([*kept, (first, y)], key=lambda run: run[0])

    def read(self, slot: int) -> Tensor:
        """The columns of a slot."""
        base, first, width = self.table[slot]
        parts = []
        for at, x in self.runs[base]:
            a, z = max(at, first), min(at + x.shape[-1], first + width)
            if a < z:
                parts.append(x if z - a == x.shape[-1] else x[..., a - at : z - at])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class Graph(nn.Module):
    """The program of a builder. Without `trains` it is the float model.

    trains: matrices and vectors are parameters, the matrices fake-quantised as the builder stores them. integer: the
    inputs of quantised matrices are rounded as under policy i8g32. kv: a mode of the cache (`formats.kv_modes`), or
    None for floats. rank, start: see `FakeQuant`.
    """

    def __init__(
        self,
        b: Builder,
        weights: Weights,
        *,
        trains: bool = False,
        integer: bool = False,
        kv: str | None = None,
        rank: int = 0,
        seed: int = 0,
        start: Mapping[int, Planes] | None = None,
    ):
        super().__init__()
        self.records, self.slots, self.caches = b.finish()
        self.integer = integer
        self.modes = None if kv is None else kv_modes.by_cache(kv, len(self.caches))
        fixed = {
            int(w) for r in self.records if ops.BY_CODE[int(r["code"])].name in NOT_TRAINED for w in r["w"]
        }
        self.matrices, self.vectors = nn.ModuleDict(), nn.ParameterDict()
        self.fixed: dict[int, np.ndarray] = {}
        self.codes: set[int] = set()  # matrices whose inputs meet integers
        for i, t in enumerate(b.tensors):
            if isinstance(t, Matrix):
                e = BY_NAME[t.storage.encoding]
                if trains and e.has_codes and not t.storage.packed:
                    planes = (start or {}).get(i)
                    w = weights.rows(t)
                    self.matrices[str(i)] = FakeQuant(w, e.name, t.storage.group, rank, seed + i, planes)
                else:
                    self.matrices[str(i)] = Frozen(weights.rows(t))
                if e.is_integer:
                    self.codes.add(i)
            elif i in fixed:
                self.fixed[i] = t.values
            else:
                self.vectors[str(i)] = nn.Parameter(torch.from_numpy(t.values.copy()), requires_grad=trains)
        self._angles: dict[tuple[int, int, float], tuple[Tensor, Tensor]] = {}

    def quantizers(self) -> dict[int, FakeQuant]:
        """The fake-quantised matrices, by tensor."""
        return {int(i): m for i, m in self.matrices.items() if isinstance(m, FakeQuant)}

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64[batch, T] -> logits float32[batch, T, vocab]."""
        values = {int(i): m() for i, m in self.matrices.items()}
        slots, caches = _Slots(self.slots), dict[int, tuple[Tensor, Tensor]]()
        y = ids.float()
        for r in self.records:
            op = ops.BY_CODE[int(r["code"])]
            attrs: dict[str, Any] = {
                a.name: program.bits_f32(int(v)) if a.kind == "f32" else int(v)
                for a, v in zip(op.attrs, r["attr"])
            }
            ins = [slots.read(int(s)) for s in r["in"] if int(s) != program.NONE]
            w = [None if int(i) == program.NONE else int(i) for i in r["w"]]
            if op.name == "kv_put":
                caches[attrs["cache"]] = ins[0], ins[1]
                continue
            if op.name == "embed":
                y = functional.embedding(ids, values[w[0]])  # type: ignore[index]
            elif op.name == "linear":
                y = self._linear(ins[0], values[w[0]], w[0], w[1])  # type: ignore[index, arg-type]
            elif op.name == "attend":
                y = self._attend(ins[0], *caches[attrs["cache"]], **attrs)
            else:
                y = getattr(self, "_" + op.name)(*ins, *w[: len(op.weights)], **attrs)
            slots.write(int(r["out"][0]), y)
        return y

    def _vector(self, i: int | None) -> Tensor | None:
        return None if i is None else self.vectors[str(i)]

    # ---- the ops (formats/ops.py has their formulas) --------------------------------------------

    def _pick(self, x: Tensor) -> Tensor:
        return x

    def _linear(self, x: Tensor, matrix: Tensor, index: int, bias: int | None) -> Tensor:
        if self.integer and index in self.codes:
            x = round_activations(x)
        return functional.linear(x, matrix, self._vector(bias))

    def _rmsnorm(self, x: Tensor, weight: int | None, eps: float, dim: int) -> Tensor:
        return functional.rms_norm(x.unflatten(-1, (-1, dim)), (dim,), self._vector(weight), eps).flatten(-2)

    def _layernorm(self, x: Tensor, weight: int | None, bias: int | None, eps: float, dim: int) -> Tensor:
        w, b = self._vector(weight), self._vector(bias)
        return functional.layer_norm(x.unflatten(-1, (-1, dim)), (dim,), w, b, eps).flatten(-2)

    def _add(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return a + scale * b

    def _mul(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def _unary(self, x: Tensor, function: int, p: float) -> Tensor:
        return FUNCTIONS[ops.FUNCTION_NAMES[function]](x, p)

    def _glu(self, x: Tensor, function: int) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return FUNCTIONS[ops.FUNCTION_NAMES[function]](gate, 0.0) * up

    def _rope(self, x: Tensor, inv_freq: int, head_dim: int, mscale: float) -> Tensor:
        key = (inv_freq, x.shape[1], mscale)
        if key not in self._angles:
            angle = np.arange(x.shape[1])[:, None] * self.fixed[inv_freq].astype(np.float64)
            a, b = ((f(angle) * mscale).astype(np.float32)[:, None] for f in (np.cos, np.sin))
            self._angles[key] = torch.from_numpy(a), torch.from_numpy(b)
        cos, sin = self._angles[key]
        n = cos.shape[-1]
        y = x.unflatten(-1, (-1, head_dim))
        first, second, rest = y[..., :n], y[..., n : 2 * n], y[..., 2 * n :]
        turned = first * cos - second * sin, second * cos + first * sin
        return torch.cat([*turned, rest], dim=-1).flatten(-2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cache: int, scale: float, softcap: float) -> Tensor:
        facts = self.caches[cache]
        heads, window = int(facts["kv_heads"]), int(facts["window"])
        k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (k, v))
        q = q.unflatten(-1, (-1, k.shape[-1])).transpose(1, 2)
        if self.modes is not None:
            k, v = round_cache(k, self.modes[cache], False), round_cache(v, self.modes[cache], True)
        share, T = q.shape[1] // heads, q.shape[2]
        k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
        if not softcap and not (window and window < T):
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            ago = torch.arange(T)[:, None] - torch.arange(T)
            seen = (ago >= 0) & (ago < window) if window else ago >= 0
            scores = scale * (q @ k.transpose(-1, -2))
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            y = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ v
        return y.transpose(1, 2).flatten(-2)

    def _gather(self, x: Tensor, index: int) -> Tensor:
        return x[..., torch.from_numpy(self.fixed[index].astype(np.int64))]

    def _hadamard(self, x: Tensor, dim: int) -> Tensor:
        return hadamard(x.unflatten(-1, (-1, dim)), dim).flatten(-2)
