"""The CUDA backend: the same program through PyTorch, on a GPU or, for tests, on PyTorch's CPU device.

Weights and activations live on the device, as do keys and values of sessions that a model of this backend makes
(`DeviceKV`). Matrices are multiplied as SPEC.md section 10 says for each policy: `f32` and `bf16` by the device's
GEMM, `f8` by `torch._scaled_mm` (FP8 tensor cores; elsewhere the rounded values are multiplied in f32), `i8g32` by
exact integer sums, so that a GPU can be held against a phone number by number.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.formats import encodings
from halfbyte.formats.errors import HalfbyteError, UsageError
from halfbyte.formats.kv_modes import PAGE, Side
from halfbyte.formats.ops import BY_CODE, FUNCTION_NAMES
from halfbyte.formats.program import bits_f32
from halfbyte.runtime.backends.backend import GPU_POLICIES, POLICIES, Backend, Step, operands
from halfbyte.runtime.backends.cuda_kv import DeviceKV
from halfbyte.runtime.backends.reference import F8_MAX, QUANT_GROUP, TINY
from halfbyte.runtime.kv import KV
from halfbyte.runtime.kv_page import round_query


def device_name() -> str:
    """'cuda' where there is one, else 'cpu'; HALFBYTE_DEVICE names another."""
    return os.environ.get("HALFBYTE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


class Cuda(Backend):
    """Runs a program on a PyTorch device. Raises UsageError for a device that is not there."""

    name = "cuda"
    policies = POLICIES + GPU_POLICIES

    def bind(self) -> None:
        """Weights go to the device as the policy takes them, when they are first needed."""
        try:
            self.device = torch.device(device_name())
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"device {device_name()}: {str(error).splitlines()[0]}") from None
        for i, record in enumerate(self.file.program):
            op = BY_CODE[int(record["code"])].name
            if not hasattr(self, f"op_{op}"):
                raise UsageError(f"the cuda backend does not have the op {op} of record {i}")
        self._weights: dict[tuple[int, str], Any] = {}
        self._slots: dict[int, Tensor] = {}
        self._records = [self._decode(r) for r in self.file.program]

    @staticmethod
    def _decode(record: np.void) -> tuple[str, int, list[int], list[int | None], dict[str, Any]]:
        op = BY_CODE[int(record["code"])]
        attrs = {
            a.name: bits_f32(bits) if a.kind == "f32" else bits
            for a, bits in zip(op.attrs, (int(v) for v in record["attr"]))
        }
        ins = [i for i in operands(record, "in") if i is not None]
        out = int(record["out"][0]) if op.outputs else -1
        return op.name, out, ins, operands(record, "w")[: len(op.weights)], attrs

    # ---- running ------------------------------------------------------------------------------

    def new_kv(self, mode: str) -> KV:
        """Keys and values on the device."""
        return DeviceKV(self.file.caches, mode, self.device)

    @torch.no_grad()
    def run(self, step: Step) -> np.ndarray:
        """The whole program on the device; only the logits come back."""
        self._start(step)
        self._execute(step, 0, len(self._records))
        return self._view(self.result).cpu().numpy()

    @torch.no_grad()
    def run_to_states(self, step: Step) -> np.ndarray:
        """The program but for its logits."""
        self._start(step)
        self._execute(step, 0, self._head)
        return self._view(self.states_slot).cpu().numpy()

    @torch.no_grad()
    def run_range(self, step: Step, first: int, last: int) -> None:
        """Some records, from and to the arena in host memory."""
        self._start(step)
        for i, s in enumerate(self.file.slots):
            if int(s["base"]) == i:
                self._slots[i].copy_(torch.from_numpy(self.slot(i, step)))
        self._execute(step, first, last)
        for i, s in enumerate(self.file.slots):
            if int(s["base"]) == i:
                self.slot(i, step)[:] = self._slots[i].cpu().numpy()

    def _start(self, step: Step) -> None:
        rows = {0: step.rows, 1: len(step.picks)}
        for i, s in enumerate(self.file.slots):
            shape = (rows[int(s["rows"])], int(s["width"]))
            if int(s["base"]) == i and (i not in self._slots or self._slots[i].shape != shape):
                self._slots[i] = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self._ids, self._picks = (
            torch.as_tensor(a, dtype=torch.long).to(self.device) for a in (step.ids, step.picks)
        )
        self._angles: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}

    def _view(self, i: int) -> Tensor:
        s = self.file.slots[i]
        return self._slots[int(s["base"])][:, int(s["offset"]) : int(s["offset"]) + int(s["width"])]

    def _execute(self, step: Step, first: int, last: int) -> None:
        for name, out, ins, ws, attrs in self._records[first:last]:
            if out >= 0 and not len(self._view(out)):
                continue  # no row was picked
            y = getattr(self, f"op_{name}")(step, *(self._view(i) for i in ins), *ws, **attrs)
            if out >= 0:
                self._view(out).copy_(y)

    def describe(self) -> dict[str, object]:
        """Adds the device."""
        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "PyTorch's CPU"
        return {**super().describe(), "device": kind, "torch": torch.__version__}

    # ---- weights ------------------------------------------------------------------------------

    def _stored(self, i: int | None, form: str = "values") -> Any:
        if i is None:
            return None
        if (i, form) not in self._weights:
            try:
                self._weights[i, form] = getattr(self, f"_as_{form}")(i)
            except torch.OutOfMemoryError:
                raise HalfbyteError(
                    f"no memory on {self.device} for tensor {self.file.tensors[i].name}"
                ) from None
        return self._weights[i, form]

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(values)).to(self.device)

    def _as_values(self, i: int) -> Tensor:
        return self._to_device(self.file.dequantize(self.file.tensors[i]))

    def _as_index(self, i: int) -> Tensor:
        return self._to_device(self.file.vector(self.file.tensors[i]).astype(np.int64))

    def _as_bf16(self, i: int) -> Tensor:
        return self._as_values(i).to(torch.bfloat16)

    def _as_f8(self, i: int) -> tuple[Tensor, Tensor]:
        """E4M3 [rows, cols] and the scale of every row [rows]."""
        t = self.file.tensors[i]
        if t.encoding == "f8e4m3" and not t.group:
            planes = self.file.codes(t)
            codes = self._to_device(planes["codes"]).view(torch.float8_e4m3fn)
            return codes, self._to_device(encodings.bits_to_float(planes["scales"][:, 0], t.scale_type))
        return to_f8(self._as_values(i))

    def _as_blocks(self, i: int) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Levels [blocks, block, rows], what scales them and, with minima, what is added: [blocks, rows]."""
        t = self.file.tensors[i]
        rows, cols = t.shape
        group = t.group or cols
        block = min(QUANT_GROUP, group)
        level, s, m = encodings.decode(t.encoding, self.file.codes(t), t.group, t.scale_type)
        count = -(-cols // block)
        padded = np.zeros(
            (rows, count * block), np.int8 if level.min() >= -128 and level.max() < 128 else np.int16
        )
        padded[:, :cols] = level
        of_block = np.arange(count) * block // group
        blocks = padded.reshape(rows, count, block).transpose(1, 2, 0)
        at = [None if a is None else self._to_device(a[:, of_block].T) for a in (s, m)]
        assert at[0] is not None
        return self._to_device(blocks), at[0], at[1], block

    # ---- ops, in the order of the table ---------------------------------------------------------

    def op_embed(self, step: Step, table: int) -> Tensor:
        """y[t] = table[ids[t]]"""
        return self._stored(table)[self._ids]

    def op_pick(self, step: Step, x: Tensor) -> Tensor:
        """y[j] = x[picks[j]]"""
        return x[self._picks]

    def op_rmsnorm(self, step: Step, x: Tensor, weight: int | None, eps: float, dim: int) -> Tensor:
        """Every run of dim columns by itself; the mean in float64."""
        r = x.reshape(len(x), -1, dim)
        y = r * torch.rsqrt(r.double().square().mean(2, keepdim=True) + eps).float()
        w = self._stored(weight)
        return (y if w is None else y * w).reshape(x.shape)

    def op_layernorm(
        self, step: Step, x: Tensor, weight: int | None, bias: int | None, eps: float, dim: int
    ) -> Tensor:
        """Every run of dim columns by itself; mean and variance in float64."""
        r = x.reshape(len(x), -1, dim).double()
        c = r - r.mean(2, keepdim=True)
        y = (c / torch.sqrt(c.square().mean(2, keepdim=True) + eps)).float()
        w, b = self._stored(weight), self._stored(bias)
        y = y if w is None else y * w
        return (y if b is None else y + b).reshape(x.shape)

    def op_linear(self, step: Step, x: Tensor, matrix: int, bias: int | None) -> Tensor:
        """y = x @ matrix^T + bias, under the policy."""
        integer = encodings.BY_NAME[self.file.tensors[matrix].encoding].is_integer
        if self.policy == "bf16":
            y = (x.to(torch.bfloat16) @ self._stored(matrix, "bf16").T).float()
        elif self.policy == "f8":
            y = linear_f8(x, *self._stored(matrix, "f8"))
        elif self.policy == "i8g32" and integer:
            y = linear_i8g32(x, *self._stored(matrix, "blocks"))
        else:
            y = x @ self._stored(matrix).T
        b = self._stored(bias)
        return y if b is None else y + b

    def op_add(self, step: Step, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """y = a + scale * b"""
        return a + b * scale

    def op_mul(self, step: Step, a: Tensor, b: Tensor) -> Tensor:
        """y = a * b"""
        return a * b

    def op_unary(self, step: Step, x: Tensor, function: int, p: float) -> Tensor:
        """y = function(x; p)"""
        return apply_function(FUNCTION_NAMES[function], x, p)

    def op_glu(self, step: Step, x: Tensor, function: int) -> Tensor:
        """x = [gate | up]: y = function(gate) * up"""
        gate, up = x.chunk(2, dim=1)
        return apply_function(FUNCTION_NAMES[function], gate) * up

    def op_rope(self, step: Step, x: Tensor, inv_freq: int, head_dim: int, mscale: float) -> Tensor:
        """Rotate (x[i], x[i+n]) of every head by position * inv_freq[i] (angle in float64)."""
        if (inv_freq, mscale) not in self._angles:
            freq = self.file.dequantize(self.file.tensors[inv_freq]).astype(np.float64)
            angle = step.positions.astype(np.float64)[:, None] * freq
            tables = ((f(angle) * mscale).astype(np.float32)[:, None] for f in (np.cos, np.sin))
            cos, sin = map(self._to_device, tables)
            self._angles[inv_freq, mscale] = cos, sin
        cos, sin = self._angles[inv_freq, mscale]
        n = cos.shape[-1]
        y = x.reshape(len(x), -1, head_dim).clone()
        a, b = y[..., :n].clone(), y[..., n : 2 * n].clone()
        y[..., :n], y[..., n : 2 * n] = a * cos - b * sin, b * cos + a * sin
        return y.reshape(x.shape)

    def op_kv_put(self, step: Step, k: Tensor, v: Tensor, cache: int) -> None:
        """cache[session[t], position[t]] = k[t], v[t]"""
        heads = int(self.file.caches[cache]["kv_heads"])
        for session, a, z, start in spans(step):
            kv = step.kvs[session]
            kept = [x[a:z].reshape(z - a, heads, -1).transpose(0, 1) for x in (k, v)]
            if isinstance(kv, DeviceKV):
                kv.put_tensors(cache, start, *kept)
            else:
                kv.put(cache, start, *(x.cpu().numpy() for x in kept))

    def op_attend(self, step: Step, q: Tensor, cache: int, scale: float, softcap: float) -> Tensor:
        """softmax(cap(scale * q @ K^T)) @ V over the row's window."""
        k_dim, window = (int(self.file.caches[cache][f]) for f in ("k_dim", "window"))
        out = []
        for session, a, z, start in spans(step):
            kv, end = step.kvs[session], start + z - a
            first = max(0, start + 1 - window) if window else 0
            if isinstance(kv, DeviceKV):
                k, v = kv.tensors(cache, first, end)
            else:
                k, v = (self._to_device(x.astype(np.float32)) for x in kv.read(cache, first, end))
            heads = q[a:z].reshape(z - a, -1, k_dim).transpose(0, 1)  # [heads, rows, k_dim]
            j = torch.arange(first, end, device=self.device)
            i = torch.arange(start, end, device=self.device)[:, None]
            seen = (j <= i) & (j > i - window) if window else j <= i
            side = kv.modes[cache].k
            if side.query_steps:  # the first page has queries of its own: columns beside the others
                near = (j < PAGE)[:, None]
                k = torch.cat([k[:, :, :k_dim] * near, k * ~near], dim=2)
                heads = torch.cat([heads, self._rounded(heads, side)], dim=2)
            out.append(attend(heads, k, v, seen, scale, softcap).transpose(0, 1).reshape(z - a, -1))
        return torch.cat(out)

    def _rounded(self, q: Tensor, side: Side) -> Tensor:
        return self._to_device(round_query(q.cpu().numpy(), side).astype(np.float32))

    def op_gather(self, step: Step, x: Tensor, index: int) -> Tensor:
        """y[t, j] = x[t, index[j]]"""
        return x[:, self._stored(index, "index")]

    def op_hadamard(self, step: Step, x: Tensor, dim: int) -> Tensor:
        """H x / sqrt(dim) of every run of dim columns, in float64."""
        y, n = x.double(), 1
        while n < dim:
            a, b = y.reshape(len(x), -1, 2, n).unbind(2)
            y, n = torch.stack([a + b, a - b], dim=2), 2 * n
        return (y / dim**0.5).float().reshape(x.shape)


def spans(step: Step) -> list[tuple[int, int, int, int]]:
    """(session, first row, row after the last, first position) of runs at consecutive positions of one session."""
    out: list[tuple[int, int, int, int]] = []
    for t, (s, p) in enumerate(zip(step.sessions.tolist(), step.positions.tolist())):
        if out and out[-1][0] == s and out[-1][3] + t - out[-1][1] == p:
            out[-1] = (*out[-1][:2], t + 1, out[-1][3])
        else:
            out.append((s, t, t + 1, p))
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float) -> Tensor:
    """q [heads, rows, k_dim], k, v [kv_heads, length, dim], seen bool [rows, length] -> [heads, rows, v_dim]."""
    share = len(q) // len(k)
    if not softcap and k.shape[2] == v.shape[2]:
        k, v = (x.repeat_interleave(share, 0)[None] for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q[None], k, v, attn_mask=seen, scale=scale)[0]
    heads = q.reshape(len(k), share * q.shape[1], -1)
    scores = scale * (heads @ k.transpose(1, 2))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen.repeat(share, 1), -torch.inf)
    return (torch.softmax(scores, 2) @ v).reshape(len(q), q.shape[1], -1)


def to_f8(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [n, cols] -> E4M3 [n, cols] and float32 [n] scales amax / 448 (1 where a row is zero)."""
    amax = torch.linalg.vector_norm(x, torch.inf, dim=1)  # one pass over memory, where abs().amax() has three
    scale = torch.where(amax >= float(TINY), amax / torch.full_like(amax, F8_MAX), 1.0)
    return (x / scale[:, None]).to(torch.float8_e4m3fn), scale


def linear_f8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """SPEC.md 10.7: E4M3 by E4M3, sums in f32, both scales, rounded to bf16."""
    q, d = to_f8(x)
    if x.device.type == "cuda" and codes.shape[0] % 16 == 0 and codes.shape[1] % 16 == 0:
        y = torch._scaled_mm(
            q,
            codes.T,
            scale_a=d[:, None],
            scale_b=scale[None],
            out_dtype=torch.bfloat16,
            use_fast_accum=False,
        )
    else:
        y = ((q.float() @ codes.float().T) * d[:, None] * scale[None]).to(torch.bfloat16)
    return y.float()


def linear_i8g32(x: Tensor, levels: Tensor, s: Tensor, m: Tensor | None, block: int) -> Tensor:
    """SPEC.md 10.2. Sums of a block stay below 2^24, so that f32 holds them exactly.

    The fma is emulated in float64, as in the reference: only a double rounding can differ from a real one.
    """
    T, K = x.shape
    padded = torch.zeros(T, -(-K // QUANT_GROUP) * QUANT_GROUP, device=x.device)
    padded[:, :K] = x
    groups = padded.reshape(T, -1, QUANT_GROUP)
    amax = groups.abs().amax(dim=2)
    live = amax >= float(TINY)
    top = torch.full_like(amax, 127)  # by a tensor: PyTorch multiplies by the reciprocal of a number
    d = torch.where(live, amax / top, 0.0)
    inverse = torch.where(live, top / torch.where(live, amax, 1.0), 0.0)
    q = (groups * inverse[..., None]).round().clamp(-127, 127).reshape(T, -1)
    y = torch.zeros(T, levels.shape[2], device=x.device)
    for b in range(len(levels)):
        part = q[:, b * block : (b + 1) * block]
        acc, xs = part @ levels[b, : part.shape[1]].float(), d[:, b * block // QUANT_GROUP][:, None]
        y = (acc.double() * (s[b] * xs).double() + y.double()).float()
        if m is not None:
            total = xs * part.sum(dim=1, keepdim=True)
            y = (m[b].double() * total.double() + y.double()).float()
    return y


def apply_function(name: str, x: Tensor, p: float = 0.0) -> Tensor:
    """The functions of UNARY and GLU on float32 (computed in float64, rounded once)."""
    z = x.double()
    known = {
        "scale": lambda: x * p,
        "softcap": lambda: p * torch.tanh(z / p),
        "silu": lambda: torch.nn.functional.silu(z),
        "gelu": lambda: torch.nn.functional.gelu(z),
        "gelu_tanh": lambda: torch.nn.functional.gelu(z, approximate="tanh"),
        "relu": lambda: torch.relu(z),
        "sigmoid": lambda: torch.sigmoid(z),
        "tanh": lambda: torch.tanh(z),
    }
    return known[name]().float()
