"""The multiple-choice knapsack: one option for every item, the least cost within a budget, exactly.

Dynamic programming over the items keeps the states (weight, cost) that no other beats in both, and drops a state when
even the Lagrangian bound on what is still to come cannot bring it below a solution already known (Nemhauser and
Ullmann 1969; Sinha and Zoltners 1979). Sizes of matrices are multiples of few numbers, so the states stay few.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SLACK = 1e-9  # relative: rounding of sums must not drop the best state


def solve(
    weights: Sequence[Sequence[float]],
    costs: Sequence[Sequence[float]],
    budget: float,
    least: float = 0.0,
    known: float = np.inf,
) -> list[int] | None:
    """choice[i] of weights[i], costs[i] that minimises the sum of costs while the weights sum to least..budget.

    None where no choice does. known: the cost of a choice that does, which makes the search shorter. Deterministic:
    of equal costs the lighter choice wins.
    """
    w = [np.asarray(row, np.float64) for row in weights]
    c = [np.asarray(row, np.float64) for row in costs]
    lightest, heaviest = (
        np.append(np.cumsum([pick(row) for row in w][::-1])[::-1], 0.0) for pick in (np.min, np.max)
    )  # of the items from i on
    if lightest[0] > budget:
        return None
    price, found = _dual(w, c, budget)
    known = found if least <= 0 else known
    ahead = np.append(np.cumsum([(a + price * b).min() for a, b in zip(c, w)][::-1])[::-1], 0.0)
    limit = known + SLACK * abs(known)
    weight, cost = np.zeros(1), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []  # of each state: its option and the state it came from
    for i, (a, b) in enumerate(zip(c, w), 1):
        total_weight, total_cost = ((x[:, None] + y).ravel() for x, y in ((weight, b), (cost, a)))
        bound = total_cost + ahead[i] - price * (budget - total_weight)
        fits = (total_weight + lightest[i] <= budget) & (total_weight + heaviest[i] >= least)
        alive = np.flatnonzero(fits & (bound <= limit))
        if not len(alive):
            return None
        order = alive[np.lexsort((total_cost[alive], total_weight[alive]))]
        sorted_cost = total_cost[order]
        if least > 0:  # a heavier state may be needed: only among equal weights does the cheapest win
            order = order[np.append(True, np.diff(total_weight[order]) > 0)]
        else:
            order = order[np.append(True, sorted_cost[1:] < np.minimum.accumulate(sorted_cost)[:-1])]
        weight, cost = total_weight[order], total_cost[order]
        trail.append((order % len(b), order // len(b)))
    at, choice = int(np.argmin(cost)), []
    for option, origin in reversed(trail):
        choice.append(int(option[at]))
        at = int(origin[at])
    return choice[::-1]


def _dual(w: list[np.ndarray], c: list[np.ndarray], budget: float) -> tuple[float, float]:
    """(price of weight whose relaxed solution just fits, cost of that solution)."""

    def relaxed(price: float) -> tuple[float, float]:
        chosen = [int(np.lexsort((b, a + price * b))[0]) for a, b in zip(c, w)]
        return sum(float(b[k]) for b, k in zip(w, chosen)), sum(float(a[k]) for a, k in zip(c, chosen))

    used, cost = relaxed(0.0)
    if used <= budget:
        return 0.0, cost
    low, high = 0.0, 1e-12
    while relaxed(high)[0] > budget:
        low, high = high, high * 8
        if high > 1e30:  # only ties stand between this and the lightest options
            break
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if relaxed(middle)[0] <= budget else (middle, high)
    used, cost = relaxed(high)
    if used <= budget:
        return high, cost
    return high, sum(float(a[np.lexsort((a, b))[0]]) for a, b in zip(c, w))
