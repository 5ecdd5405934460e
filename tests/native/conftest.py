"""A rig that calls the C library below the Backend API: random matrices as stored, and programs of a few records."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from halfbyte.formats import encodings, program, tiles
from halfbyte.formats.container import Tensor
from halfbyte.runtime.arena import Arena
from halfbyte.runtime.backends import native

ISAS = ("scalar", "avx2", "avx512vnni", "neon", "dotprod", "i8mm", "avxvnni", "avx512vlvnni")


def aligned(data: np.ndarray) -> np.ndarray:
    """A copy of bytes that starts on a cache line, as in a mapped file, and ends where an overrun shows."""
    raw = np.zeros(len(data) + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + len(data)]
    out[:] = data
    return out


@dataclass
class Matrix:
    """A tensor as stored and its parts as the reference takes them."""

    tensor: Tensor
    data: np.ndarray
    codes: dict[str, np.ndarray] = field(default_factory=dict)
    values: np.ndarray | None = None


def random_codes(
    rng: np.random.Generator, e: encodings.Encoding, rows: int, cols: int, group: int, scale_type: str, extreme: bool
) -> dict[str, np.ndarray]:  # fmt: skip
    """Codes and scales by the plane's name, as stored; see `random_matrix`."""
    n, blocks = encodings.group_count(cols, group), encodings.group_count(cols, encodings.SUPER)
    low, high = (-128, 128) if e.signed else (0, 1 << e.bits)
    c = rng.integers(low, high, (rows, cols))
    if extreme:
        c = np.where(c * 2 < low + high, low, high - 1)
    if e.kind == "float8":  # neither infinite nor not a number
        c = np.where(np.isfinite(np.asarray(e.levels)[c]), c, 0x3C)
    out = {"codes": c.astype(np.int8 if e.signed else np.uint8)}

    def scales() -> np.ndarray:
        if extreme:
            return encodings.float_to_bits(np.full((rows, n), 0.25, np.float32), scale_type)
        return encodings.float_to_bits(rng.uniform(-0.02, 0.02, (rows, n)).astype(np.float32), scale_type)

    def two_level(name: str, above: str, byte: str) -> None:
        k = np.iinfo(byte)
        out[name] = np.full((rows, n), k.min or 64) if extreme else rng.integers(k.min, k.max + 1, (rows, n))
        out[name] = out[name].astype(byte)
        above_values = np.full((rows, blocks), 0.25) if extreme else rng.uniform(-2e-4, 2e-4, (rows, blocks))
        out[above] = above_values.astype(np.float16)

    if e.row_scale:
        out["scales"] = rng.integers(128 if extreme else 0, 130 if extreme else 256, (rows, n)).astype(
            np.uint8
        )
        row = np.where(rng.random(rows) < 0.1, 0, rng.integers(190, 215, rows))
        out["row"] = np.where(extreme, 240, row).astype(np.uint8)
    elif scale_type == encodings.K256:
        byte = "u1" if e.offset == "min" else "i1"
        two_level("scales", "super", byte)
        if e.offset == "min":
            two_level("mins", "supermin", byte)
    else:
        out["scales"] = scales()
        if e.offset == "min":
            out["mins"] = scales()
    if e.offset == "zero":
        out["zeros"] = rng.integers(0, (1 << e.bits) + (e.bits < 8), (rows, n)).astype(np.uint8)
    return out


def random_matrix(
    rng: np.random.Generator, encoding: str, rows: int, cols: int, group: int = 32, scale_type: str = "f16",
    extreme: bool = False,
) -> Matrix:  # fmt: skip
    """Uniform codes and scales of a useful size; `extreme`: the two end codes only, and power-of-two scales."""
    e = encodings.BY_NAME[encoding]
    codes: dict[str, np.ndarray] = {}
    if e.is_float:
        group, scale_type = 0, ""
        stored = encodings.float_to_bits(rng.standard_normal((rows, cols)).astype(np.float32), encoding)
        parts = {"values": tiles.pack_groups(stored)}
        values = encodings.bits_to_float(stored, encoding)
    else:
        group = e.group if e.group else group
        scale_type = {"f16": "f16", "sub7": ""}.get(e.scale, scale_type)
        if scale_type == encodings.K256 and not encodings.parameters_are_valid(e, group, scale_type):
            group, scale_type = 32, "f16"
        codes = random_codes(rng, e, rows, cols, group, scale_type, extreme)
        parts = tiles.pack_code_planes(codes["codes"], e.bits)
        for name, a in codes.items():
            if name != "codes":
                parts[name] = tiles.pack_groups(a.reshape(rows, -1))
        values = encodings.weights(*encodings.decode(encoding, codes, group, scale_type), group)
    data = np.zeros(tiles.nbytes(encoding, rows, cols, group, scale_type), np.uint8)
    for p in tiles.planes(encoding, rows, cols, group, scale_type):
        data[p.offset : p.offset + p.nbytes] = parts[p.name].view(np.uint8)
    tensor = Tensor("w", encoding, tiles.P16, (rows, cols), group, scale_type, 0, len(data))
    return Matrix(tensor, aligned(data), codes, values)


def vector(values: np.ndarray) -> Matrix:
    """A float32 vector as stored."""
    v = np.ascontiguousarray(values, np.float32)
    return Matrix(
        Tensor("v", "f32", tiles.ROWS, v.shape, 0, "", 0, v.nbytes), aligned(v.view(np.uint8)), values=v
    )


class Bound:
    """A program bound by hb_bind and its memory."""

    def __init__(self, records, slots, weights=(), caches=(), *, isa="best", threads=1, policy="i8g32"):
        self.ffi, self.lib = ffi, lib = native.load_library()
        self.slots = np.zeros(len(slots), program.SLOT_DTYPE)
        for i, (row, s) in enumerate(zip(self.slots, slots)):  # a width, or (width, base, offset, rows)
            width, base, offset, rows = s if isinstance(s, tuple) else (s, i, 0, 0)
            row["width"], row["base"], row["offset"], row["rows"] = width, base, offset, rows
        self.caches = np.array(list(caches), program.CACHE_DTYPE)
        self.records = np.array(records, program.OP_DTYPE)
        self.weights = weights
        table = ffi.new("hb_weight[]", max(1, len(weights)))
        for w, m in zip(table, weights):
            t = m.tensor
            w.data, w.nbytes = ffi.cast("void *", m.data.ctypes.data), len(m.data)
            w.encoding, w.tile, w.group = encodings.BY_NAME[t.encoding].code, t.tile, t.group
            w.rows, w.cols = t.shape if len(t.shape) == 2 else (1, t.shape[0])
            w.scale_type = encodings.SCALE_TYPES[t.scale_type]
        self.pool = ffi.gc(lib.hb_pool_create(threads), lib.hb_pool_free)
        self.error = ffi.new("char[256]")

        def cast(kind, a):
            return ffi.cast(f"{kind} *", a.ctypes.data)

        self.handle = lib.hb_bind(
            cast("hb_op", self.records), len(records), cast("hb_slot", self.slots), len(slots),
            cast("hb_cache", self.caches), len(self.caches), table, len(weights),
            {"f32": 0, "i8g32": 1}[policy], -1 if isa == "best" else ISAS.index(isa), self.pool, self.error, 256,
        )  # fmt: skip
        if self.handle == ffi.NULL:
            raise ValueError(ffi.string(self.error).decode())
        self.handle = ffi.gc(self.handle, lib.hb_free)

    def run(
        self, inputs, out, rows, *, ids=None, positions=None, sessions=None, picks=None, kvs=(), status=0
    ):
        """Fill slots `inputs`, run everything; float32 copy of slot `out`."""
        ffi = self.ffi
        arrays = {
            "ids": np.zeros(rows) if ids is None else ids,
            "positions": np.arange(rows) if positions is None else positions,
            "sessions": np.zeros(rows) if sessions is None else sessions,
            "pick_rows": [rows - 1] if picks is None else picks,
        }
        arrays = {k: np.ascontiguousarray(v, np.int32) for k, v in arrays.items()}
        n_picks = len(arrays["pick_rows"])
        arena = Arena(self.slots, rows, max(1, n_picks))
        for i, x in inputs.items():
            arena.view(i, rows)[:] = x
        step, base = ffi.new("hb_step *"), ffi.new("float *[]", len(self.slots))
        for i, s in enumerate(self.slots):
            if int(s["base"]) == i:
                base[i] = ffi.cast("float *", arena.base(i).ctypes.data)
        for name, a in arrays.items():
            setattr(step, name, ffi.cast("int32_t *", a.ctypes.data))
        table = ffi.new("hb_kv[]", max(1, len(kvs)))
        for row, kv in zip(table, kvs):
            row.pages, row.page_count = ffi.cast("void **", kv.table.ctypes.data), kv.table.shape[1]
            row.types = ffi.cast("uint32_t *", kv.words.ctypes.data)
        step.rows, step.picks, step.slot_base, step.kv, step.kv_count = rows, n_picks, base, table, len(kvs)
        assert self.lib.hb_run(self.handle, step, 0, len(self.records)) == status
        is_picks = int(self.slots[out]["rows"]) == program.PICKS
        return arena.view(out, n_picks if is_picks else rows).copy()


def index_vector(values: np.ndarray) -> Matrix:
    """A u32 vector as stored."""
    v = np.ascontiguousarray(values, np.uint32)
    return Matrix(Tensor("i", "u32", tiles.ROWS, v.shape, 0, "", 0, v.nbytes), aligned(v.view(np.uint8)))


def linear(matrix: Matrix, x: np.ndarray, bias: np.ndarray | None = None, **options) -> np.ndarray:
    """y = x @ matrix^T + bias through one LINEAR record."""
    rows, cols = matrix.tensor.shape
    record = program.record("linear", out=[1], ins=[0], weights=[0, None if bias is None else 1])
    weights = [matrix] if bias is None else [matrix, vector(bias)]
    return Bound([record], [cols, rows], weights, **options).run({0: x}, 1, len(x))


class Rig:
    """What tests/native shares."""

    ISAS = ISAS
    Bound = Bound
    linear = staticmethod(linear)
    random_matrix = staticmethod(random_matrix)
    vector = staticmethod(vector)
    index_vector = staticmethod(index_vector)

    @staticmethod
    def usable() -> list[str]:
        """The instruction sets that this machine can run."""
        lib = native.load_library()[1]
        return [n for i, n in enumerate(ISAS) if lib.hb_isa_supported(i)]


@pytest.fixture(scope="session")
def rig() -> type[Rig]:
    """The rig; the test is skipped, saying so, where the library is not built."""
    if native.library_path() is None:
        pytest.skip("the native library is not built (make native)")
    return Rig
