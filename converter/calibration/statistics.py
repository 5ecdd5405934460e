"""Statistics of the inputs of a matrix, and the sums they are made from."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from halfbyte.converter.blas import Products, mirror
from halfbyte.converter.builder import Matrix
from halfbyte.converter.weights import Weights


@dataclass
class Statistics:
    """The inputs x[count, cols] that one or more matrices met, position by position.

    mean      float64[cols]  mean of x
    square    float64[cols]  mean of x^2: the diagonal of the Hessian, llama.cpp's importance matrix
    absmax    float32[cols]  largest |x|
    hessian   float64[cols, cols]  mean of x x^T, without damping; None when not asked for
    cross     float64[cols, cols]  mean of (x_float - x) x^T, x_float being the input in the float model
    drift     float64[rows, cols]  mean of y x^T, y being all that the output misses: (x_float - x) W^T and the
              error already in the residual that the output is added to. With drift=True a matrix of more rows
              than columns has cross and any other has drift; see `missing`
    sample    float32[<= n, cols]  evenly spaced rows of x; empty when not asked for
    shared    whether other matrices get the same arrays after this one
    """

    cols: int
    count: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.empty(0))
    square: np.ndarray = field(default_factory=lambda: np.empty(0))
    absmax: np.ndarray = field(default_factory=lambda: np.empty(0))
    hessian: np.ndarray | None = None
    cross: np.ndarray | None = None
    drift: np.ndarray | None = None
    sample: np.ndarray = field(default_factory=lambda: np.empty(0))
    shared: bool = False

    def take_hessian(self) -> np.ndarray:
        """The Hessian, which is the caller's to write over; it is gone from here."""
        assert self.hessian is not None
        hessian, self.hessian = self.hessian, None
        return hessian.copy() if self.shared else hessian

    def missing(self, w: np.ndarray, start: int = 0) -> np.ndarray | None:
        """Rows start.. of mean(y x^T) for the matrix's float weights w[n, cols]: what its output misses."""
        if self.drift is not None:
            return self.drift[start : start + len(w)]
        return None if self.cross is None else w @ self.cross


class Collector:
    """Sums for `Statistics`, a sequence at a time: float32 products of one sequence, float64 sums of sequences."""

    def __init__(self, products: Products, cols: int, tokens: int, hessians: bool, sample: int):
        self.products, self.cols, self.count = products, cols, 0
        self.sum, self.squares = np.zeros(cols), np.zeros(cols)
        self.absmax = np.zeros(cols, np.float32)
        self.hessian = np.zeros((cols, cols)) if hessians else None
        self.cross: np.ndarray | None = None
        self.drifts: dict[int, np.ndarray] = {}
        self.weights: dict[int, np.ndarray] = {}
        self.wanted = (
            np.unique(np.linspace(0, tokens - 1, sample).astype(int)) if sample else np.empty(0, int)
        )
        self.sample: list[np.ndarray] = []

    def follow(self, i: int, t: Matrix, weights: Weights) -> None:
        """Collect what the output of record i misses, in the cheaper of the two ways."""
        if t.shape[0] > t.shape[1]:
            self.cross = np.zeros((self.cols, self.cols))
        else:
            self.drifts[i], self.weights[i] = np.zeros(t.shape), weights.rows(t)

    def add_drift(
        self, x: np.ndarray, x_float: np.ndarray, now: dict[int, np.ndarray], wanted: dict[int, np.ndarray]
    ) -> None:
        """Inputs and residuals (by record) of one sequence, now and in the float model."""
        if self.cross is not None:
            self.products.add_gram(self.cross, x_float - x, x)
        for i, w in self.weights.items():
            missing = self.products.matmul(x_float - x, w.T)
            if i in now:
                missing += wanted[i] - now[i]
            self.products.add_gram(self.drifts[i], missing, x)

    def add(self, x: np.ndarray) -> None:
        self.sum += x.sum(axis=0, dtype=np.float64)
        self.squares += np.einsum("tk,tk->k", x, x, dtype=np.float64)
        np.maximum(self.absmax, np.abs(x).max(axis=0), out=self.absmax)
        chosen = self.wanted[(self.wanted >= self.count) & (self.wanted < self.count + len(x))]
        self.sample.append(x[chosen - self.count])
        self.count += len(x)
        if self.hessian is not None:
            self.products.add_gram(self.hessian, x)

    def finish(self) -> Statistics:
        s = Statistics(self.cols, self.count, self.sum / self.count, self.squares / self.count, self.absmax)
        if self.hessian is not None:
            mirror(self.hessian)
            self.hessian /= self.count
            s.hessian = self.hessian
        if self.cross is not None:
            self.cross /= self.count
            s.cross = self.cross
        for drift in self.drifts.values():
            drift /= self.count
        self.hessian = self.cross = None
        self.weights.clear()
        s.sample = np.concatenate(self.sample)
        return s
