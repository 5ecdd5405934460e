"""Orthogonal Hadamard maps of an axis: Sylvester's, and Paley's where a width is not a power of two.

The orders that Paley's two constructions give for a prime q: q + 1 for q = 3 (mod 4), 2 (q + 1) for q = 1 (mod 4)
(R. Paley, 1933). With Sylvester's doubling, 12, 20, 28, 36, 60, 76, 108, 140, 148, ... times powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LARGEST_CORE = (
    256  # a core is a dense product: beyond this size blocks of a power of two are the better choice
)


def sylvester(x: np.ndarray) -> np.ndarray:
    """x[..., n] times the n x n Hadamard matrix in Sylvester's order, n a power of two; not normalised."""
    n = x.shape[-1]
    assert n & (n - 1) == 0
    step = 1
    while step < n:
        pairs = x.reshape(*x.shape[:-1], n // (2 * step), 2, step)
        x = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2)
        x = x.reshape(*x.shape[:-3], n)
        step *= 2
    return x


@lru_cache(maxsize=32)
def core(order: int) -> np.ndarray | None:
    """A Hadamard matrix (+1, -1; float64) of this order by Paley's constructions, or None."""
    if order == 1:
        return np.ones((1, 1))
    for q, double in ((order - 1, False), (order // 2 - 1, True)):
        if order % 4 or not _is_prime(q) or q % 4 != (1 if double else 3):
            continue
        character = np.full(q, -1.0)
        character[np.arange(1, q, dtype=np.int64) ** 2 % q] = 1.0
        character[0] = 0.0
        jacobsthal = character[(np.arange(q)[:, None] - np.arange(q)[None, :]) % q]
        border = np.zeros((q + 1, q + 1))
        border[0, 1:], border[1:, 0], border[1:, 1:] = 1.0, 1.0 if double else -1.0, jacobsthal
        if not double:
            return border + np.eye(q + 1)
        return np.kron(border, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(
            np.eye(q + 1), [[1.0, -1.0], [-1.0, -1.0]]
        )
    return None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def factors(width: int) -> tuple[int, int]:
    """(core order, power of two) of the largest Hadamard block that tiles `width`.

    The whole width where a construction is known, else the largest power of two that divides it (core 1).
    """
    power = width & -width
    two = power
    while two:
        if width // two <= LARGEST_CORE and core(width // two) is not None:
            return width // two, two
        two //= 2
    return 1, power


@dataclass(frozen=True)
class Rotation:
    """x -> (x * signs) H / sqrt(block), block by block: orthogonal. A `fold.Map`.

    H is Sylvester(power) (x) core; `signs` (+1, -1; [width]) makes the rotation a random one, of which any seed is
    as good as another (QuaRot, arXiv 2404.00456). Applied to both sides of a matrix product it cancels.
    """

    signs: np.ndarray
    order: int
    power: int

    @property
    def span(self) -> int:
        """Coordinates that mix."""
        return self.order * self.power

    @classmethod
    def random(cls, width: int, seed: int, block: int = 0) -> Rotation:
        """A rotation of `width` coordinates; block > 0 asks for Sylvester blocks of that power of two."""
        signs = np.random.Generator(np.random.PCG64(seed)).integers(0, 2, width) * 2.0 - 1.0
        order, power = (1, block) if block else factors(width)
        return cls(signs, order, power)

    def apply(self, x: np.ndarray, first: int) -> np.ndarray:
        """float64[..., n], coordinates first .. first + n -> the same shape."""
        n = x.shape[-1]
        assert first % self.span == 0 and n % self.span == 0
        y = (x * self.signs[first : first + n]).reshape(*x.shape[:-1], n // self.span, self.power, self.order)
        if self.order > 1:
            matrix = core(self.order)
            assert matrix is not None
            y = np.einsum("...j,jk->...k", y, matrix)  # no BLAS: the same bits for any thread count
        y = np.swapaxes(sylvester(np.ascontiguousarray(np.swapaxes(y, -1, -2))), -1, -2)
        return y.reshape(x.shape) / np.sqrt(self.span)
