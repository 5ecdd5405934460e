"""Vector code of the JIT kernels: an LLVM IR emitter whose instruction choice depends on the ISA.

Vectors hold 16 lanes (the 16 rows of a p16 panel) or their 64 code bytes; LLVM splits them where
the machine's registers are shorter. Only the integer dot, the byte table lookup and the half
conversions need a choice by hand.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from llvmlite import binding, ir

from halfbyte.formats.errors import UsageError

LANES = 16
I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F16, F32 = ir.HalfType(), ir.FloatType()
VI32, VF32 = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)

# What each ISA needs of the CPU, best first. `neon` without dotprod is served by the generic code.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "avx512vnni": ("avx512f", "avx512bw", "avx512vnni"),
    "avxvnni": ("avx2", "avxvnni"),
    "avx2": ("avx2",),
    "dotprod": ("dotprod",),
    "scalar": (),
}
ALIASES = {"neon": "scalar", "i8mm": "dotprod"}
UNSIGNED_DOT = ("avx512vnni", "avxvnni")  # the first operand of the dot is uint8; elsewhere int8


def cpu_features() -> dict[str, bool]:
    """LLVM feature name -> present, for the CPU that Numba generates code for."""
    from numba.core import config

    forced = getattr(config, "CPU_FEATURES", None)  # NUMBA_CPU_FEATURES, NUMBA_CPU_NAME
    if forced is not None or getattr(config, "CPU_NAME", None) == "generic":
        listed = (forced or "").split(",")
        return {f[1:]: True for f in listed if f.startswith("+")}
    try:
        return dict(binding.get_host_cpu_features())
    except RuntimeError:  # not known on this platform
        return {}


def choose_isa() -> str:
    """The best ISA of this CPU, or the one HALFBYTE_ISA forces; UsageError when that cannot run here."""
    features = cpu_features()
    able = [isa for isa, needs in REQUIREMENTS.items() if all(features.get(f) for f in needs)]
    if "avx512vnni" in able and "avxvnni" not in able:  # the same instruction at 256 bits
        able.append("avxvnni")
    forced = os.environ.get("HALFBYTE_ISA", "")
    if not forced:
        return able[0]
    isa = ALIASES.get(forced, forced)
    if isa not in REQUIREMENTS:
        raise UsageError(
            f"HALFBYTE_ISA={forced} is unknown; there are {', '.join((*REQUIREMENTS, *ALIASES))}"
        )
    if isa not in able:
        raise UsageError(f"HALFBYTE_ISA={forced} needs a CPU with {', '.join(REQUIREMENTS[isa])}; unset it")
    return isa


def converts_halves(isa: str) -> bool:
    """Whether f16 <-> f32 is an instruction here (never assumed for `scalar`)."""
    return isa != "scalar" and (isa == "dotprod" or bool(cpu_features().get("f16c")))


class Emitter:
    """An IRBuilder with the vocabulary of the kernels. Addresses are i64 values."""

    def __init__(self, builder: ir.IRBuilder, isa: str, halves: bool):
        self.b, self.isa, self.halves = builder, isa, halves

    # ---- constants, memory --------------------------------------------------------------------

    def i64(self, n: int) -> ir.Constant:
        """An i64 constant."""
        return ir.Constant(I64, n)

    def vector(self, element: ir.Type, values: Sequence[float] | float, n: int = LANES) -> ir.Constant:
        """A constant vector; a single number is repeated."""
        values = list(values) if isinstance(values, (list, tuple)) else [values] * n  # type: ignore[list-item]
        return ir.Constant(ir.VectorType(element, len(values)), [ir.Constant(element, v) for v in values])

    def splat(self, scalar: ir.Value, n: int = LANES) -> ir.Value:
        """n copies of a scalar."""
        undef = ir.Constant(ir.VectorType(scalar.type, n), ir.Undefined)
        one = self.b.insert_element(undef, scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(
            one, undef, ir.Constant(ir.VectorType(I32, n), [ir.Constant(I32, 0)] * n)
        )

    def pick(self, a: ir.Value, b: ir.Value, lanes: Sequence[int]) -> ir.Value:
        """shufflevector with constant lanes."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), [ir.Constant(I32, i) for i in lanes])
        return self.b.shuffle_vector(a, b, mask)

    def at(self, address: ir.Value, ty: ir.Type) -> ir.Value:
        """An i64 address as a typed pointer."""
        return self.b.inttoptr(address, ty.as_pointer())

    def load(self, address: ir.Value, ty: ir.Type, align: int) -> ir.Value:
        """Load a value of `ty`."""
        value = self.b.load(self.at(address, ty))
        value.align = align
        return value

    def store(self, value: ir.Value, address: ir.Value, align: int = 4) -> None:
        """Store a value."""
        self.b.store(value, self.at(address, value.type)).align = align

    def offset(self, address: ir.Value, *terms: ir.Value | int) -> ir.Value:
        """address + the terms, in bytes."""
        for t in terms:
            address = self.b.add(address, self.i64(t) if isinstance(t, int) else t)
        return address

    def scaled(self, a: ir.Value, by: ir.Value | int) -> ir.Value:
        """a * by."""
        return self.b.mul(a, self.i64(by) if isinstance(by, int) else by)

    def call(self, name: str, returns: ir.Type, *args: ir.Value) -> ir.Value:
        """Call an LLVM intrinsic by its full name."""
        module = self.b.module
        f = module.globals.get(name)
        if f is None:
            f = ir.Function(module, ir.FunctionType(returns, [a.type for a in args]), name)
        return self.b.call(f, args)

    # ---- float --------------------------------------------------------------------------------

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """A real fused multiply-add of f32 vectors or scalars."""
        suffix = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
        return self.call(f"llvm.fma.{suffix}", a.type, a, b, c)

    def like(self, ty: ir.Type, element: ir.Type) -> ir.Type:
        """`element`, as wide as `ty`."""
        return ir.VectorType(element, ty.count) if isinstance(ty, ir.VectorType) else element

    def const(self, ty: ir.Type, n: float) -> ir.Constant:
        """n as a scalar or repeated in a vector."""
        if isinstance(ty, ir.VectorType):
            return self.vector(ty.element, n, ty.count)
        return ir.Constant(ty, n)

    def half_to_float(self, h: ir.Value) -> ir.Value:
        """IEEE binary16 bits (i16) -> f32, exact."""
        b, wide, flt = self.b, self.like(h.type, I32), self.like(h.type, F32)
        if self.halves:
            return b.fpext(b.bitcast(h, self.like(h.type, F16)), flt)
        bits = b.zext(h, wide)
        magnitude = b.and_(bits, self.const(wide, 0x7FFF))
        shifted = b.shl(magnitude, self.const(wide, 13))
        normal = b.add(shifted, self.const(wide, 112 << 23))
        special = b.add(shifted, self.const(wide, 224 << 23))
        tiny = b.bitcast(b.fmul(b.uitofp(magnitude, flt), self.const(flt, 2.0**-24)), wide)
        out = b.select(b.icmp_unsigned(">=", magnitude, self.const(wide, 0x7C00)), special, normal)
        out = b.select(b.icmp_unsigned("<", magnitude, self.const(wide, 0x400)), tiny, out)
        sign = b.shl(b.and_(bits, self.const(wide, 0x8000)), self.const(wide, 16))
        return b.bitcast(b.or_(out, sign), flt)

    def float_to_half(self, x: ir.Value) -> ir.Value:
        """f32 -> IEEE binary16 bits (i16), to nearest even."""
        b, wide, narrow = self.b, self.like(x.type, I32), self.like(x.type, I16)
        if self.halves:
            return b.bitcast(b.fptrunc(x, self.like(x.type, F16)), narrow)
        bits = b.bitcast(x, wide)
        magnitude = b.and_(bits, self.const(wide, 0x7FFFFFFF))
        odd = b.and_(b.lshr(magnitude, self.const(wide, 13)), self.const(wide, 1))
        rounded = b.add(b.add(magnitude, self.const(wide, 0xFFF)), odd)
        normal = b.lshr(b.sub(rounded, self.const(wide, 112 << 23)), self.const(wide, 13))
        # one unit of 0.5f's last place is the step of subnormal halves: adding 0.5 rounds to it
        sum_ = b.fadd(b.bitcast(magnitude, x.type), self.const(x.type, 0.5))
        tiny = b.sub(b.bitcast(sum_, wide), self.const(wide, 0x3F000000))
        out = b.select(b.icmp_unsigned("<", magnitude, self.const(wide, 0x38800000)), tiny, normal)
        out = b.select(
            b.icmp_unsigned(">=", magnitude, self.const(wide, 0x47800000)), self.const(wide, 0x7C00), out
        )
        out = b.select(
            b.icmp_unsigned(">", magnitude, self.const(wide, 0x7F800000)), self.const(wide, 0x7E00), out
        )
        sign = b.and_(b.lshr(bits, self.const(wide, 16)), self.const(wide, 0x8000))
        return b.trunc(b.or_(out, sign), narrow)

    def load_floats(self, address: ir.Value, kind: str, n: int = LANES) -> ir.Value:
        """n stored f32, f16 or bf16 values -> <n x float>; a scalar for n = 0."""

        def of(element: ir.Type) -> ir.Type:
            return ir.VectorType(element, n) if n else element

        if kind == "f32":
            return self.load(address, of(F32), 4)
        raw = self.load(address, of(I16), 2)
        if kind == "f16":
            return self.half_to_float(raw)
        wide = self.b.zext(raw, of(I32))
        return self.b.bitcast(self.b.shl(wide, self.const(of(I32), 16)), of(F32))

    # ---- integer ------------------------------------------------------------------------------

    def parts(self, v: ir.Value, n: int) -> list[ir.Value]:
        """v cut into n equal vectors."""
        width = v.type.count // n
        return [v] if n == 1 else [self.pick(v, v, range(i * width, (i + 1) * width)) for i in range(n)]

    def join(self, vs: list[ir.Value]) -> ir.Value:
        """The inverse of `parts` (n a power of two)."""
        while len(vs) > 1:
            vs = [self.pick(a, b, range(2 * a.type.count)) for a, b in zip(vs[::2], vs[1::2])]
        return vs[0]

    def as_bytes(self, v: ir.Value) -> ir.Value:
        """The same bits as bytes."""
        return self.b.bitcast(v, ir.VectorType(I8, v.type.count * 4))

    def dot4(self, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
        """acc[16] += dot of the 4 bytes of w's lane (uint8 or int8, see UNSIGNED_DOT) with x's 4 int8.

        acc, w: <16 x i32>; x: i32. Exact.
        """
        b = self.b
        if self.isa == "avx512vnni":
            return self.call("llvm.x86.avx512.vpdpbusd.512", VI32, acc, w, self.splat(x))
        if self.isa == "scalar":
            for j in range(4):
                up, down = self.const(VI32, 24 - 8 * j), self.const(VI32, 24)
                wj = b.ashr(b.shl(w, up), down)
                xj = b.ashr(b.shl(x, ir.Constant(I32, 24 - 8 * j)), ir.Constant(I32, 24))
                acc = b.add(acc, b.mul(wj, self.splat(xj)))
            return acc
        n = 4 if self.isa == "dotprod" else 2
        xs = self.splat(x, LANES // n)
        out = []
        for a, p in zip(self.parts(acc, n), self.parts(w, n)):
            if self.isa == "avxvnni":
                out.append(self.call("llvm.x86.avx512.vpdpbusd.256", a.type, a, p, xs))
            elif self.isa == "dotprod":
                name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
                out.append(self.call(name, a.type, a, self.as_bytes(p), self.as_bytes(xs)))
            else:
                out.append(b.add(a, self._pairs_avx2(self.as_bytes(p), self.as_bytes(xs))))
        return self.join(out)

    def _pairs_avx2(self, w: ir.Value, x: ir.Value) -> ir.Value:
        """<8 x i32> dots of 4 int8 pairs; |w| * sign(x, w) keeps a pair sum at 2 * 128 * 127 < 2^15."""
        short, word = ir.VectorType(I16, 16), ir.VectorType(I32, 8)
        sign = "llvm.x86.avx2.psign.b"
        magnitude, signed = self.call(sign, w.type, w, w), self.call(sign, w.type, x, w)
        pairs = self.call("llvm.x86.avx2.pmadd.ub.sw", short, magnitude, signed)
        return self.call("llvm.x86.avx2.pmadd.wd", word, pairs, self.vector(I16, 1))

    def lookup(self, table: Sequence[int], index: ir.Value) -> ir.Value:
        """Byte table lookup: <16 x i32> of byte indices -> <16 x i32> of table bytes (at most 16, or 2^n)."""
        b, half = self.b, len(table) // 2
        if half >= LANES:
            low = b.and_(index, self.const(VI32, (half - 1) * 0x01010101))
            chosen = b.and_(self.as_bytes(index), self.vector(I8, half, 64))
            upper, lower = (self.as_bytes(self.lookup(t, low)) for t in (table[half:], table[:half]))
            mask = b.icmp_unsigned("!=", chosen, self.vector(I8, 0, 64))
            return b.bitcast(b.select(mask, upper, lower), VI32)
        values = [v & 255 for v in table] + [0] * (LANES - len(table))
        how = {
            "avx512vnni": (1, "llvm.x86.avx512.pshuf.b.512"),
            "avxvnni": (2, "llvm.x86.avx2.pshuf.b"),
            "avx2": (2, "llvm.x86.avx2.pshuf.b"),
            "dotprod": (4, "llvm.aarch64.neon.tbl1.v16i8"),
        }.get(self.isa)
        index = self.as_bytes(index)
        if how:
            n, name = how
            t = self.vector(I8, values * (4 // n))
            looked = self.join([self.call(name, p.type, t, p) for p in self.parts(index, n)])
            return b.bitcast(looked, VI32)
        level: list[Any] = [self.vector(I8, v, 64) for v in values]
        for bit in range(4):  # a tree of selects, one level per bit of the index
            mask = b.and_(index, self.vector(I8, 1 << bit, 64))
            on = b.icmp_unsigned("!=", mask, self.vector(I8, 0, 64))
            level = [b.select(on, hi, lo) for lo, hi in zip(level[::2], level[1::2])]
        return b.bitcast(level[0], VI32)
