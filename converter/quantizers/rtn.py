"""Round to nearest, with a search for the scales: `rtn`, the method that needs no data.

q8 follows the encoding's definition. The q family is the search that ggml made for its non-linear 4-bit types and
ik_llama.cpp for pairs of shifted tables, with one difference: the row scale is fixed first, and every
sub-scale near the optimum is then tried under it, so that the rounding of the scales is part of the search.
Results do not depend on the number of threads (`numba.set_num_threads`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from halfbyte.converter.quantizers import _grid
from halfbyte.formats import encodings
from halfbyte.formats.errors import CheckpointError, UsageError

__all__ = [
    "dequantize_q4",
    "dequantize_q8",
    "quantize_affine",
    "quantize_q4",
    "quantize_q8",
    "quantize_table",
]

BLOCK_WEIGHTS = 1 << 17  # weights of one unit of work: half a megabyte of float32
LARGEST_SCALE = 14.0 * 127.0  # row scale and sub-scale
EMPTY_SUB = 128  # sub-scale +1, table not shifted

# Where the best scale of a group lies, as a multiple of the scale that puts its largest value on the first level or on
# the last; and the multiples tried first, for the row scale. On Gaussian, Student-t5 and Laplace data, searching only
# here costs 0.02 % of the error for q2, 0.06 % for q3, 0.14 % for q4 and q5, 0.24 % for q6.
Range = tuple[float, float]
SEARCHES: dict[str, tuple[tuple[float, ...], tuple[Range, Range]]] = {
    "q2": ((0.60, 0.75, 0.95), ((0.54, 1.04), (0.46, 0.80))),
    "q3": ((0.84, 0.94, 1.05), ((0.80, 1.10), (0.77, 1.02))),
    "q4": ((0.95, 1.01, 1.08), ((0.90, 1.24), (0.90, 1.16))),
    "q5": ((0.97, 1.01, 1.08), ((0.95, 1.25), (0.95, 1.25))),
    "q6": ((0.99, 1.03), ((0.97, 1.20), (0.97, 1.20))),
}

# A column that calibration never excited may still be excited in use: it keeps this share of the mean.
IMPORTANCE_FLOOR = 1e-4

# Shares of a group's range cut off each end in the search for the range of a few bits.
CUTS = {
    2: (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3),
    3: (0.0, 0.04, 0.08, 0.12, 0.16, 0.2),
    4: (0.0, 0.025, 0.05, 0.075, 0.1),
    5: (0.0, 0.02, 0.04, 0.06),
    6: (0.0, 0.02, 0.04),
    8: (0.0,),
}
# Multiples of the full-range symmetric scale, tried with both signs.
RATIOS = {
    2: (0.4, 0.48, 0.56, 0.64, 0.72, 0.8, 0.88, 0.96, 1.04, 1.12, 1.2),
    3: (0.6, 0.66, 0.72, 0.78, 0.84, 0.9, 0.96, 1.02, 1.08, 1.14),
    4: (0.80, 0.84, 0.88, 0.92, 0.96, 1.0, 1.04, 1.08, 1.12),
    5: (0.88, 0.91, 0.94, 0.97, 1.0, 1.03, 1.06),
    6: (0.94, 0.96, 0.98, 1.0, 1.02, 1.04),
}


def _is_affine(e: encodings.Encoding) -> bool:
    levels = e.levels
    linear = levels is None or levels == tuple(range(int(levels[0]), int(levels[0]) + (1 << e.bits)))
    return e.kind == "codes" and e.scale == "*" and linear


AFFINE = tuple(e.name for e in encodings.ENCODINGS if _is_affine(e))


def quantize_q8(w: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """w[rows, cols] -> (codes int8[rows, cols], scales float16[rows, ceil(cols/32)]).

    s = f16(amax / 127), c = rint(x / s) within +-127. `importance` has no effect: at 8 bits a searched scale
    gains nothing. Raises CheckpointError for values that are not finite or whose scale overflows float16.
    """
    _check_importance(w, importance)
    codes, scales, _, _ = _affine(w, "q8", _grid.GROUP, "f16")
    return codes, scales.astype(np.float16)


def dequantize_q8(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(codes int8[rows, cols], scales float16[rows, groups]) -> float32[rows, cols]."""
    return encodings.dequantize("q8", codes, scales, _grid.GROUP)


def quantize_q4(
    w: np.ndarray, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`quantize_table` to q4."""
    return quantize_table(w, "q4", importance)


def quantize_table(
    w: np.ndarray, encoding: str, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w[rows, cols] -> (codes uint8[rows, cols], sub uint8[rows, groups], row uint8[rows]) of q2, q3, q4, q5 or q6.

    Minimises sum_j importance[j] * (w - w_hat)^2 in every group of 32 columns; without importance, the plain
    squared error. With importance[j] the mean square of input j this is the expected squared error of the
    layer's output for uncorrelated inputs. On return no step of one code or of one sub-scale lowers it.

    A group of zeros inside a row that is not zero cannot be stored exactly where the table has no zero level (all
    but q6): it becomes the level nearest to zero, for q4 about 1/16000 of the row's largest value. Rows below 2^-57
    become zero. Raises UsageError for another encoding, CheckpointError for values that are not finite or beyond
    the format's range (+-225806 for q4).
    """
    if encoding not in SEARCHES:
        raise UsageError(f"{encoding!r} has no searched table; choose one of: {', '.join(SEARCHES)}")
    _check_matrix(w)
    weights = _check_importance(w, importance)
    e = encodings.BY_NAME[encoding]
    assert e.levels
    rows, cols = w.shape
    groups = encodings.group_count(cols, _grid.GROUP)
    codes = np.full((rows, cols), np.argmin(np.abs(e.levels)), np.uint8)
    sub = np.full((rows, groups), EMPTY_SUB, np.uint8)
    row = np.zeros(rows, np.uint8)
    if w.size == 0:
        return codes, sub, row
    lane_weights = _lane_weights(weights, groups)
    limit = LARGEST_SCALE * max(-e.levels[0], e.levels[-1] + e.shift)
    table = (tuple(map(np.float32, e.levels)), np.float32(e.shift), *SEARCHES[encoding])

    def block(first: int, last: int, x: np.ndarray) -> None:
        low, high = _ranges(x, cols)
        peak = float(np.maximum(-low.min(), high.max()))  # unlike max(), keeps a NaN
        if not peak <= limit:
            raise CheckpointError(does_not_fit(encoding, peak))
        _grid.search(x, lane_weights, *table, codes[first:last], sub[first:last], row[first:last])

    _each_block(w, block)
    return codes, sub, row


def dequantize_q4(codes: np.ndarray, sub: np.ndarray, row: np.ndarray) -> np.ndarray:
    """(codes uint8[rows, cols], sub uint8[rows, groups], row uint8[rows]) -> float32[rows, cols]."""
    return encodings.dequantize("q4", codes, sub, _grid.GROUP, row=row)


def quantize_affine(
    w: np.ndarray, encoding: str, group: int, scale_type: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """w[rows, cols] -> (codes[rows, cols], scales[rows, groups], mins or None, zeros or None).

    encoding is one of AFFINE; group 0 means the whole row. codes are int8 for i8, else uint8. scales and mins are
    float32 that scale_type (f32, f16, bf16) holds exactly, zeros are uint8. At 8 bits the range of the group is used
    as it is; at fewer a search over narrower ranges keeps the smallest squared error. Scales are rounded before the
    codes are chosen; those of symmetric encodings of less than 8 bits may be negative. Raises UsageError for an
    impossible request, CheckpointError for values that are not finite or do not fit scale_type.
    """
    if encoding not in AFFINE:
        raise UsageError(f"{encoding!r} is not an affine encoding; choose one of: {', '.join(AFFINE)}")
    if scale_type not in encodings.FLOAT_BYTES:
        raise UsageError(f"unknown scale type {scale_type!r}; choose f32, f16 or bf16")
    if not encodings.group_is_valid(group):
        raise UsageError(f"group {group} is not allowed; choose 0, 4, 8, 16 or a multiple of 32")
    codes, scales, mins, zeros = _affine(w, encoding, group, scale_type)
    offset = encodings.BY_NAME[encoding].offset
    return codes, scales, mins if offset == "min" else None, zeros if offset == "zero" else None


def _affine(
    w: np.ndarray, encoding: str, group: int, scale_type: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales, minima (float32) and zeros (uint8) of q8 or an affine encoding."""
    _check_matrix(w)
    rows, cols = w.shape
    groups = encodings.group_count(cols, group)
    width = max(cols, 1) if group == encodings.WHOLE_ROW else group
    signed = encodings.BY_NAME[encoding].signed
    codes = np.zeros((rows, cols), np.int8)
    scales = np.zeros((rows, groups), np.float32)
    mins = np.zeros((rows, groups), np.float32)
    zeros = np.zeros((rows, groups), np.float32)
    bits = encodings.BY_NAME[encoding].bits
    least, most = (-127.0, 127.0) if signed else (0.0, 2.0**bits - 1)

    def block(first: int, last: int, x: np.ndarray) -> None:
        low, high = _ranges(x, width)
        peak = float(np.maximum(-low.min(), high.max()))  # unlike max(), keeps a NaN
        if not peak < np.inf:
            raise CheckpointError(does_not_fit(encoding, peak))
        limits = (np.float32(least), np.float32(most))
        error = np.empty(low.shape, np.float32)
        lowest = np.full(low.shape, np.inf, np.float32)
        out = (scales[first:last], mins[first:last], zeros[first:last])
        for candidate in candidates(
            encodings.BY_NAME[encoding], low.astype(np.float64), high.astype(np.float64), scale_type
        ):
            if not all(np.isfinite(part).all() for part in candidate):
                raise CheckpointError(does_not_fit(f"{encoding} with {scale_type} scales", peak))
            if bits == 8:  # the only candidate
                for target, part in zip(out, candidate):
                    target[:] = part
                break
            _grid.affine_errors(x, width, *candidate, *limits, error)
            better = error < lowest
            lowest[better] = error[better]
            for target, part in zip(out, candidate):
                target[better] = part[better]
        _grid.affine_codes(x, width, *out, *limits, codes[first:last])

    if w.size:
        _each_block(w, block)
    return codes if signed else codes.view(np.uint8), scales, mins, zeros.astype(np.uint8)


def stored(values: np.ndarray, scale_type: str) -> np.ndarray:
    """Scales or minima float64 -> the float32 that is read back of them; infinite where they do not fit."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    return encodings.bits_to_float(encodings.float_to_bits(single, scale_type), scale_type)


def candidates(
    e: encodings.Encoding, low: np.ndarray, high: np.ndarray, scale_type: str
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Scales, minima and zeros to try, float32 of any shape, for groups that span low..high (float64).

    w is about scale * (code - zero) + minimum; the zero of a symmetric encoding is its middle code.
    """
    nothing = np.zeros(low.shape, np.float32)
    most = 127.0 if e.signed else 2.0**e.bits - 1
    if e.signed:
        yield stored(np.maximum(-low, high) / most, scale_type), nothing, nothing
    elif not e.offset:
        middle = 1 << (e.bits - 1)
        peak = np.where(high > -low, high, low)
        for ratio in RATIOS[e.bits]:
            for code in (-middle, middle):
                yield stored(peak / code * ratio, scale_type), nothing, np.full(low.shape, middle, np.float32)
    elif e.offset == "min":
        for below in CUTS[e.bits]:
            for above in CUTS[e.bits]:
                span = high - low
                scale = stored(span * (1 - below - above) / most, scale_type)
                yield scale, stored(low + below * span, scale_type), nothing
    else:
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
        for below in CUTS[e.bits]:
            for above in CUTS[e.bits]:
                scale = stored((high * (1 - above) - low * (1 - below)) / most, scale_type)
                steps = -low * (1 - below) / np.where(scale == 0, 1, scale)
                zero = np.clip(np.rint(steps), 0, most).astype(np.float32)
                yield scale, nothing, np.where(scale == 0, np.float32(0), zero)


def _each_block(w: np.ndarray, work: Callable[[int, int, np.ndarray], None]) -> None:
    """Call work(first, last, float32 copy of w[first:last]) for blocks that cover all rows, on threads.

    The copy is what lets the kernels have one compiled form: contiguous, writable, float32.
    """
    rows, cols = w.shape
    height = max(1, BLOCK_WEIGHTS // cols)

    def run(first: int) -> None:
        last = min(first + height, rows)
        with np.errstate(over="ignore"):
            work(first, last, np.array(w[first:last], np.float32, order="C"))

    starts = range(0, rows, height)
    threads = min(numba.get_num_threads(), len(starts))
    if threads == 1:
        for first in starts:
            run(first)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(run, starts):
            pass


def _ranges(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value, float32[rows, groups], of each group; a NaN shows as NaN at its end."""
    groups = encodings.group_count(x.shape[1], group)
    low = np.empty((len(x), groups), np.int32)
    high = np.empty((len(x), groups), np.int32)
    _grid.group_ranges(x.view(np.int32), group, low, high)
    return _unordered(low), _unordered(high)


def _unordered(integers: np.ndarray) -> np.ndarray:
    """Back from integers that sort as the floats do (negative ones have their magnitude bits flipped)."""
    return (integers ^ ((integers >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)


def _lane_weights(weights: np.ndarray, groups: int) -> np.ndarray:
    """Column weights float32[cols] in the lane order of `_grid.search_q4`: float32[GROUP, lanes]."""
    batch = max(1, _grid.BATCH_LANES // groups)
    used = batch * groups
    lanes = -(-used // _grid.LANES) * _grid.LANES
    columns = np.zeros(groups * _grid.GROUP, np.float32)
    columns[: len(weights)] = weights
    result = np.zeros((_grid.GROUP, lanes), np.float32)
    result[:, :used] = np.tile(columns.reshape(groups, _grid.GROUP).T, batch)
    return result


def _check_matrix(w: np.ndarray) -> None:
    if w.ndim != 2:
        raise UsageError(f"a weight matrix has 2 dimensions, not {w.ndim}")


def _check_importance(w: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Weights float32[cols] with mean about 1: importance scaled, and lifted off zero."""
    cols = w.shape[-1] if w.ndim else 0
    if importance is None:
        return np.ones(cols, np.float32)
    if importance.shape != (cols,):
        raise UsageError(f"importance has shape {importance.shape}; {cols} columns need ({cols},)")
    values = importance.astype(np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise UsageError("importance must be finite and not negative; collect it again")
    mean = float(values.mean()) if cols else 0.0
    if mean == 0.0:
        return np.ones(cols, np.float32)
    return np.maximum(values / mean, IMPORTANCE_FLOOR).astype(np.float32)


def does_not_fit(encoding: str, peak: float) -> str:
    """What to say of a matrix whose largest magnitude, or a scale of it, an encoding cannot hold."""
    if not np.isfinite(peak):
        return "a weight is not finite; repair the checkpoint"
    return f"a weight of magnitude {peak:.4g} does not fit {encoding}; keep this tensor in f32"
