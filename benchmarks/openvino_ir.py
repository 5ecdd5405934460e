"""A llama, qwen2 or qwen3 checkpoint as a stateful OpenVINO model with compressed weights.

The graph is what optimum-intel exports for GenAI: inputs input_ids, attention_mask, position_ids and beam_idx, keys
and values as variables, scaled_dot_product_attention, logits of the last token only (GenAI slices them too).
Weights are compressed as NNCF does by default: matrices of the layers to the mode asked for, embeddings and the
head to 8 bits a row with a zero point; constant -> convert -> subtract -> multiply.

Modes: `int4-gN` (4 bits with a zero point, groups of N), `int4-gN-sym` (no zero point), `int8` (rows, zero point).
Runs under the peer's interpreter: openvino and NumPy only.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf_checkpoint
import numpy as np

MODE = re.compile(r"int8|int4-g(32|64|128|256)(-sym)?")
INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")
_ROWS = 8192  # quantised at once


def codes(
    w: np.ndarray, bits: int, group: int, zero: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(codes uint8 or int8 [rows, groups, group], scale float16 [rows, groups, 1], zero points uint8 or None).

    With zero points w = scale * (code - zero), code in 0..2^bits-1; without, code in -2^(bits-1)..2^(bits-1)-1.
    """
    rows, cols = w.shape
    x = w.reshape(rows, -1, group or cols)
    if not zero:
        top = np.take_along_axis(x, np.abs(x).argmax(2)[..., None], 2)
        scale = (top / -(1 << (bits - 1))).astype(np.float16)
        inverse = 1 / np.where(scale == 0, 1, scale).astype(np.float32)
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        return np.clip(np.rint(x * inverse), low, high).astype(np.int8), scale, None
    low, high = np.minimum(x.min(2, keepdims=True), 0), np.maximum(x.max(2, keepdims=True), 0)
    levels = (1 << bits) - 1
    scale = ((high - low) / levels).astype(np.float16)
    inverse = 1 / np.where(scale == 0, 1, scale).astype(np.float32)
    point = np.clip(np.rint(-low * inverse), 0, levels)
    return np.clip(np.rint(x * inverse) + point, 0, levels).astype(np.uint8), scale, point.astype(np.uint8)


def packed(values: np.ndarray) -> np.ndarray:
    """4-bit codes two a byte, the first in the low half."""
    flat = values.view(np.uint8).reshape(-1) & 15
    return flat[::2] | (flat[1::2] << 4)


class Graph:
    """The nodes of one model."""

    def __init__(self, config: dict[str, Any], weights: dict[str, np.ndarray], mode: str):
        import openvino as ov
        from openvino import opset13 as op

        found = MODE.fullmatch(mode)
        if not found:
            raise ValueError(f"unknown mode {mode}; there are int8, int4-g64, int4-g128, int4-g64-sym, ...")
        self.ov, self.op, self.config, self.weights = ov, op, config, weights
        self.group, self.zero = int(found[1] or 0), not found[2]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads", self.heads)
        self.dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.sinks: list[Any] = []
        self.kept: list[np.ndarray] = []

    def ints(self, *values: int) -> Any:
        """A constant int64 vector."""
        return self.op.constant(np.array(values, np.int64))

    def scalar(self, value: int) -> Any:
        """A constant int64 scalar."""
        return self.op.constant(np.array(value, np.int64))

    def floats(self, name: str) -> np.ndarray:
        """A tensor as float32."""
        return gguf_checkpoint.as_float(self.weights[name])

    def _constant(self, values: np.ndarray, bits: int) -> Any:
        ov = self.ov
        if bits == 8:
            return self.op.constant(values)
        kind = ov.Type.u4 if values.dtype == np.uint8 else ov.Type.i4
        if values.size % 2:  # zero points of an odd number of groups
            raise ValueError("an odd number of 4-bit values")
        self.kept.append(packed(values))  # the constant only points to it
        return ov.op.Constant(ov.Tensor(self.kept[-1], ov.Shape(list(values.shape)), kind))

    def matrix(self, name: str, bits: int, group: int, zero: bool) -> Any:
        """A compressed matrix [rows, cols] as float32 for whoever reads it."""
        op, bf16 = self.op, self.weights[name]
        parts = [
            codes(gguf_checkpoint.as_float(bf16[i : i + _ROWS]), bits, group, zero)
            for i in range(0, bf16.shape[0], _ROWS)
        ]
        squeeze = (lambda a: a) if group else (lambda a: a[:, 0])
        w = self._constant(squeeze(np.concatenate([p[0] for p in parts])), bits)
        node = op.convert(w, "f16")
        if zero:
            points = self._constant(squeeze(np.concatenate([p[2] for p in parts])), bits)
            node = op.subtract(node, op.convert(points, "f16"))
        node = op.multiply(node, op.constant(squeeze(np.concatenate([p[1] for p in parts]))))
        if group:
            node = op.reshape(node, self.ints(*bf16.shape), False)
        return op.convert(node, "f32")

    def linear(self, x: Any, name: str) -> Any:
        """x W^T + b."""
        bits = 4 if self.group else 8
        y = self.op.matmul(x, self.matrix(f"{name}.weight", bits, self.group, self.zero), False, True)
        return (
            self.op.add(y, self.op.constant(self.floats(f"{name}.bias")))
            if f"{name}.bias" in self.weights
            else y
        )

    def rmsnorm(self, x: Any, name: str) -> Any:
        """Root mean square norm over the last axis."""
        op = self.op
        mean = op.reduce_mean(op.power(x, op.constant(np.float32(2))), self.ints(-1), True)
        root = op.sqrt(op.add(mean, op.constant(np.float32(self.config["rms_norm_eps"]))))
        normal = op.multiply(x, op.divide(op.constant(np.float32(1)), root))
        return op.multiply(normal, op.constant(self.floats(f"{name}.weight")))

    def rotated(self, x: Any, cos: Any, sin: Any) -> Any:
        """Rotary embedding of [batch, heads, tokens, dim], halves."""
        op, half = self.op, self.ints(self.dim // 2)
        one, axis = self.ints(1), self.ints(3)
        first = op.slice(x, self.ints(0), half, one, axis)
        second = op.slice(x, half, self.ints(np.iinfo(np.int64).max), one, axis)
        turned = op.concat([op.multiply(second, op.constant(np.float32(-1))), first], -1)
        return op.add(op.multiply(x, cos), op.multiply(turned, sin))

    def cached(self, x: Any, name: str, batch: Any, beam: Any) -> Any:
        """What was there before, and x, [batch, kv heads, all tokens, dim]; repeated for the query heads."""
        op, ov = self.op, self.ov
        shape = ov.PartialShape([-1, self.kv_heads, -1, self.dim])
        empty = op.concat([batch, self.ints(self.kv_heads), self.ints(0), self.ints(self.dim)], 0)
        info = ov.op.util.VariableInfo()
        info.data_shape, info.data_type, info.variable_id = shape, ov.Type.f32, name
        variable = ov.op.util.Variable(info)
        past = ov.op.read_value(op.broadcast(op.constant(np.float32(0)), empty), variable)
        both = op.concat([op.gather(past, beam, self.scalar(0)), x], 2)
        self.sinks.append(ov.op.assign(both, variable))
        repeat = self.heads // self.kv_heads
        if repeat == 1:
            return both
        sizes = op.shape_of(both)
        wide = op.concat(
            [
                op.gather(sizes, self.ints(0, 1), self.scalar(0)), self.ints(repeat),
                op.gather(sizes, self.ints(2, 3), self.scalar(0)),
            ],
            0,
        )  # fmt: skip
        copies = op.broadcast(op.unsqueeze(both, self.scalar(2)), wide, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(copies, self.ints(0, self.heads, -1, self.dim), True)

    def split(self, x: Any, heads: int, norm: str) -> Any:
        """[batch, heads, tokens, dim], each head normalised where the model does so."""
        op = self.op
        x = op.reshape(x, self.ints(0, 0, heads, self.dim), True)
        if f"{norm}.weight" in self.weights:
            x = self.rmsnorm(x, norm)
        return op.transpose(x, self.ints(0, 2, 1, 3))

    def model(self) -> Any:
        """The whole model."""
        ov, op, config = self.ov, self.op, self.config
        inputs = [op.parameter([-1, -1], np.int64) for _ in INPUTS[:3]]
        inputs.append(op.parameter([-1], np.int32))
        for node, name in zip(inputs, INPUTS, strict=True):
            node.set_friendly_name(name)
            node.output(0).set_names({name})
        ids, mask, positions, beam = inputs
        zero, batch = self.scalar(0), op.gather(op.shape_of(ids), self.ints(0), self.scalar(0))
        embed = self.matrix("model.embed_tokens.weight", 8, 0, True)
        x = op.gather(embed, op.convert(ids, "i32"), zero)
        base = float(config.get("rope_theta", 10000.0))
        frequencies = (base ** -(np.arange(0, self.dim, 2, dtype=np.float32) / self.dim)).astype(np.float32)
        angles = op.matmul(
            op.broadcast(
                op.constant(frequencies[None, :, None]),
                op.concat([batch, self.ints(1), self.ints(1)], 0),
                broadcast_spec="BIDIRECTIONAL",
            ),
            op.convert(op.unsqueeze(positions, self.scalar(1)), "f32"),
            False,
            False,
        )
        angles = op.transpose(angles, self.ints(0, 2, 1))
        both = op.concat([angles, angles], -1)
        cos, sin = op.unsqueeze(op.cos(both), self.scalar(1)), op.unsqueeze(op.sin(both), self.scalar(1))
        length = op.gather(op.shape_of(mask), self.scalar(1), zero)
        keys = op.unsqueeze(op.range(zero, length, self.scalar(1), "i64"), self.ints(0, 1, 2))
        seen = op.less_equal(keys, op.unsqueeze(positions, self.ints(1, 3)))
        seen = op.logical_and(seen, op.convert(op.unsqueeze(mask, self.ints(1, 2)), "boolean"))
        bias = op.select(seen, op.constant(np.float32(0)), op.constant(np.float32(-65504)))
        for i in range(config["num_hidden_layers"]):
            p = f"model.layers.{i}."
            h = self.rmsnorm(x, p + "input_layernorm")
            q, k, v = (self.linear(h, f"{p}self_attn.{n}_proj") for n in "qkv")
            q = self.rotated(self.split(q, self.heads, p + "self_attn.q_norm"), cos, sin)
            k = self.rotated(self.split(k, self.kv_heads, p + "self_attn.k_norm"), cos, sin)
            v = self.split(v, self.kv_heads, "")
            k, v = (
                self.cached(a, f"past_key_values.{i}.{n}present.{i}.{n}", batch, beam)
                for a, n in ((k, "key"), (v, "value"))
            )
            a = op.transpose(op.scaled_dot_product_attention(q, k, v, bias), self.ints(0, 2, 1, 3))
            a = op.reshape(a, self.ints(0, 0, self.heads * self.dim), True)
            x = op.add(x, self.linear(a, p + "self_attn.o_proj"))
            h = self.rmsnorm(x, p + "post_attention_layernorm")
            gate = op.swish(self.linear(h, p + "mlp.gate_proj"))
            x = op.add(
                x, self.linear(op.multiply(gate, self.linear(h, p + "mlp.up_proj")), p + "mlp.down_proj")
            )
        last = op.slice(x, self.ints(-1), self.ints(np.iinfo(np.int64).max), self.ints(1), self.ints(1))
        head = embed if "lm_head.weight" not in self.weights else self.matrix("lm_head.weight", 8, 0, True)
        logits = op.matmul(self.rmsnorm(last, "model.norm"), head, False, True)
        logits.output(0).set_names({"logits"})
        return ov.Model([op.result(logits)], self.sinks, inputs, "random")


def write(checkpoint: Path, out: Path, mode: str) -> None:
    """`checkpoint`: a folder of config.json and model.safetensors; out: a folder to make, for openvino_model.xml."""
    import openvino as ov

    config = json.loads((checkpoint / "config.json").read_text())
    weights = dict(gguf_checkpoint.tensors(checkpoint / "model.safetensors"))
    graph = Graph(config, weights, mode)
    model = graph.model()
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config))
    ov.save_model(model, out / "openvino_model.xml", compress_to_fp16=False)
