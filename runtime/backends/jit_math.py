"""Functions of UNARY and GLU in float64, written so that LLVM can vectorise them.

exp follows the usual reduction x = k ln 2 + r, |r| <= ln 2 / 2, with ln 2 in two parts and a Taylor
polynomial of degree 9 (relative error below 1e-11; only a float32 of it is kept).
"""

from __future__ import annotations

import math

import numba

from halfbyte.formats.ops import FUNCTIONS
from halfbyte.runtime.backends.jit_intrinsics import bits_f64, f64_bits, fma64

_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_MAGIC = 6755399441055744.0  # 1.5 * 2^52: adding it leaves the nearest integer in the low bits
_SQRT_HALF, _GELU = math.sqrt(0.5), math.sqrt(2 / math.pi)
_C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9 = (1.0 / math.factorial(i) for i in range(2, 10))
_TINY_TANH = 1e-4

SCALE, SOFTCAP, SILU, GELU, GELU_TANH, RELU, SIGMOID, TANH = (
    FUNCTIONS[n] for n in ("scale", "softcap", "silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh")
)


@numba.njit(inline="always")
def exp64(x):
    """e^x in float64, flushed at e^-708 and capped at e^709; NaN stays."""
    x = -708.0 if x < -708.0 else x
    x = 709.0 if x > 709.0 else x
    shifted = fma64(x, _LOG2E, _MAGIC)
    k = shifted - _MAGIC
    r = fma64(-k, _LN2_LOW, fma64(-k, _LN2_HIGH, x))
    p = fma64(r, fma64(r, _C9, _C8), _C7)
    p = fma64(r, fma64(r, fma64(r, p, _C6), _C5), _C4)
    p = fma64(r, fma64(r, fma64(r, fma64(r, p, _C3), _C2), 1.0), 1.0)
    return p * bits_f64((f64_bits(shifted) + 1023) << 52)


@numba.njit(inline="always")
def tanh64(x):
    """tanh in float64; near zero its series, where 1 - 2 / (e^2x + 1) would cancel."""
    wide = 1.0 - 2.0 / (exp64(2.0 * x) + 1.0)
    near = x - x * x * x / 3.0
    return near if abs(x) < _TINY_TANH else wide


@numba.njit
def apply(function, x, p):
    """function(x; p) on float32, rounded once; `function` is a constant where this is inlined."""
    z = numba.float64(x)
    if function == SCALE:
        return numba.float32(p) * x
    if function == SOFTCAP:
        return numba.float32(p * tanh64(z / p))
    if function == SILU:
        return numba.float32(z / (1.0 + exp64(-z)))
    if function == GELU:
        return numba.float32(z * (1.0 + math.erf(z * _SQRT_HALF)) / 2.0)
    if function == GELU_TANH:
        return numba.float32(z * (1.0 + tanh64(_GELU * (z + 0.044715 * z * z * z))) / 2.0)
    if function == RELU:
        return x if not x < numba.float32(0.0) else numba.float32(0.0)
    if function == SIGMOID:
        return numba.float32(1.0 / (1.0 + exp64(-z)))
    return numba.float32(tanh64(z))
