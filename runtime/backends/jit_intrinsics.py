"""Numba intrinsics of the JIT kernels beside the matrix tile: attention's two products, memory, bits, calls.

A `spec` is a literal string "isa|half or soft|..." of the caller; addresses are int64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from halfbyte.formats.encodings import FLOAT_BYTES
from halfbyte.runtime.backends.jit_isa import F32, I64, LANES, Emitter
from halfbyte.runtime.backends.jit_tiles import accumulators, emitter, loop

# ---- attention --------------------------------------------------------------------------------

_EIGHT = 8  # positions whose lane sums are added together


@intrinsic(prefer_literal=True)
def kv_dots(
    typingctx: Any, spec: Any, kind: Any, q: Any, k: Any, dim: Any, row: Any, n: Any, out: Any
) -> Any:
    """out[j] = sum over the first dim // 16 * 16 columns of q * k[j]; k rows are `row` bytes apart.

    16 lanes of fused sums, then neighbouring lanes added pairwise: the same for every j and n.
    """
    text, stored = spec.literal_value, kind.literal_value

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        e, b = emitter(builder, text), builder
        _, _, q_, k_, dim_, row_, n_, out_ = values
        size = FLOAT_BYTES[stored]
        chunks = b.sdiv(dim_, e.i64(LANES))
        even, odd = list(range(0, 32, 2)), list(range(1, 32, 2))

        def rows(first: ir.Value, count: int) -> None:
            base = [e.offset(k_, e.scaled(b.add(first, e.i64(r)), row_)) for r in range(count)]
            acc = accumulators(b, count)
            with loop(b, e.i64(0), chunks) as (c, _):
                x = e.load_floats(e.offset(q_, e.scaled(c, LANES * 4)), "f32")
                for r in range(count):
                    y = e.load_floats(e.offset(base[r], e.scaled(c, LANES * size)), stored)
                    b.store(e.fma(x, y, b.load(acc[r])), acc[r])
            level = [b.load(a) for a in acc]
            while len(level) > 1:
                level = [
                    b.fadd(e.pick(lo, hi, even), e.pick(lo, hi, odd))
                    for lo, hi in zip(level[::2], level[1::2])
                ]
            v = level[0]
            while v.type.count > count:
                v = b.fadd(e.pick(v, v, even[: v.type.count // 2]), e.pick(v, v, odd[: v.type.count // 2]))
            e.store(v, e.offset(out_, e.scaled(first, 4)))

        groups = b.sdiv(n_, e.i64(_EIGHT))
        with loop(b, e.i64(0), groups) as (i, _):
            rows(e.scaled(i, _EIGHT), _EIGHT)
        with loop(b, e.scaled(groups, _EIGHT), n_) as (i, _):
            rows(i, 1)
        return context.get_dummy_value()

    i = types.int64
    return types.void(spec, kind, i, i, i, i, i, i), generate


@intrinsic(prefer_literal=True)
def kv_weighted(
    typingctx: Any, spec: Any, kind: Any, p: Any, v: Any, dim: Any, row: Any, n: Any, out: Any
) -> Any:
    """out[c] = fma(p[j], v[j, c], out[c]) for ascending j < n, over the first dim // 16 * 16 columns."""
    text, stored = spec.literal_value, kind.literal_value

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        e, b = emitter(builder, text), builder
        _, _, p_, v_, dim_, row_, n_, out_ = values
        size = FLOAT_BYTES[stored]
        chunks = b.sdiv(dim_, e.i64(LANES))

        def columns(first: ir.Value, count: int) -> None:
            at = [e.offset(out_, e.scaled(first, LANES * 4), c * LANES * 4) for c in range(count)]
            base = e.offset(v_, e.scaled(first, LANES * size))
            acc = accumulators(b, count)
            for c in range(count):
                b.store(e.load_floats(at[c], "f32"), acc[c])
            with loop(b, e.i64(0), n_) as (j, _):
                weight = e.splat(e.load(e.offset(p_, e.scaled(j, 4)), F32, 4))
                line = e.offset(base, e.scaled(j, row_))
                for c in range(count):
                    y = e.load_floats(e.offset(line, c * LANES * size), stored)
                    b.store(e.fma(weight, y, b.load(acc[c])), acc[c])
            for c in range(count):
                e.store(b.load(acc[c]), at[c])

        fours = b.sdiv(chunks, e.i64(4))
        with loop(b, e.i64(0), fours) as (i, _):
            columns(e.scaled(i, 4), 4)
        with loop(b, e.scaled(fours, 4), chunks) as (i, _):
            columns(i, 1)
        return context.get_dummy_value()

    i = types.int64
    return types.void(spec, kind, i, i, i, i, i, i), generate


# ---- memory, bits, calls ------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def load_value(typingctx: Any, spec: Any, kind: Any, address: Any) -> Any:
    """The f32, f16 or bf16 value at an address as float32."""
    text, stored = spec.literal_value, kind.literal_value

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        return emitter(builder, text).load_floats(values[2], stored, 0)

    return types.float32(spec, kind, types.int64), generate


@intrinsic(prefer_literal=True)
def store_value(typingctx: Any, spec: Any, kind: Any, address: Any, value: Any) -> Any:
    """Store a float32 as f32 or f16 (to nearest even)."""
    text, stored = spec.literal_value, kind.literal_value

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        e = emitter(builder, text)
        v = values[3] if stored == "f32" else e.float_to_half(values[3])
        e.store(v, values[2], 4 if stored == "f32" else 2)
        return context.get_dummy_value()

    return types.void(spec, kind, types.int64, types.float32), generate


def _pointer_to(ty: types.Type) -> Callable:
    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], context.get_value_type(types.CPointer(ty)))

        return types.CPointer(ty)(types.int64), generate

    return pointer


f32_at = _pointer_to(types.float32)
i8_at = _pointer_to(types.int8)
u8_at = _pointer_to(types.uint8)
i32_at = _pointer_to(types.int32)
i64_at = _pointer_to(types.int64)


def _bits(source: types.Type, target: types.Type) -> Callable:
    @intrinsic
    def bits(typingctx: Any, value: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            return builder.bitcast(values[0], context.get_value_type(target))

        return target(source), generate

    return bits


f32_bits = _bits(types.float32, types.int32)
bits_f32 = _bits(types.int32, types.float32)
f64_bits = _bits(types.float64, types.int64)
bits_f64 = _bits(types.int64, types.float64)


@intrinsic
def fma32(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """A real fused multiply-add of float32."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        return Emitter(builder, "scalar", False).fma(*values)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic(prefer_literal=True)
def keyed(typingctx: Any, key: Any) -> Any:
    """Nothing; a closure variable that only this names still makes the disk cache tell kernels apart."""
    return types.void(key), lambda context, builder, signature, values: context.get_dummy_value()


@intrinsic
def call_kernel(typingctx: Any, address: Any, args: Any, index: Any, worker: Any) -> Any:
    """kernel(args, index, worker) for a kernel's address."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        ty = ir.FunctionType(ir.VoidType(), [I64.as_pointer(), I64, I64])
        f = builder.inttoptr(values[0], ty.as_pointer())
        builder.call(f, [builder.inttoptr(values[1], I64.as_pointer()), values[2], values[3]])
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, i), generate


@intrinsic
def fetch_add(typingctx: Any, address: Any) -> Any:
    """The int64 at an address, which one thread at a time increments."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        p = builder.inttoptr(values[0], I64.as_pointer())
        return builder.atomic_rmw("add", p, ir.Constant(I64, 1), "monotonic")

    return types.int64(types.int64), generate
