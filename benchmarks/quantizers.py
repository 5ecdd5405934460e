"""Error and speed of the quantisers on seeded random weights.

    python benchmarks/quantizers.py [--method rtn] [--seed 0]

NMSE is |w - w_hat|^2 / |w|^2 over a 4000 x 256 matrix, Gaussian and Student-t with 5 degrees of freedom.
Beside each row stands the published or computed figure of the nearest known format, on other random data of
the same kind. Weights a second are for one matrix of 2048 x 2048, all threads, after compilation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numba
import numpy as np

from halfbyte.converter import quantizers
from halfbyte.formats import encodings

# name, bits a weight, what it is compared with, its NMSE on Gaussian and on t5 data (None: not known)
ROWS: tuple[tuple[str, float, str, float | None, float | None], ...] = (
    ("q8", 8.5, "int8 absmax g32", 2.9e-5, 4.6e-5),
    ("q2", 2.25, "IQ2_KS", 0.098, 0.13),
    ("q2", 2.25, "Q2_K (2.625 bits)", 0.0689, 0.080),
    ("q3", 3.25, "IQ3_KS", 0.0222, 0.029),
    ("q3", 3.25, "Q3_K (3.44 bits)", 0.0207, 0.028),
    ("q4", 4.25, "IQ4_KS (f32 row scale)", 0.00507, 0.0068),
    ("q4", 4.25, "Q4_K (4.5 bits)", 0.00507, 0.0068),
    ("q4", 4.25, "IQ4_XS", 0.00560, 0.0076),
    ("q4", 4.25, "MXFP4", 0.0132, 0.0158),
    ("q5", 5.25, "-", None, None),
    ("q6", 6.25, "Q6_K (6.56 bits)", 0.00030, 0.00044),
    ("i8", 8.5, "int8 absmax g32", 2.9e-5, 4.6e-5),
    ("i4", 4.5, "Q4_0 (max/-8)", 0.00739, 0.0116),
    ("a8", 9.0, "-", None, None),
    ("a4", 5.0, "asymmetric min-max g32", 0.0061, None),
    ("z8", 8.75, "-", None, None),
    ("z4", 4.75, "-", None, None),
)


def round_trip(method: str, encoding: str) -> tuple[Callable, Callable]:
    """(quantise, decode) for an encoding; affine encodings use groups of 32 and f16 scales."""
    module = quantizers.load(method)
    if encoding == "q8":
        return module.quantize_q8, lambda parts: module.dequantize_q8(*parts)
    if encodings.BY_NAME[encoding].row_scale:
        return (
            lambda w: module.quantize_table(w, encoding),
            lambda parts: encodings.dequantize(encoding, parts[0], parts[1], 32, row=parts[2]),
        )

    def decode(parts):
        codes, scales, mins, zeros = parts
        return encodings.dequantize(encoding, codes, scales, 32, mins, zeros)

    return lambda w: module.quantize_affine(w, encoding, 32, "f16"), decode


def nmse(w: np.ndarray, decoded: np.ndarray) -> float:
    exact = w.astype(np.float64)
    return float(np.sum((exact - decoded) ** 2) / np.sum(exact**2))


def shown(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:9.2e}" if value < 1e-3 else f"{value:9.5f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Error and speed of the quantisers on random weights.")
    parser.add_argument("--method", default="rtn", choices=["rtn"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    random = np.random.default_rng(arguments.seed)
    data = (
        random.standard_normal((4000, 256)).astype(np.float32),
        random.standard_t(5, (4000, 256)).astype(np.float32),
    )
    large = random.standard_normal((2048, 2048)).astype(np.float32)

    results: dict[str, tuple[float, float, float, float]] = {}
    for encoding in dict.fromkeys(row[0] for row in ROWS):
        quantize, decode = round_trip(arguments.method, encoding)
        begin = time.perf_counter()
        quantize(large[:2])
        first = time.perf_counter() - begin
        begin = time.perf_counter()
        quantize(large)
        speed = large.size / (time.perf_counter() - begin)
        gaussian, heavy = (nmse(w, decode(quantize(w))) for w in data)
        results[encoding] = gaussian, heavy, speed, first

    print(f"method {arguments.method}, seed {arguments.seed}, {numba.get_num_threads()} threads")
    print(f"{'':4}{'bits':>6}{'gaussian':>10}{'t5':>10}{'Mw/s':>8}{'first s':>9}   compared with")
    for encoding, bits, other, other_gaussian, other_heavy in ROWS:
        gaussian, heavy, speed, first = results[encoding]
        print(
            f"{encoding:4}{bits:6.2f} {shown(gaussian)} {shown(heavy)}{speed / 1e6:8.1f}{first:9.2f}   "
            f"{other:24}{shown(other_gaussian)} {shown(other_heavy)}"
        )


if __name__ == "__main__":
    main()
