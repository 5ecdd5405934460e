"""Where a walk through a program goes, and how much work it is, in multiply-adds: what time left is reckoned from."""

from __future__ import annotations

from collections.abc import Callable, Container

from halfbyte.converter.builder import Builder, Matrix
from halfbyte.converter.calibration.cuts import LINEAR, find_stages

Visits = Callable[[Matrix], int]  # multiply-adds of what a visitor does with a matrix


class Route:
    """The stages up to the last matrix that is visited.

    only: names of the matrices to visit, None for all. visits: index of a tensor -> the record at which it is visited,
    the first one that uses it.
    """

    def __init__(self, b: Builder, only: Container[str] | None):
        self.tensors = b.tensors
        self.records, self.slots, self.caches = b.finish()
        stages = find_stages(self.records, self.slots)
        self.visits: dict[int, int] = {}
        for stage in stages:
            for i in range(stage.first, stage.last):
                w = int(self.records[i]["w"][0])
                if int(self.records[i]["code"]) == LINEAR and (only is None or self.tensors[w].name in only):
                    self.visits.setdefault(w, i)
        last = max(self.visits.values(), default=-1)
        self.stages = [s for s in stages if s.first <= last]

    def matrix(self, i: int) -> Matrix:
        """The matrix of a record."""
        t = self.tensors[int(self.records[i]["w"][0])]
        assert isinstance(t, Matrix)
        return t

    def visited(self) -> list[Matrix]:
        """The matrices to visit, in order."""
        return [self.matrix(i) for i in self.visits.values()]

    def efforts(self, tokens: int, hessians: bool, drift: bool) -> list[int]:
        """For every stage the products that lead to it and the sums of statistics, of so many tokens.

        The ops between the matrices count for nothing.
        """
        out, before = [], 0
        collected = set(self.visits.values())
        for stage in self.stages:
            linear = [i for i in range(stage.first, stage.last) if int(self.records[i]["code"]) == LINEAR]
            shapes = [self.matrix(i).shape for i in linear if i in collected]
            sums = 0
            if shapes:
                cols = shapes[0][1]
                sums = cols * cols // 2 if hessians else cols
                if drift:  # the cheaper of the two ways that a `Collector` has
                    sums += cols * cols if any(rows > cols for rows, _ in shapes) else 0
                    sums += sum(2 * rows * cols for rows, _ in shapes if rows <= cols)
            out.append(tokens * (before + sums))
            before = (1 + drift) * sum(rows * cols for rows, cols in (self.matrix(i).shape for i in linear))
        return out
