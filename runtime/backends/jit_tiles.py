"""The JIT's matrix products: words of a task, how a kernel reads a p16 matrix, one tile of tokens x panel.

A kernel is `void(args, index, worker)`; `args` points at int64 words whose places are named below
(addresses, strides in elements, sizes). A kernel's `spec` is a literal string, so that each choice
(ISA, encoding, block) is compiled by itself and Numba's disk cache tells them apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from halfbyte.formats.encodings import BY_NAME, FLOAT_BYTES, Q4_SHIFT
from halfbyte.runtime.backends.jit_isa import F32, I8, I32, I64, LANES, UNSIGNED_DOT, VF32, VI32, Emitter

# Words of every task: the kernel's address, how many indices, whether they are worth several threads.
KERNEL, COUNT, PARALLEL, ROWS = 0, 1, 2, 3
X, X_STRIDE, Y, Y_STRIDE, WIDTH, X2, X2_STRIDE = 4, 5, 6, 7, 8, 9, 10
# Matrices and the linear op.
CODES, CODES_PANEL, SCALES, SCALES_PANEL, MINS, ZEROS, ROW = 11, 12, 13, 14, 15, 16, 17
OUT, GROUPS, PER_GROUP, BLOCKS, BIAS, XQ, XQ_ROW, XD, XD_ROW, XSUM, SPAN, BLOCK = range(18, 30)
# Vectors and the other ops (floats are the bits of a float64).
WEIGHT, SHIFT, DIM, EPS, COS, SIN, HALF, SCALE, CAP, IDS = range(30, 40)
POSITIONS, SESSIONS, KV, KV_SESSIONS, KV_HEADS, K_DIM, V_DIM, WINDOW, SCRATCH, SCRATCH_ROW = range(40, 50)
WORDS = 50

_AHEAD = 4096  # bytes


class MatrixSpec(NamedTuple):
    """How a kernel reads a matrix. `block`: columns of one integer dot; `single`: one block per group."""

    isa: str
    halves: str  # 'half' | 'soft'
    policy: str
    encoding: str
    scale_type: str
    block: int
    single: bool
    digest: str

    @staticmethod
    def parse(text: str) -> MatrixSpec:
        """The inverse of `text`."""
        p = text.split("|")
        return MatrixSpec(p[0], p[1], p[2], p[3], p[4], int(p[5]), p[6] == "True", p[7])

    @property
    def text(self) -> str:
        """The literal given to intrinsics and to the cache."""
        return "|".join(str(v) for v in self)


def emitter(builder: ir.IRBuilder, spec: str) -> Emitter:
    """The emitter that a spec's first two fields ask for."""
    isa, halves = spec.split("|")[:2]
    return Emitter(builder, isa, halves == "half")


def token_tiles(isa: str, integer: bool) -> tuple[int, ...]:
    """Tokens that one pass over a panel serves, largest first; bounded by the vector registers."""
    return (12, 4, 1) if integer and isa == "avx512vnni" else (4, 1)


class _Matrix:
    """The planes of one panel of the matrix that `args` describes."""

    def __init__(self, e: Emitter, spec: MatrixSpec, args: ir.Value, panel: ir.Value):
        self.e, self.spec, self.args = e, spec, args
        self.encoding = BY_NAME[spec.encoding]
        self.codes = e.offset(self.word(CODES), e.scaled(panel, self.word(CODES_PANEL)))
        if self.encoding.is_float:
            return
        at = e.scaled(panel, self.word(SCALES_PANEL))
        self.scales = e.offset(self.word(SCALES), at)
        self.mins = e.offset(self.word(MINS), at)
        self.zeros = e.offset(self.word(ZEROS), e.scaled(e.scaled(panel, self.word(GROUPS)), LANES))
        if self.encoding.row_scale:
            self.row_scale = self._e6m2(e.offset(self.word(ROW), e.scaled(panel, LANES)))

    def word(self, k: int) -> ir.Value:
        """args[k]."""
        return self.e.b.load(self.e.b.gep(self.args, [self.e.i64(k)]))

    def bytes16(self, address: ir.Value) -> ir.Value:
        """16 uint8 -> <16 x i32>."""
        return self.e.b.zext(self.e.load(address, ir.VectorType(I8, LANES), 1), VI32)

    def _e6m2(self, address: ir.Value) -> ir.Value:
        e, b = self.e, self.e.b
        r = self.bytes16(address)
        exponent = b.shl(b.add(b.lshr(r, e.const(VI32, 2)), e.const(VI32, 127 - 60)), e.const(VI32, 23))
        bits = b.or_(exponent, b.shl(b.and_(r, e.const(VI32, 3)), e.const(VI32, 21)))
        zero = b.icmp_unsigned("==", r, e.const(VI32, 0))
        return b.bitcast(b.select(zero, e.const(VI32, 0), bits), VF32)

    def parameters(self, g: ir.Value) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """Of group g, 16 lanes each: scale, what to add to the level (f32 integers), min."""
        e, b, enc = self.e, self.e.b, self.encoding
        if enc.row_scale:
            raw = self.bytes16(e.offset(self.scales, e.scaled(g, LANES)))
            k = b.sub(b.and_(raw, e.const(VI32, 254)), e.const(VI32, 127))
            shift = b.mul(b.and_(raw, e.const(VI32, 1)), e.const(VI32, Q4_SHIFT))
            return b.fmul(self.row_scale, b.sitofp(k, VF32)), b.sitofp(shift, VF32), None
        at = e.scaled(g, LANES * FLOAT_BYTES[self.spec.scale_type])
        s = e.load_floats(e.offset(self.scales, at), self.spec.scale_type)
        if enc.offset == "min":
            return s, None, e.load_floats(e.offset(self.mins, at), self.spec.scale_type)
        if enc.offset == "zero":
            z = b.sitofp(self.bytes16(e.offset(self.zeros, e.scaled(g, LANES))), VF32)
            return s, b.fsub(e.const(VF32, 0.0), z), None
        return s, None, None

    def integer_offset(self, shift: ir.Value | None) -> ir.Value | None:
        """What level - operand of the dot is, per lane, given the group's own shift."""
        e, enc, unsigned = self.e, self.encoding, self.spec.isa in UNSIGNED_DOT
        if enc.bits == 4:
            constant = (-128 if unsigned else 0) if enc.row_scale else enc.levels[0]  # type: ignore[index]
        elif enc.signed:
            constant = -128 if unsigned else 0
        else:
            constant = 0 if unsigned else 128
        if not constant:
            return shift
        c = e.const(VF32, float(constant))
        return c if shift is None else e.b.fadd(c, shift)

    def nibbles(self, raw: ir.Value, shift: ir.Value | None = None) -> ir.Value:
        """The 4-bit codes of 4 columns as bytes."""
        b = self.e.b
        return b.and_(raw if shift is None else b.lshr(raw, shift), self.e.const(VI32, 0x0F0F0F0F))

    def operands(self, i: ir.Value) -> list[ir.Value]:
        """Integer operands of block i, one <16 x i32> (4 columns of 16 rows) per 4 columns."""
        e, b, enc, block = self.e, self.e.b, self.encoding, self.spec.block
        unsigned = self.spec.isa in UNSIGNED_DOT
        if enc.bits == 8:
            base = e.offset(self.codes, e.scaled(i, block * LANES))
            out = [e.load(e.offset(base, q * 64), VI32, 64) for q in range(block // 4)]
            if enc.signed == unsigned:  # int8 for a uint8 operand or the reverse: move by 128
                out = [b.xor(w, e.const(VI32, 0x80808080 - (1 << 32))) for w in out]
            return out
        if block == 4:
            raw = e.load(e.offset(self.codes, e.scaled(b.lshr(i, e.i64(1)), 64)), VI32, 64)
            odd = b.trunc(b.and_(i, e.i64(1)), I32)
            out = [self.nibbles(raw, e.splat(b.shl(odd, ir.Constant(I32, 2))))]
        else:
            base = e.offset(self.codes, e.scaled(i, block * LANES // 2))
            out = []
            for q in range(block // 8):
                raw = e.load(e.offset(base, q * 64), VI32, 64)
                out += [self.nibbles(raw), self.nibbles(raw, e.const(VI32, 4))]
        if enc.row_scale:
            table = [v + (128 if unsigned else 0) for v in enc.levels or ()]
            out = [e.lookup(table, w) for w in out]
        return out

    def prefetch(self, i: ir.Value) -> None:
        """Ask for the codes that are _AHEAD bytes beyond block i: the hardware stops at pages."""
        e, size = self.e, self.spec.block * LANES * self.encoding.bits // 8
        base = e.offset(self.codes, e.scaled(i, size), _AHEAD)
        hints = [ir.Constant(I32, v) for v in (0, 3, 1)]  # read, keep, data
        for at in range(0, size, 64):
            e.call("llvm.prefetch.p0", ir.VoidType(), e.at(e.offset(base, at), I8), *hints)

    def floats(self, quad: ir.Value, j: int, s: Any, shift: Any, m: Any) -> ir.Value:
        """float32 weights of column 4 * quad + j, by the formulas of formats/encodings.py."""
        e, b, enc = self.e, self.e.b, self.encoding
        if enc.is_float:
            size = LANES * FLOAT_BYTES[enc.name]
            at = e.offset(self.codes, e.scaled(quad, 4 * size), j * size)
            return e.load_floats(at, enc.name)
        if enc.bits == 8:
            raw = e.load(e.offset(self.codes, e.scaled(quad, 64)), VI32, 64)
        else:
            raw = e.load(e.offset(self.codes, e.scaled(b.lshr(quad, e.i64(1)), 64)), VI32, 64)
            odd = b.trunc(b.and_(quad, e.i64(1)), I32)
            raw = self.nibbles(raw, e.splat(b.shl(odd, ir.Constant(I32, 2))))
            if enc.row_scale:
                raw = e.lookup(enc.levels or (), raw)
        up = b.shl(raw, e.const(VI32, 24 - 8 * j))
        signed = enc.signed or enc.row_scale
        level = (b.ashr if signed else b.lshr)(up, e.const(VI32, 24))
        if enc.bits == 4 and not enc.row_scale and enc.levels and enc.levels[0]:
            level = b.add(level, e.const(VI32, enc.levels[0]))
        value = b.sitofp(level, VF32)
        if shift is not None:
            value = b.fadd(value, shift)  # small integers: exact
        w = b.fmul(s, value)
        return w if m is None else b.fadd(w, m)


def loop(b: ir.IRBuilder, start: ir.Value, stop: ir.Value) -> Any:
    """Context of an IR loop over start <= i < stop."""
    return cgutils.for_range_slice(b, start, stop, ir.Constant(I64, 1), I64)


def _min(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed("<", x, y), x, y)


def accumulators(b: ir.IRBuilder, n: int) -> list[ir.Value]:
    """n zeroed <16 x float> variables."""
    out = [cgutils.alloca_once(b, VF32) for _ in range(n)]
    for y in out:
        b.store(ir.Constant(VF32, [ir.Constant(F32, 0.0)] * LANES), y)
    return out


def _store_tile(m: _Matrix, ys: list[ir.Value], panel: ir.Value, token: ir.Value) -> None:
    """y[token + t, 16 * panel ...] = ys[t], leaving out the rows beyond the matrix."""
    e, b = m.e, m.e.b
    first = e.scaled(panel, LANES)
    left = b.sub(m.word(OUT), first)
    stride = e.scaled(m.word(Y_STRIDE), 4)
    base = e.offset(m.word(Y), e.scaled(token, stride), e.scaled(first, 4))
    at = [e.offset(base, e.scaled(stride, t)) for t in range(len(ys))]
    with b.if_else(b.icmp_signed(">=", left, e.i64(LANES))) as (whole, part):
        with whole:
            for y, address in zip(ys, at):
                e.store(y, address)
        with part:
            for y, address in zip(ys, at):
                with loop(b, e.i64(0), left) as (lane, _):
                    e.store(b.extract_element(y, b.trunc(lane, I32)), e.offset(address, e.scaled(lane, 4)))


def _emit_integer_tile(m: _Matrix, n: int, panel: ir.Value, token: ir.Value) -> None:
    e, b, spec = m.e, m.e.b, m.spec
    per32 = 32 // spec.block
    xq = e.offset(m.word(XQ), e.scaled(token, m.word(XQ_ROW)))
    xd = e.offset(m.word(XD), e.scaled(token, m.word(XD_ROW)))
    blocks = m.word(BLOCKS)
    xsum = e.offset(m.word(XSUM), e.scaled(e.scaled(token, blocks), 4))
    ys = accumulators(b, n)

    def block(i: ir.Value, s: ir.Value, offset: ir.Value | None, low: ir.Value | None) -> None:
        wide = i if per32 == 1 else b.udiv(i, e.i64(per32))
        x = e.offset(xq, e.scaled(wide, 32 * n))
        if per32 > 1:
            x = e.offset(x, e.scaled(b.urem(i, e.i64(per32)), spec.block))
        zero = e.const(VI32, 0)
        ways = 2 if n < 4 else 1  # two chains hide the dot's latency where tokens do not
        acc = [[zero] * ways for _ in range(n)]
        if n == 1:
            m.prefetch(i)
        for q, w in enumerate(m.operands(i)):
            for t in range(n):
                quad = e.load(e.offset(x, 32 * t + 4 * q), I32, 4)
                acc[t][q % ways] = e.dot4(acc[t][q % ways], w, quad)
        scale_at, sum_at = e.offset(xd, e.scaled(wide, 4 * n)), e.offset(xsum, e.scaled(i, 4 * n))
        for t in range(n):
            whole = acc[t][0]
            for more in acc[t][1:]:
                whole = b.add(whole, more)
            dot = b.sitofp(whole, VF32)
            d = e.splat(e.load(e.offset(scale_at, 4 * t), F32, 4))
            y = b.load(ys[t])
            if offset is not None or low is not None:
                total = e.splat(e.load(e.offset(sum_at, 4 * t), F32, 4))
                if offset is not None:  # integers below 2^24: exact
                    dot = e.fma(offset, total, dot)
            y = e.fma(dot, b.fmul(s, d), y)
            if low is not None:
                y = e.fma(low, b.fmul(d, total), y)
            b.store(y, ys[t])

    if spec.single:
        with loop(b, e.i64(0), blocks) as (i, _):
            s, shift, low = m.parameters(i)
            block(i, s, m.integer_offset(shift), low)
    else:
        per_group = m.word(PER_GROUP)
        with loop(b, e.i64(0), m.word(GROUPS)) as (g, _):
            s, shift, low = m.parameters(g)
            offset = m.integer_offset(shift)
            start = b.mul(g, per_group)
            with loop(b, start, _min(b, b.add(start, per_group), blocks)) as (i, _):
                block(i, s, offset, low)
    _store_tile(m, [b.load(y) for y in ys], panel, token)


def _emit_float_tile(m: _Matrix, n: int, panel: ir.Value, token: ir.Value) -> None:
    """Four partial sums a token (columns modulo 4), added as (0 + 1) + (2 + 3)."""
    e, b = m.e, m.e.b
    width = m.word(WIDTH)
    stride = e.scaled(m.word(X_STRIDE), 4)
    x = [e.offset(m.word(X), e.scaled(b.add(token, e.i64(t)), stride)) for t in range(n)]
    sums = [accumulators(b, 4) for _ in range(n)]
    quads, tail = b.sdiv(width, e.i64(4)), b.srem(width, e.i64(4))
    groups, per_group = m.word(GROUPS), m.word(PER_GROUP)  # PER_GROUP counts quads here

    def column(quad: ir.Value, j: int, parameters: tuple) -> None:
        w = m.floats(quad, j, *parameters)
        for t in range(n):
            value = e.splat(e.load(e.offset(x[t], e.scaled(quad, 16), 4 * j), F32, 4))
            b.store(e.fma(w, value, b.load(sums[t][j])), sums[t][j])

    with loop(b, e.i64(0), groups) as (g, _):
        parameters = (None, None, None) if m.encoding.is_float else m.parameters(g)
        start = b.mul(g, per_group)
        with loop(b, start, _min(b, b.add(start, per_group), quads)) as (quad, _):
            for j in range(4):
                column(quad, j, parameters)
        last = b.icmp_signed("==", g, b.sub(groups, e.i64(1)))
        for j in range(3):
            with b.if_then(b.and_(last, b.icmp_signed(">", tail, e.i64(j)))):
                column(quads, j, parameters)
    out = []
    for parts in sums:
        y0, y1, y2, y3 = (b.load(p) for p in parts)
        out.append(b.fadd(b.fadd(y0, y1), b.fadd(y2, y3)))
    _store_tile(m, out, panel, token)


@intrinsic(prefer_literal=True)
def matrix_tile(typingctx: Any, spec: Any, n: Any, args: Any, panel: Any, token: Any) -> Any:
    """y[token : token + n, rows of panel] = x @ matrix^T under the spec's policy."""
    text, tokens = spec.literal_value, n.literal_value

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        e, s = emitter(builder, text), MatrixSpec.parse(text)
        m = _Matrix(e, s, values[2], values[3])
        integer = s.policy == "i8g32" and not m.encoding.is_float
        (_emit_integer_tile if integer else _emit_float_tile)(m, tokens, values[3], values[4])
        return context.get_dummy_value()

    return types.void(spec, n, args, types.int64, types.int64), generate
