"""ggml's tensor types: how a block of each holds its numbers, and the encoding that keeps them exactly.

Layouts after https://github.com/ggml-org/llama.cpp (ggml/src/ggml-common.h, ggml-quants.c). Types with a
codebook (IQ1 to IQ3) and NVFP4 have no encoding here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from halfbyte.converter.checkpoints.checkpoint import Packed
from halfbyte.formats.errors import CheckpointError

# All types by number, so that those that are not read can be named.
NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4",
}  # fmt: skip
SUPER = 256  # elements of a block of the K-quants

# The fields of blocks, uint8 [rows, blocks, bytes of a block], to the rows' codes and parameters.
_Unpack = Callable[[np.ndarray], Packed]


@dataclass(frozen=True)
class BlockType:
    """One type: elements and bytes of a block, the encoding (or float dtype) it becomes, its unpacker."""

    elements: int
    nbytes: int
    dtype: str
    unpack: _Unpack | None = None


def decode(data: np.ndarray, name: str) -> np.ndarray | Packed:
    """Bytes of whole rows, uint8 [rows, row_bytes], as the numbers or codes they hold."""
    kind = TYPES[name]
    if kind.unpack is not None:
        return kind.unpack(data.reshape(len(data), data.shape[1] // kind.nbytes, kind.nbytes))
    if name == "BF16":
        import ml_dtypes

        return data.view(ml_dtypes.bfloat16)
    return data.view({"F32": "<f4", "F16": "<f2"}[name])


def _rows(fields: np.ndarray) -> np.ndarray:
    """[rows, blocks, ...] -> [rows, all the rest]."""
    return np.ascontiguousarray(fields).reshape(len(fields), math.prod(fields.shape[1:]))


def _half(blocks: np.ndarray, offset: int) -> np.ndarray:
    """The float16 at that byte of every block: [rows, blocks]."""
    return np.ascontiguousarray(blocks[:, :, offset : offset + 2]).view("<f2")[:, :, 0]


def _nibbles(data: np.ndarray, run: int) -> np.ndarray:
    """4-bit fields: of each run of bytes first all low nibbles, then all high ones."""
    runs = data.reshape(*data.shape[:-1], data.shape[-1] // run, run)
    return np.concatenate([runs & 15, runs >> 4], axis=-1).reshape(*data.shape[:-1], 2 * data.shape[-1])


def _planes(data: np.ndarray, run: int, bits: int) -> np.ndarray:
    """Fields of 1 or 2 bits: of each run of bytes first the lowest field of all, then the next."""
    runs = data.reshape(*data.shape[:-1], data.shape[-1] // run, 1, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return ((runs >> shifts) & ((1 << bits) - 1)).reshape(*data.shape[:-1], 8 // bits * data.shape[-1])


def _bits32(data: np.ndarray) -> np.ndarray:
    """Bit i of four bytes, i = 0..31."""
    return np.unpackbits(data, axis=-1, bitorder="little")


def _simple(encoding: str, codes: Callable[[np.ndarray], np.ndarray], offset: int = 2) -> _Unpack:
    """Blocks of 32 with a float16 scale, a float16 minimum if offset is 4, and codes after that."""

    def unpack(blocks: np.ndarray) -> Packed:
        values = _rows(codes(blocks[:, :, offset:]))
        mins = _half(blocks, 2) if offset == 4 else None
        return Packed(
            encoding, 32, values.view(np.int8) if encoding == "q8" else values, _half(blocks, 0), mins
        )

    return unpack


def _five_bits(data: np.ndarray) -> np.ndarray:
    """Q5_0 and Q5_1: the fifth bits of all, then nibbles."""
    return _nibbles(data[:, :, 4:], 16) | _bits32(data[:, :, :4]) << 4


def _q2_k(blocks: np.ndarray) -> Packed:
    """Scales and minima of 4 bits a group of 16 share a byte; then 2-bit codes, d and dmin."""
    both = blocks[:, :, :16]
    codes = _planes(blocks[:, :, 16:80], 32, 2)
    return _two_level("a2", 16, codes, both & 15, _half(blocks, 80), both >> 4, _half(blocks, 82))


def _q3_k(blocks: np.ndarray) -> Packed:
    """High bits, low 2 bits, 16 scales of 6 bits (less 32) in 12 bytes, d."""
    codes = _planes(blocks[:, :, 32:96], 32, 2) | _planes(blocks[:, :, :32], 32, 1) << 2
    packed = blocks[:, :, 96:108]
    low, high = _nibbles(packed[:, :, :8], 8), _planes(packed[:, :, 8:], 4, 2)
    return _two_level("i3", 16, codes, (low | high << 4).view(np.int8) - np.int8(32), _half(blocks, 108))


def _scales_and_minima(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8 scales and 8 minima of 6 bits in the 12 bytes of Q4_K and Q5_K."""
    a, b, c = packed[:, :, :4], packed[:, :, 4:8], packed[:, :, 8:]
    scales = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=2)
    minima = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=2)
    return scales, minima


def _q4_k(blocks: np.ndarray) -> Packed:
    """d, dmin, scales and minima, nibbles: of 32 bytes, the low ones are one group and the high ones the next."""
    scales, minima = _scales_and_minima(blocks[:, :, 4:16])
    codes = _nibbles(blocks[:, :, 16:], 32)
    return _two_level("a4", 32, codes, scales, _half(blocks, 0), minima, _half(blocks, 2))


def _q5_k(blocks: np.ndarray) -> Packed:
    """As Q4_K, with bit g of byte j the fifth bit of column j of group g."""
    scales, minima = _scales_and_minima(blocks[:, :, 4:16])
    codes = _nibbles(blocks[:, :, 48:], 32) | _planes(blocks[:, :, 16:48], 32, 1) << 4
    return _two_level("a5", 32, codes, scales, _half(blocks, 0), minima, _half(blocks, 2))


def _q6_k(blocks: np.ndarray) -> Packed:
    """Two halves of 128: nibbles of 64 bytes and 2-bit fields of 32; then 16 int8 scales, d."""
    codes = _nibbles(blocks[:, :, :128], 64) | _planes(blocks[:, :, 128:192], 32, 2) << 4
    return _two_level("i6", 16, codes, blocks[:, :, 192:208].view(np.int8), _half(blocks, 208))


def _iq4_xs(blocks: np.ndarray) -> Packed:
    """d, the high 2 bits of 8 scales (less 32), their low 4 bits, nibbles into the table of IQ4_NL."""
    high = _planes(np.ascontiguousarray(blocks[:, :, 2:4, None]), 1, 2).reshape(*blocks.shape[:2], 8)
    low = np.stack([blocks[:, :, 4:8] & 15, blocks[:, :, 4:8] >> 4], axis=3).reshape(*blocks.shape[:2], 8)
    scales = (low | high << 4).view(np.int8) - np.int8(32)
    return _two_level("n4", 32, _nibbles(blocks[:, :, 8:], 16), scales, _half(blocks, 0))


def _two_level(
    encoding: str,
    group: int,
    codes: np.ndarray,
    scales: np.ndarray,
    d: np.ndarray,
    minima: np.ndarray | None = None,
    dmin: np.ndarray | None = None,
) -> Packed:
    """Scale type k256: w = (d * scale) * level - dmin * minimum."""
    mins = None if minima is None else _rows(minima)
    return Packed(encoding, group, _rows(codes), _rows(scales), mins, super=d, supermin=dmin)


def _mxfp4(blocks: np.ndarray) -> Packed:
    """A byte e and nibbles; w = 2^(e - 128) * level, the levels being doubled E2M1."""
    import ml_dtypes

    e = blocks[:, :, 0].astype(np.uint16)
    # 2^(e - 128) as bfloat16: exponent field e - 1, but for the two subnormal ones
    bits = np.where(
        e < 2, np.uint16(0x20) << np.minimum(e, 1), (np.maximum(e, 1) - np.uint16(1)) << np.uint16(7)
    )
    scales = bits.astype(np.uint16).view(ml_dtypes.bfloat16)
    return Packed("m4", 32, _rows(_nibbles(blocks[:, :, 1:], 16)), scales)


def _ternary(values: Callable[[np.ndarray], np.ndarray], offset: int) -> _Unpack:
    """Blocks of 256 values 0, 1, 2 that mean -1, 0, 1, and a float16 scale at `offset`."""

    def unpack(blocks: np.ndarray) -> Packed:
        codes = _rows(values(blocks))
        if (codes > 2).any():
            raise CheckpointError("a ternary tensor holds the code 3, which is no ternary weight")
        return Packed("i2", SUPER, codes + np.uint8(1), _half(blocks, offset))  # i2's code of -1 is 1

    return unpack


def _base3(blocks: np.ndarray) -> np.ndarray:
    """TQ1_0: five values of base 3 in a byte, as a fraction of 256; the last four bytes hold four.

    Digit n of byte b is (b * 3^n mod 256) * 3 / 256. Of 32 bytes, then of 16, then of 4, first all first digits.
    """
    parts = []
    for begin, count, digits in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        data = blocks[:, :, None, begin : begin + count]
        powers = np.array([3**n for n in range(digits)], np.uint8)[:, None]
        fraction = data * powers  # modulo 256
        parts.append(
            (fraction.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(*blocks.shape[:2], digits * count)
        )
    return np.concatenate(parts, axis=2)


TYPES = {
    "F32": BlockType(1, 4, "f32"),
    "F16": BlockType(1, 2, "f16"),
    "BF16": BlockType(1, 2, "bf16"),
    "Q4_0": BlockType(32, 18, "i4", _simple("i4", lambda d: _nibbles(d, 16))),
    "Q4_1": BlockType(32, 20, "a4", _simple("a4", lambda d: _nibbles(d, 16), 4)),
    "Q5_0": BlockType(32, 22, "i5", _simple("i5", _five_bits)),
    "Q5_1": BlockType(32, 24, "a5", _simple("a5", _five_bits, 4)),
    "Q8_0": BlockType(32, 34, "q8", _simple("q8", lambda d: d)),
    "Q2_K": BlockType(SUPER, 84, "a2", _q2_k),
    "Q3_K": BlockType(SUPER, 110, "i3", _q3_k),
    "Q4_K": BlockType(SUPER, 144, "a4", _q4_k),
    "Q5_K": BlockType(SUPER, 176, "a5", _q5_k),
    "Q6_K": BlockType(SUPER, 210, "i6", _q6_k),
    "IQ4_NL": BlockType(32, 18, "n4", _simple("n4", lambda d: _nibbles(d, 16))),
    "IQ4_XS": BlockType(SUPER, 136, "n4", _iq4_xs),
    "MXFP4": BlockType(32, 17, "m4", _mxfp4),
    "TQ1_0": BlockType(SUPER, 54, "i2", _ternary(_base3, 52)),
    "TQ2_0": BlockType(SUPER, 66, "i2", _ternary(lambda b: _planes(b[:, :, :64], 32, 2), 64)),
}
