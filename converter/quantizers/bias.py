"""Mean-bias correction: the mean error of each output, measured on calibration inputs, goes into a bias.

Rounding turns w into w_hat, and outputs shift by (w - w_hat) mean(x) on average; a LINEAR's bias takes that back
exactly (arXiv 1906.04721, section 4.2). One float32 a row: 32 / cols bits a weight where there was no bias before.
What remains is e cov(x) e^T instead of e mean(x x^T) e^T, so the gain is as large as the inputs' means are.
"""

from __future__ import annotations

import numpy as np

from halfbyte.converter.builder import Vector
from halfbyte.converter.fold import BIAS, MATRIX, Fold


def correction(w: np.ndarray, read: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(w - read)[rows, cols] mean(x)[cols] -> float32[rows], to be added to the outputs."""
    error = w.astype(np.float64) - read
    return np.einsum("rc,c->r", error, mean.astype(np.float64)).astype(np.float32)


def apply(fold: Fold, matrix: int, values: np.ndarray) -> None:
    """Add values[rows] to the bias of every LINEAR that multiplies by a matrix of the builder."""
    b = fold.b
    for i, r in enumerate(b._records):
        if r.op != "linear" or r.weights[MATRIX] != matrix:
            continue
        old = r.weights[BIAS] if len(r.weights) > BIAS else None
        name = f"{b.tensors[matrix].name}.bias"
        if old is not None:
            vector = b.tensors[old]
            assert isinstance(vector, Vector)
            name, values = vector.name, vector.values + values
        fold.set_vector(i, BIAS, name, values)


def gain(w: np.ndarray, read: np.ndarray, hessian: np.ndarray, mean: np.ndarray) -> float:
    """Share of the mean squared output error that the correction removes: |e mean|^2 / tr(e H e^T)."""
    error = w.astype(np.float64) - read
    total = float(np.einsum("rc,cd,rd->", error, hessian, error, optimize="greedy"))
    return float((np.einsum("rc,c->r", error, mean) ** 2).sum()) / total if total > 0 else 0.0
