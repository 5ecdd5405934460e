"""The sampler: order of steps, determinism, bounds."""

import math

import numpy as np
import pytest

from halfbyte.formats.errors import HalfbyteError, UsageError
from halfbyte.runtime.sampler import Sampler, Sampling, logprobs


def row(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_greedy_takes_the_highest_and_the_lowest_id_among_equals() -> None:
    assert Sampler().sample(row(1, 3, 2)) == 1
    assert Sampler().sample(row(1, 3, 3, 3)) == 1
    assert Sampler().sample(row(-np.inf, -5, -np.inf)) == 1


def test_penalties_and_bias_apply_to_greedy() -> None:
    logits = row(2.0, 1.9, -1.0)
    assert Sampler(Sampling(repetition_penalty=1.5)).sample(logits, [0]) == 1
    assert Sampler(Sampling(presence_penalty=0.5)).sample(logits, [0]) == 1
    assert Sampler(Sampling(frequency_penalty=0.06)).sample(logits, [0]) == 0
    assert Sampler(Sampling(frequency_penalty=0.06)).sample(logits, [0, 0]) == 1
    assert Sampler(Sampling(logit_bias={2: 5.0})).sample(logits) == 2
    assert Sampler(Sampling(logit_bias={0: -math.inf})).sample(logits) == 1
    # Bias comes before the penalty: (2 + 2) / 3 < 1.9.
    assert Sampler(Sampling(logit_bias={0: 2.0}, repetition_penalty=3.0)).sample(logits, [0]) == 1


def test_repetition_penalty_lowers_negative_logits_too() -> None:
    assert Sampler(Sampling(repetition_penalty=2.0)).sample(row(-1.0, -1.5), [0]) == 1


def test_penalty_window_forgets() -> None:
    logits = row(2.0, 1.9, 0.0)
    history = [0, 2, 2]
    assert Sampler(Sampling(presence_penalty=1, penalty_window=2)).sample(logits, history) == 0
    assert Sampler(Sampling(presence_penalty=1, penalty_window=3)).sample(logits, history) == 1
    assert Sampler(Sampling(presence_penalty=1, penalty_window=0)).sample(logits, history) == 1


def test_logits_are_left_alone() -> None:
    logits = row(1, 2, 3)
    Sampler(Sampling(temperature=1, presence_penalty=1, logit_bias={0: 1.0})).sample(logits, [1])
    assert logits.tolist() == [1, 2, 3]


def draws(sampling: Sampling, logits: np.ndarray, count: int = 400) -> set[int]:
    sampler = Sampler(sampling)
    return {sampler.sample(logits) for _ in range(count)}


def test_filters_keep_what_they_say() -> None:
    logits = np.log(row(0.5, 0.25, 0.15, 0.1))
    assert draws(Sampling(temperature=1), logits) == {0, 1, 2, 3}
    assert draws(Sampling(temperature=1, top_k=2), logits) == {0, 1}
    assert draws(Sampling(temperature=1, top_p=0.7), logits) == {0, 1}
    assert draws(Sampling(temperature=1, top_p=0.8), logits) == {0, 1, 2}
    assert draws(Sampling(temperature=1, top_p=0.0), logits) == {0}
    assert draws(Sampling(temperature=1, min_p=0.25), logits) == {0, 1, 2}
    # top-p is of what top-k left: 0.5 of 0.75 is two thirds.
    assert draws(Sampling(temperature=1, top_k=2, top_p=0.6), logits) == {0}


def test_equal_logits_are_kept_by_lowest_id() -> None:
    assert draws(Sampling(temperature=1, top_k=2), np.zeros(9, np.float32)) == {0, 1}
    assert draws(Sampling(temperature=1, top_p=0.3), np.zeros(10, np.float32)) <= {0, 1, 2, 3}


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [0, 700, 3000])
def test_nucleus_equals_its_definition_on_a_large_vocabulary(top_p: float, top_k: int) -> None:
    logits = np.random.default_rng(5).normal(size=4000).astype(np.float32)
    order = sorted(range(4000), key=lambda i: (-float(logits[i]), i))[: top_k or None]
    weights = [math.exp(float(logits[i])) for i in order]
    kept, mass = set(), 0.0
    for token, weight in zip(order, weights):
        kept.add(token)
        mass += weight
        if mass >= top_p * math.fsum(weights):
            break
    sampler = Sampler(Sampling(temperature=1, top_p=top_p, top_k=top_k, seed=3))
    drawn = {sampler.sample(logits) for _ in range(200)}
    assert drawn <= kept
    assert len(drawn) > min(len(kept), 200) // 4


def test_frequencies_follow_the_distribution() -> None:
    sampler = Sampler(Sampling(temperature=2.0, seed=11))
    logits = row(2.0, 0.0, -1.0)
    counts = np.bincount([sampler.sample(logits) for _ in range(20000)], minlength=3) / 20000
    wanted = np.exp(logits / 2.0) / np.exp(logits / 2.0).sum()
    assert np.abs(counts - wanted).max() < 0.015


def test_draws_are_pinned_for_a_seed() -> None:
    """The stream of PCG64 is fixed by its definition, so these ids are the same on every machine."""
    sampler = Sampler(Sampling(temperature=1.0, seed=1234))
    logits = np.linspace(-2, 2, 50, dtype=np.float32)
    assert [sampler.sample(logits) for _ in range(8)] == PINNED
    again = Sampler(Sampling(temperature=1.0, seed=1234))
    assert [again.sample(logits) for _ in range(8)] == PINNED
    other = Sampler(Sampling(temperature=1.0, seed=1235))
    assert [other.sample(logits) for _ in range(8)] != PINNED


PINNED: list[int] = [49, 38, 49, 34, 36, 25, 33, 36]


def test_one_uniform_a_token_whatever_the_filters() -> None:
    logits = np.linspace(0, 3, 1000, dtype=np.float32)
    plain = Sampler(Sampling(temperature=1.0, seed=7))
    filtered = Sampler(Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, presence_penalty=1, seed=7))
    for _ in range(5):
        plain.sample(logits)
        filtered.sample(logits, [1, 2])
        assert plain.state() == filtered.state()


def test_fork_and_restore_replay() -> None:
    logits = np.zeros(1000, np.float32)
    sampler = Sampler(Sampling(temperature=1.0, seed=2))
    sampler.sample(logits)
    fork, state = sampler.fork(), sampler.state()
    first = [sampler.sample(logits) for _ in range(5)]
    assert [fork.sample(logits) for _ in range(5)] == first
    sampler.restore(state)
    assert [sampler.sample(logits) for _ in range(5)] == first
    for bad in (
        {},
        {"state": 1},
        {"state": -1, "inc": 1},
        {"state": "x", "inc": 1},
        None,
        {"state": 2**128, "inc": 1},
    ):
        with pytest.raises(UsageError):
            sampler.restore(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature))
    for bad in (row(1, np.nan, 2), row(np.nan), row(1, np.inf), row(-np.inf, -np.inf), row(-np.inf, np.nan)):
        with pytest.raises(HalfbyteError):
            sampler.sample(bad)
    for shape in ((0,), (2, 2), ()):
        with pytest.raises(UsageError):
            sampler.sample(np.zeros(shape, np.float32))


def test_extremes_do_not_overflow() -> None:
    assert draws(Sampling(temperature=1e-9), row(-1e30, 1e30, 0), 20) == {1}
    assert draws(Sampling(temperature=1e6), row(0, 1, 2), 200) == {0, 1, 2}
    assert Sampler(Sampling(temperature=1, top_k=5)).sample(row(-np.inf, 1, -np.inf)) == 1


def test_forbidding_everything_is_an_error() -> None:
    with pytest.raises(HalfbyteError, match="every token"):
        Sampler(Sampling(logit_bias={0: -math.inf, 1: -math.inf})).sample(row(1, 2))
    with pytest.raises(UsageError, match="token 7"):
        Sampler(Sampling(logit_bias={7: 1.0})).sample(row(1, 2))


def test_history_outside_the_vocabulary_is_ignored() -> None:
    assert Sampler(Sampling(presence_penalty=1)).sample(row(1, 0.5), [99, -1, 0]) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 1.01},
        {"top_p": -0.01},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"penalty_window": -1},
        {"seed": -1},
        {"seed": 2**64},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": {0: math.inf}},
        {"logit_bias": {0: math.nan}},
        {"logit_bias": {"a": 1.0}},
    ],
)
def test_values_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**bad)
    assert "\n" not in str(caught.value)


def test_logprobs() -> None:
    logits = row(0.0, math.log(2), math.log(2), -np.inf)
    own, best = logprobs(logits, 0, 3)
    assert own == pytest.approx(math.log(1 / 5))
    assert [i for i, _ in best] == [1, 2, 0]
    assert [p for _, p in best] == pytest.approx([math.log(2 / 5), math.log(2 / 5), math.log(1 / 5)])
    assert logprobs(logits, 3, 0) == (-math.inf, [])
    for token, top_n in ((4, 1), (-1, 1), (0, 5), (0, -1)):
        with pytest.raises(UsageError):
            logprobs(logits, token, top_n)
