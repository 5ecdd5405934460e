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

from halfbyte.formats.encodings import BY_NAME, FLOAT_BYTES, K256, SUPER
from halfbyte.formats.tiles import CODE_BITS
from halfbyte.runtime.backends.jit_isa import F32, I8, I16, I32, I64, LANES, UNSIGNED_DOT, VF32, VI32, Emitter

# Words of every task: the kernel's address, how many indices, how many a thread takes at a time (0: run alone).
KERNEL, COUNT, CHUNK, ROWS = 0, 1, 2, 3
X, X_STRIDE, Y, Y_STRIDE, WIDTH, X2, X2_STRIDE = 4, 5, 6, 7, 8, 9, 10
# Matrices and the linear op.
CODES, CODES_PANEL, SCALES, SCALES_PANEL, MINS, ZEROS, ROW = 11, 12, 13, 14, 15, 16, 17
OUT, GROUPS, PER_GROUP, BLOCKS, BIAS, XQ, XQ_ROW, XD, XD_ROW, XSUM, SPAN, BLOCK = range(18, 30)
# Vectors and the other ops (floats are the bits of a float64).
WEIGHT, SHIFT, DIM, EPS, COS, SIN, HALF, SCALE, CAP, IDS = range(30, 40)
# SCRATCH_SIZE: floats of one thread; SCRATCH_ROW: of the scores of one query head.
POSITIONS, SESSIONS, KV, SCRATCH_SIZE, KV_HEADS, K_DIM, V_DIM, WINDOW, SCRATCH, SCRATCH_ROW = range(40, 50)
# Planes that some encodings have.
HIGH, HIGH_PANEL, SUPERS, SUPERS_PANEL, SUPERMINS = range(50, 55)
# Packed caches: the kernels that pack or unpack the first page and others, `query_steps` and `stages` of keys' side.
FIRST_PAGE, OTHER_PAGES, QUERY_STEPS, STAGES = range(55, 59)
WORDS = 64

_AHEAD = 4096  # bytes


class MatrixSpec(NamedTuple):
    """How a kernel reads a matrix.

    block: columns of one integer dot (for k256 in the float kernels: of a group); single: one block per group.
    """

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


def splat_byte(value: int) -> int:
    """The int32 of which every byte is `value`."""
    word = value * 0x01010101
    return word - (1 << 32) if word >> 31 else word


class _Matrix:
    """The planes of one panel of the matrix that `args` describes."""

    def __init__(self, e: Emitter, spec: MatrixSpec, args: ir.Value, panel: ir.Value):
        self.e, self.spec, self.args = e, spec, args
        self.encoding = enc = BY_NAME[spec.encoding]
        self.codes = e.offset(self.word(CODES), e.scaled(panel, self.word(CODES_PANEL)))
        if not enc.has_codes:
            return
        low, high = CODE_BITS[enc.bits]
        self.planes = [(self.codes, low, 0)]  # address, bits of a field, their place in the code
        if high:
            at = e.offset(self.word(HIGH), e.scaled(panel, self.word(HIGH_PANEL)))
            self.planes.append((at, high, low))
        at = e.scaled(panel, self.word(SCALES_PANEL))
        self.scales = e.offset(self.word(SCALES), at)
        self.mins = e.offset(self.word(MINS), at)
        at = e.scaled(panel, self.word(SUPERS_PANEL))
        self.supers = e.offset(self.word(SUPERS), at)
        self.supermins = e.offset(self.word(SUPERMINS), at)
        self.zeros = e.offset(self.word(ZEROS), e.scaled(e.scaled(panel, self.word(GROUPS)), LANES))
        if enc.row_scale:
            self.row_scale = self._e6m2(e.offset(self.word(ROW), e.scaled(panel, LANES)))
        if enc.is_integer:
            self._choose_operands()

    def _choose_operands(self) -> None:
        """How code bytes become operands of the dot: level = operand + constant, in steps or by table.

        The operand is uint8 or int8, as the ISA wants (UNSIGNED_DOT); `flip` moves bytes from one to the other.
        """
        enc, unsigned = self.encoding, self.spec.isa in UNSIGNED_DOT
        levels = [int(v) for v in enc.levels or range(256)]
        self.first, self.step, self.table = levels[0], levels[1] - levels[0], None
        if enc.signed:
            self.flip, self.constant = unsigned, -128 if unsigned else 0
        elif levels == list(range(levels[0], levels[-1] + 1, max(self.step, 1))):
            self.flip = not unsigned and levels[-1] - levels[0] > 127
            self.constant = levels[0] + (128 if self.flip else 0)
        else:
            self.table, self.flip = levels, False
            self.constant = -128 if unsigned else 0

    def word(self, k: int) -> ir.Value:
        """args[k]."""
        return self.e.b.load(self.e.b.gep(self.args, [self.e.i64(k)]))

    def bytes16(self, address: ir.Value, signed: bool = False) -> ir.Value:
        """16 uint8 or int8 -> <16 x i32>."""
        raw = self.e.load(address, ir.VectorType(I8, LANES), 1)
        return (self.e.b.sext if signed else self.e.b.zext)(raw, VI32)

    def _e6m2(self, address: ir.Value) -> ir.Value:
        e, b = self.e, self.e.b
        r = self.bytes16(address)
        exponent = b.shl(b.add(b.lshr(r, e.const(VI32, 2)), e.const(VI32, 127 - 60)), e.const(VI32, 23))
        bits = b.or_(exponent, b.shl(b.and_(r, e.const(VI32, 3)), e.const(VI32, 21)))
        zero = b.icmp_unsigned("==", r, e.const(VI32, 0))
        return b.bitcast(b.select(zero, e.const(VI32, 0), bits), VF32)

    def _two_level(self, g: ir.Value, above: ir.Value, below: ir.Value, signed: bool) -> ir.Value:
        """k256: the float of the 256 columns times the byte of group g."""
        e, b = self.e, self.e.b
        block = b.udiv(g, e.i64(SUPER // self.spec.block))
        wide = e.load_floats(e.offset(above, e.scaled(block, LANES * FLOAT_BYTES["f16"])), "f16")
        return b.fmul(wide, b.sitofp(self.bytes16(e.offset(below, e.scaled(g, LANES)), signed), VF32))

    def parameters(self, g: ir.Value) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """Of group g, 16 lanes each: scale, what to add to the level (f32 integers), min."""
        e, b, enc, minus = self.e, self.e.b, self.encoding, self.e.const(VF32, -0.0)
        if enc.row_scale:
            raw = self.bytes16(e.offset(self.scales, e.scaled(g, LANES)))
            k = b.sub(b.and_(raw, e.const(VI32, 254)), e.const(VI32, 127))
            shift = b.mul(b.and_(raw, e.const(VI32, 1)), e.const(VI32, enc.shift))
            return b.fmul(self.row_scale, b.sitofp(k, VF32)), b.sitofp(shift, VF32), None
        has_min = enc.offset == "min"
        if self.spec.scale_type == K256:
            s = self._two_level(g, self.supers, self.scales, signed=not has_min)
            if not has_min:
                return s, None, None
            return s, None, b.fsub(minus, self._two_level(g, self.supermins, self.mins, signed=False))
        at = e.scaled(g, LANES * FLOAT_BYTES[self.spec.scale_type])
        s = e.load_floats(e.offset(self.scales, at), self.spec.scale_type)
        if has_min:
            return s, None, e.load_floats(e.offset(self.mins, at), self.spec.scale_type)
        if enc.offset == "zero":
            z = b.sitofp(self.bytes16(e.offset(self.zeros, e.scaled(g, LANES))), VF32)
            return s, b.fsub(e.const(VF32, 0.0), z), None
        return s, None, None

    def integer_offset(self, shift: ir.Value | None) -> ir.Value | None:
        """What level - operand of the dot is, per lane, given the group's own shift."""
        if not self.constant:
            return shift
        c = self.e.const(VF32, float(self.constant))
        return c if shift is None else self.e.b.fadd(c, shift)

    def quads(self, i: ir.Value, n: int) -> list[ir.Value]:
        """Code bytes of quads i * n to i * n + n - 1 (4 columns of 16 rows each); n is a power of two."""
        e, b = self.e, self.e.b
        out: list[Any] = [None] * n
        for base, bits, place in self.planes:
            fields = 8 // bits  # quads in 64 bytes
            mask = e.const(VI32, splat_byte((1 << bits) - 1))
            if n >= fields:
                at = e.offset(base, e.scaled(i, n // fields * 64))
                words = [e.load(e.offset(at, k * 64), VI32, 64) for k in range(n // fields)]
            else:
                share = fields // n
                word = e.load(e.offset(base, e.scaled(b.udiv(i, e.i64(share)), 64)), VI32, 64)
                down = b.trunc(b.mul(b.urem(i, e.i64(share)), e.i64(n * bits)), I32)
                words = [b.lshr(word, e.splat(down))]
            for q in range(n):
                c = b.lshr(words[q // fields], e.const(VI32, q % fields * bits))
                c = c if bits == 8 else b.and_(c, mask)
                out[q] = b.or_(out[q], b.shl(c, e.const(VI32, place))) if place else c
        return out

    def operands(self, i: ir.Value) -> list[ir.Value]:
        """Integer operands of block i, one <16 x i32> (4 columns of 16 rows) per 4 columns."""
        e, b = self.e, self.e.b
        out = self.quads(i, self.spec.block // 4)
        if self.table is not None:
            table = [v - self.constant for v in self.table]
            return [e.lookup(table, c) for c in out]
        if self.step > 1:  # a power of two, and no level above 255: nothing crosses into the next byte
            out = [b.mul(c, e.const(VI32, self.step)) for c in out]
        return [b.xor(c, e.const(VI32, splat_byte(128))) for c in out] if self.flip else out

    def prefetch(self, i: ir.Value) -> None:
        """Ask for the codes that are _AHEAD bytes beyond block i: the hardware stops at pages."""
        e = self.e
        hints = [ir.Constant(I32, v) for v in (0, 3, 1)]  # read, keep, data
        for plane, bits, _ in self.planes:
            size = self.spec.block * LANES * bits // 8
            base = e.offset(plane, e.scaled(i, size), _AHEAD)
            for at in range(0, size, 64):
                e.call("llvm.prefetch.p0", ir.VoidType(), e.at(e.offset(base, at), I8), *hints)

    def _float8(self, code: ir.Value) -> ir.Value:
        """8-bit floats in the low bits of i32 -> f32, exact, by way of binary16."""
        e, b = self.e, self.e.b
        if self.encoding.name == "f8e5m2":
            return e.half_to_float(b.trunc(b.shl(code, e.const(VI32, 8)), e.like(VI32, I16)))
        magnitude = b.and_(code, e.const(VI32, 127))
        half = b.or_(b.shl(b.xor(code, magnitude), e.const(VI32, 8)), b.shl(magnitude, e.const(VI32, 7)))
        value = b.fmul(e.half_to_float(b.trunc(half, e.like(VI32, I16))), e.const(VF32, 256.0))
        nan = b.icmp_unsigned("==", magnitude, e.const(VI32, 127))
        return b.select(nan, e.const(VF32, float("nan")), value)

    def _levels(self, quad: ir.Value, j: int) -> ir.Value:
        """float32 levels of column 4 * quad + j, without the group's shift."""
        e, b, enc = self.e, self.e.b, self.encoding
        raw = self.quads(quad, 1)[0]
        signed = enc.signed
        if enc.is_integer and self.table is not None:
            raw, signed = e.lookup(self.table, raw), True
        up = b.shl(raw, e.const(VI32, 24 - 8 * j))
        code = (b.ashr if signed else b.lshr)(up, e.const(VI32, 24))
        if not enc.is_integer:
            return self._float8(code)
        if self.table is None and not enc.signed:
            code = b.add(b.mul(code, e.const(VI32, self.step)), e.const(VI32, self.first))
        return b.sitofp(code, VF32)

    def floats(self, quad: ir.Value, j: int, s: Any, shift: Any, m: Any) -> ir.Value:
        """float32 weights of column 4 * quad + j, by the formulas of formats/encodings.py."""
        e, b, enc = self.e, self.e.b, self.encoding
        if enc.is_float:
            size = LANES * FLOAT_BYTES[enc.name]
            at = e.offset(self.codes, e.scaled(quad, 4 * size), j * size)
            return e.load_floats(at, enc.name)
        value = self._levels(quad, j)
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
        integer = s.policy == "i8g32" and m.encoding.is_integer
        (_emit_integer_tile if integer else _emit_float_tile)(m, tokens, values[3], values[4])
        return context.get_dummy_value()

    return types.void(spec, n, args, types.int64, types.int64), generate
