"""The reference backend: one plain NumPy function an op. It is the definition; it is never optimised.

Every other backend is compared with these functions op by op. Formulas: formats/ops.py and SPEC.md
sections 8 and 10.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from halfbyte.formats import encodings
from halfbyte.formats.container import Tensor
from halfbyte.formats.kv_modes import PAGE
from halfbyte.formats.ops import BY_CODE, FUNCTION_NAMES
from halfbyte.formats.program import bits_f32
from halfbyte.runtime.backends.backend import GPU_POLICIES, POLICIES, Backend, Step, operands
from halfbyte.runtime.kv_page import round_query

F32 = np.float32
QUANT_GROUP = 32  # columns that share an activation scale
F8_MAX = 448.0  # of E4M3
TINY = F32(2.0**-100)  # activations below this are zero: 127 / amax would overflow


def quantize_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32[T, K] -> (int8[T, K32], float32[T, K32/32]), K32 = K padded with zeros to 32.

    d = amax / 127 and q = rint(x * (127 / amax)), half to even, clipped to +-127; a group whose
    amax is below 2^-100 is all zero.
    """
    T, K = x.shape
    padded = np.zeros((T, -(-K // QUANT_GROUP) * QUANT_GROUP), F32)
    padded[:, :K] = x
    g = padded.reshape(T, -1, QUANT_GROUP)
    amax = np.abs(g).max(axis=2)
    live = amax >= TINY
    d = np.where(live, amax / F32(127), F32(0))
    inverse = np.where(live, F32(127) / np.where(live, amax, F32(1)), F32(0))
    q = np.clip(np.rint(g * inverse[..., None]), -127, 127).astype(np.int8)
    return q.reshape(T, -1), d.astype(F32)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 fused multiply-add: the product is exact in float64, so only the last rounding can differ."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(F32)


def linear_f32(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """float32[T, K] @ float32[rows, K]^T, summed in float64 and rounded once.

    One token at a time, so that a row's result cannot depend on its neighbours through the BLAS library.
    """
    y = np.empty((len(x), len(w)), F32)
    for a in range(0, len(w), 4096):
        block = w[a : a + 4096].astype(np.float64)
        for t, row in enumerate(x.astype(np.float64)):
            y[t, a : a + 4096] = block @ row
    return y


def linear_i8g32(x: np.ndarray, codes: dict[str, np.ndarray], tensor: Tensor) -> np.ndarray:
    """float32[T, K] -> float32[T, rows]: integer dots of blocks, float sums in ascending column order."""
    rows, K = tensor.shape
    group = tensor.group or K
    block = min(QUANT_GROUP, group)
    level, s, m = encodings.decode(tensor.encoding, codes, tensor.group, tensor.scale_type)
    q, d = quantize_activations(x)
    y = np.zeros((len(x), rows), F32)
    for a in range(0, K, block):
        b, g = min(a + block, K), a // group
        # float64 sums of integers below 2^53 are exact: this is an integer dot product
        acc = (q[:, a:b].astype(np.float64) @ level[:, a:b].T.astype(np.float64)).astype(F32)
        xs = d[:, a // QUANT_GROUP][:, None]
        y = fma(acc, s[:, g][None] * xs, y)
        if m is not None:
            total = q[:, a:b].sum(axis=1, dtype=np.int32).astype(F32)[:, None]
            y = fma(m[:, g][None], xs * total, y)
    return y


def round_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> the nearest bf16, ties to even, as float32."""
    return encodings.bits_to_float(encodings.float_to_bits(x, "bf16"), "bf16")


def round_f8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32[n, K] -> (values of E4M3, ties to even, float32[n] scales amax / 448), 1 where a row is zero."""
    from ml_dtypes import float8_e4m3fn

    amax = np.abs(x).max(axis=1, initial=0).astype(F32)
    scale = np.where(amax >= TINY, amax / F32(F8_MAX), F32(1)).astype(F32)
    return (x / scale[:, None]).astype(float8_e4m3fn).astype(F32), scale


def linear_f8(x: np.ndarray, w: np.ndarray, w_scale: np.ndarray) -> np.ndarray:
    """float32[T, K] by values of E4M3 [rows, K] with scales [rows]: SPEC.md 10.7."""
    q, scale = round_f8(x)
    return round_bf16(linear_f32(q, w) * scale[:, None] * w_scale[None])


def apply_function(name: str, x: np.ndarray, p: float = 0.0) -> np.ndarray:
    """The functions of UNARY and GLU on float32 (computed in float64, rounded once)."""
    from math import erf

    z = x.astype(np.float64)
    with np.errstate(over="ignore"):
        if name == "scale":
            return F32(p) * x
        if name == "softcap":
            out = p * np.tanh(z / p)
        elif name == "silu":
            out = z / (1 + np.exp(-z))
        elif name == "gelu":
            out = z * (1 + np.vectorize(erf, otypes=[float])(z / np.sqrt(2))) / 2
        elif name == "gelu_tanh":
            out = z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2
        elif name == "relu":
            out = np.maximum(z, 0)
        elif name == "sigmoid":
            out = 1 / (1 + np.exp(-z))
        elif name == "tanh":
            out = np.tanh(z)
        else:
            raise KeyError(name)
    return out.astype(F32)


class Reference(Backend):
    """Runs a program by the definitions below."""

    name = "reference"
    policies = POLICIES + GPU_POLICIES
    _CACHE_BYTES = 1 << 24  # decoded tensors up to this size are kept

    def bind(self) -> None:
        """Nothing to prepare but a memo of decoded small tensors."""
        self._decoded: dict[tuple[int, str], Any] = {}

    def run_range(self, step: Step, first: int, last: int) -> None:
        """Call the function of each record's op."""
        for record in self.file.program[first:last]:
            op = BY_CODE[int(record["code"])]
            if op.outputs and not len(self.slot(int(record["out"][0]), step)):
                continue  # no row was picked
            attrs = {
                a.name: bits_f32(bits) if a.kind == "f32" else bits
                for a, bits in zip(op.attrs, (int(v) for v in record["attr"]))
            }
            ins = [self.slot(i, step) for i in operands(record, "in") if i is not None]
            ws = operands(record, "w")[: len(op.weights)]
            y = getattr(self, op.name)(step, *ins, *ws, **attrs)
            if op.outputs:
                self.slot(int(record["out"][0]), step)[:] = y

    def _memo(self, i: int, what: str) -> Any:
        key, t = (i, what), self.file.tensors[i]
        if key not in self._decoded:
            value: Any
            if what == "codes":
                value = self.file.codes(t)
            else:
                value = self.file.dequantize(t) if what == "values" else self._as_f8(t)
            if t.nbytes > self._CACHE_BYTES:
                return value
            self._decoded[key] = value
        return self._decoded[key]

    def _as_f8(self, t: Tensor) -> tuple[np.ndarray, np.ndarray]:
        if t.encoding != "f8e4m3" or t.group:
            return round_f8(self.file.dequantize(t))
        planes = self.file.codes(t)
        levels = np.asarray(encodings.BY_NAME["f8e4m3"].levels, F32)
        return levels[planes["codes"]], encodings.bits_to_float(planes["scales"][:, 0], t.scale_type)

    def _weight(self, i: int | None) -> np.ndarray | None:
        return None if i is None else self._memo(i, "values")

    # ---- the ops, in the order of the table -----------------------------------------------------

    def embed(self, step: Step, table: int) -> np.ndarray:
        """y[t] = table[ids[t]]"""
        return self._memo(table, "values")[step.ids]

    def pick(self, step: Step, x: np.ndarray) -> np.ndarray:
        """y[j] = x[picks[j]]"""
        return x[step.picks]

    def rmsnorm(self, step: Step, x: np.ndarray, weight: int | None, eps: float, dim: int) -> np.ndarray:
        """Every run of dim columns by itself; the mean in float64."""
        r = x.reshape(len(x), -1, dim)
        inverse = 1 / np.sqrt(np.mean(r.astype(np.float64) ** 2, axis=2, keepdims=True) + eps)
        y = r * inverse.astype(F32)
        w = self._weight(weight)
        return (y if w is None else y * w).reshape(x.shape)

    def layernorm(
        self, step: Step, x: np.ndarray, weight: int | None, bias: int | None, eps: float, dim: int
    ) -> np.ndarray:
        """Every run of dim columns by itself; mean and variance in float64."""
        r = x.reshape(len(x), -1, dim).astype(np.float64)
        centred = r - r.mean(axis=2, keepdims=True)
        y = (centred / np.sqrt(np.mean(centred**2, axis=2, keepdims=True) + eps)).astype(F32)
        w, b = self._weight(weight), self._weight(bias)
        y = y if w is None else y * w
        return (y if b is None else y + b).reshape(x.shape)

    def linear(self, step: Step, x: np.ndarray, matrix: int, bias: int | None) -> np.ndarray:
        """y = x @ matrix^T + bias, under the policy."""
        t = self.file.tensors[matrix]
        if self.policy == "bf16":
            y = round_bf16(linear_f32(round_bf16(x), round_bf16(self._memo(matrix, "values"))))
        elif self.policy == "f8":
            y = linear_f8(x, *self._memo(matrix, "f8"))
        elif self.policy == "f32" or not encodings.BY_NAME[t.encoding].is_integer:
            y = linear_f32(x, self._memo(matrix, "values"))
        else:
            y = linear_i8g32(x, self._memo(matrix, "codes"), t)
        b = self._weight(bias)
        return y if b is None else y + b

    def add(self, step: Step, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
        """y = a + scale * b, two roundings."""
        return a + F32(scale) * b

    def mul(self, step: Step, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """y = a * b"""
        return a * b

    def unary(self, step: Step, x: np.ndarray, function: int, p: float) -> np.ndarray:
        """y = function(x; p)"""
        return apply_function(FUNCTION_NAMES[function], x, p)

    def glu(self, step: Step, x: np.ndarray, function: int) -> np.ndarray:
        """x = [gate | up]: y = function(gate) * up"""
        gate, up = np.split(x, 2, axis=1)
        return apply_function(FUNCTION_NAMES[function], gate) * up

    def rope(self, step: Step, x: np.ndarray, inv_freq: int, head_dim: int, mscale: float) -> np.ndarray:
        """Rotate (x[i], x[i+n]) of every head by position * inv_freq[i] (angle in float64)."""
        freq = self._memo(inv_freq, "values")
        n = len(freq)
        angle = step.positions.astype(np.float64)[:, None] * freq.astype(np.float64)
        cos, sin = ((f(angle) * mscale).astype(F32)[:, None] for f in (np.cos, np.sin))
        y = x.reshape(len(x), -1, head_dim).copy()
        a, b = y[..., :n].copy(), y[..., n : 2 * n].copy()
        y[..., :n], y[..., n : 2 * n] = a * cos - b * sin, b * cos + a * sin
        return y.reshape(x.shape)

    def kv_put(self, step: Step, k: np.ndarray, v: np.ndarray, cache: int) -> None:
        """cache[session[t], position[t]] = k[t], v[t]"""
        heads = int(self.file.caches[cache]["kv_heads"])
        ahead = (np.diff(step.sessions) == 0) & (np.diff(step.positions) == 1)
        for run in np.split(np.arange(step.rows), np.flatnonzero(~ahead) + 1):
            k_run, v_run = (x[run].reshape(len(run), heads, -1).swapaxes(0, 1) for x in (k, v))
            step.kvs[step.sessions[run[0]]].put(cache, int(step.positions[run[0]]), k_run, v_run)

    def attend(self, step: Step, q: np.ndarray, cache: int, scale: float, softcap: float) -> np.ndarray:
        """softmax(cap(scale * q @ K^T)) @ V, in float64 per row, over the row's window; q as `round_query` has it."""
        k_dim, window = (int(self.file.caches[cache][f]) for f in ("k_dim", "window"))
        ends = step.positions.astype(np.int64) + 1
        starts = np.maximum(0, ends - window) if window else np.zeros_like(ends)
        seen = {}  # by session: its cache, where what its rows see begins, and that
        for s in set(step.sessions.tolist()):
            kv, mine = step.kvs[s], step.sessions == s
            first = int(starts[mine].min())
            seen[s] = kv, first, [a.astype(np.float64) for a in kv.read(cache, first, int(ends[mine].max()))]
        rows = []
        for t, (start, end) in enumerate(zip(starts.tolist(), ends.tolist())):
            kv, first, sides = seen[int(step.sessions[t])]
            k, v = (a[:, start - first : end - first] for a in sides)
            heads = q[t].reshape(len(k), -1, k_dim)  # [kv_heads, share, k_dim]
            own, split = kv.modes[cache].k, max(PAGE, start) - start  # keys of the first page differ
            near = heads.astype(np.float64) @ k[:, :split, :k_dim].transpose(0, 2, 1)
            far = round_query(heads, own)
            scores = scale * np.concatenate([near, far @ k[:, split:].transpose(0, 2, 1)], axis=2)
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            p = np.exp(scores - scores.max(axis=2, keepdims=True))
            rows.append((p / p.sum(axis=2, keepdims=True) @ v).astype(F32).reshape(-1))
        return np.stack(rows)

    def gather(self, step: Step, x: np.ndarray, index: int) -> np.ndarray:
        """y[t, j] = x[t, index[j]]"""
        return x[:, self.file.vector(self.file.tensors[index])]

    def hadamard(self, step: Step, x: np.ndarray, dim: int) -> np.ndarray:
        """H x / sqrt(dim) of every run of dim columns: H of 2n is [[H, H], [H, -H]] of n; in float64."""
        y, n = x.astype(np.float64), 1
        while n < dim:
            a, b = np.moveaxis(y.reshape(len(x), -1, 2, n), 2, 0)
            y, n = np.stack([a + b, a - b], axis=2), 2 * n
        return (y / np.sqrt(dim)).astype(F32).reshape(x.shape)
