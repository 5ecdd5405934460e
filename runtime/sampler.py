"""Choosing the next token from logits: deterministic for a seed, on every platform.

Order of steps, each on what the one before it left:
  logit bias -> repetition, presence and frequency penalties -> temperature -> top-k -> top-p -> min-p.
All arithmetic is float64; sums run in a fixed order (falling probability for top-p, rising id for the
draw), and equal logits rank by id, lowest first. Each draw takes one raw 64-bit value of PCG64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from halfbyte.formats.errors import HalfbyteError, UsageError

_FIRST_TRY = 512  # candidates that top-p sorts at first; eight times as many while they do not suffice


@dataclass(frozen=True)
class Sampling:
    """How to choose. The defaults are greedy.

    temperature         0 takes the highest logit (lowest id among equals); else logits / temperature
    top_k               keep the k highest; 0 keeps all
    top_p               keep the fewest, in falling probability, that reach this mass (Holtzman et al.
                        2019); always at least one
    min_p               keep those at least this probable relative to the most probable (Nguyen et al. 2024)
    repetition_penalty  divides a positive and multiplies a negative logit of a token that occurred
                        (Keskar et al. 2019)
    presence_penalty    subtracted once from the logit of a token that occurred
    frequency_penalty   subtracted once per occurrence
    penalty_window      how many of the last tokens count as occurred; 0 is all
    seed                0 .. 2^64-1
    logit_bias          id -> number added to its logit; -inf forbids the token

    Raises UsageError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 64
    seed: int = 0
    logit_bias: Mapping[int, float] | None = field(default=None)

    def __post_init__(self) -> None:
        _real("temperature", self.temperature, 0.0, 1e6)
        _real("top_p", self.top_p, 0.0, 1.0)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        _real("presence_penalty", self.presence_penalty, -1e3, 1e3)
        _real("frequency_penalty", self.frequency_penalty, -1e3, 1e3)
        _integer("top_k", self.top_k, 2**31 - 1)
        _integer("penalty_window", self.penalty_window, 2**31 - 1)
        _integer("seed", self.seed, 2**64 - 1)
        for token, bias in (self.logit_bias or {}).items():
            _integer("a token id in logit_bias", token, 2**31 - 1)
            if bias != -math.inf:
                _real(f"logit_bias of token {token}", bias, -1e6, 1e6)

    @property
    def penalizes(self) -> bool:
        """Whether tokens that occurred have their logits changed."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class Sampler:
    """Draws tokens by a `Sampling`; one sampler belongs to one sequence."""

    def __init__(self, sampling: Sampling | None = None) -> None:
        self.sampling = sampling or Sampling()
        self._random = np.random.PCG64(int(self.sampling.seed))

    def sample(self, logits: np.ndarray, history: Sequence[int] = ()) -> int:
        """The next token id.

        logits   [vocab] float32; -inf forbids a token
        history  ids so far, prompt included, oldest first; only penalties read it

        Raises HalfbyteError for NaN, +inf, or when every token is forbidden; UsageError for a bias
        whose id the vocabulary does not have.
        """
        values, best = _checked(logits)
        how = self.sampling
        adjusted = how.logit_bias or (how.penalizes and len(history))
        if adjusted:
            values = self._adjusted(values, history)
        if how.temperature == 0.0:
            return int(np.argmax(values)) if adjusted else best
        return self._draw(values)

    def fork(self) -> Sampler:
        """An independent sampler that would go on to draw the same."""
        copy = Sampler(self.sampling)
        copy.restore(self.state())
        return copy

    def state(self) -> dict[str, int]:
        """The generator's position, as two integers of 128 bits; for `restore`."""
        inner = self._random.state["state"]
        return {"state": int(inner["state"]), "inc": int(inner["inc"])}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go back to a position taken by `state`. Raises UsageError for anything else."""
        try:
            position, increment = state["state"], state["inc"]
            whole = all(isinstance(v, int) and 0 <= v < 2**128 for v in (position, increment))
        except (KeyError, TypeError):
            whole = False
        if not whole:
            raise UsageError("this is not a saved sampler state")
        self._random.state = {
            "bit_generator": "PCG64",
            "state": {"state": position, "inc": increment},
            "has_uint32": 0,
            "uinteger": 0,
        }

    def _adjusted(self, values: np.ndarray, history: Sequence[int]) -> np.ndarray:
        """Bias and penalties, on a float64 copy."""
        how = self.sampling
        values = values.astype(np.float64)
        for token, bias in (how.logit_bias or {}).items():
            if token >= values.size:
                raise UsageError(f"logit_bias names token {token}; the model has {values.size} tokens")
            values[token] += bias
        if how.penalizes and len(history):
            window = history[-how.penalty_window :] if how.penalty_window else history
            tokens, counts = np.unique(np.asarray(window, dtype=np.int64), return_counts=True)
            known = (tokens >= 0) & (tokens < values.size)
            tokens, counts = tokens[known], counts[known]
            seen = values[tokens]
            seen = np.where(seen > 0, seen / how.repetition_penalty, seen * how.repetition_penalty)
            values[tokens] = seen - how.presence_penalty - how.frequency_penalty * counts
        if values.max() == -np.inf:
            raise HalfbyteError("logit_bias forbids every token")
        return values

    def _draw(self, values: np.ndarray) -> int:
        how = self.sampling
        top = float(values.max())
        kept = None  # rising ids; None is the whole vocabulary
        if 0 < how.top_k < values.size:
            kept = np.sort(_highest(values, how.top_k)[: how.top_k])
            values = values[kept]
        weights = np.exp((values.astype(np.float64) - top) / how.temperature)  # the most probable has 1
        if how.top_p < 1.0:
            inner = np.sort(_nucleus(values, weights, how.top_p))
            kept, weights = inner if kept is None else kept[inner], weights[inner]
        if how.min_p > 0.0:
            inner = np.flatnonzero(weights >= how.min_p)
            kept, weights = inner if kept is None else kept[inner], weights[inner]
        cumulative = np.cumsum(weights)
        uniform = (self._random.random_raw() >> 11) * 2.0**-53
        index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
        index = min(index, weights.size - 1)
        return index if kept is None else int(kept[index])


def logprobs(logits: np.ndarray, token: int, top_n: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural log probability of `token`, and the `top_n` likeliest as (id, log probability).

    logits [vocab] float32, before penalties and temperature. Raises UsageError for a token or a count
    out of range.
    """
    values = _checked(logits)[0].astype(np.float64)
    if not 0 <= token < values.size:
        raise UsageError(f"token {token} does not exist; the model has {values.size} tokens")
    _integer("the number of log probabilities", top_n, values.size)
    top = values.max()
    values -= top + math.log(float(np.cumsum(np.exp(values - top))[-1]))
    best = _highest(values, max(top_n, 1))[:top_n]
    return float(values[token]), [(int(i), float(values[i])) for i in best]


def _highest(values: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` highest values and of all that equal the last: falling value, then rising id."""
    if count >= values.size:
        candidates = np.arange(values.size)
    else:
        threshold = np.partition(values, values.size - count)[values.size - count]
        candidates = np.flatnonzero(values >= threshold)
    return candidates[np.argsort(-values[candidates], kind="stable")]


def _nucleus(values: np.ndarray, weights: np.ndarray, top_p: float) -> np.ndarray:
    """The shortest prefix, in falling probability, whose mass is top_p of the whole."""
    target = top_p * float(np.cumsum(weights)[-1])
    count = _FIRST_TRY
    while True:
        ranked = _highest(values, count)
        cumulative = np.cumsum(weights[ranked])
        if cumulative[-1] >= target or ranked.size == values.size:
            return ranked[: int(np.searchsorted(cumulative, target, side="left")) + 1]
        count *= 8


def _checked(logits: np.ndarray) -> tuple[np.ndarray, int]:
    """A row that can be sampled from, and the id of its highest value."""
    values = np.asarray(logits)
    if values.ndim != 1 or not values.size:
        raise UsageError(f"logits must be one row of the vocabulary, not of shape {list(values.shape)}")
    best = int(values.argmax())  # of a NaN, where there is one
    top = values[best]
    if not np.isfinite(top):
        found = "NaN" if np.isnan(top) else "infinity" if top > 0 else "no possible token"
        raise HalfbyteError(f"the model's output holds {found}; the file may be damaged (try --verify)")
    return values, best


def _real(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise UsageError(f"{name} must be a number, not {value!r}")
    if not low <= float(value) <= high:
        raise UsageError(f"{name} must lie between {low:g} and {high:g}, not {value!r}")


def _integer(name: str, value: Any, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise UsageError(f"{name} must be a whole number, not {value!r}")
    if not 0 <= value <= high:
        raise UsageError(f"{name} must lie between 0 and {high}, not {value!r}")
