"""Prompt lookup and draft models: guesses change the speed and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_model import write_checkpoint
from story import story_folder
from tiny import load_case

import halfbyte
from halfbyte.formats.errors import UsageError
from halfbyte.runtime.generate import generate
from halfbyte.runtime.model import Model
from halfbyte.runtime.sampler import Sampler, Sampling
from halfbyte.runtime.speculate import Lookup, accept

HOWS = (
    {},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.2, "top_k": 9, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny model."""
    folder = tmp_path_factory.mktemp("lookup")
    return halfbyte.load(
        halfbyte.convert(story_folder(folder / "c", context=256), folder / "m.hb", recipe="q8")
    )


def test_guesses_continue_the_latest_occurrence() -> None:
    lookup = Lookup([1, 2, 3, 4, 9, 1, 2, 5, 1, 2], 8)
    assert lookup.draft(1) == [5] and lookup.draft() == [5, 1, 2, 5]  # and repeats itself beyond the end
    lookup.extend([3])
    assert lookup.draft(2) == [4, 9]
    lookup.extend([77])
    assert lookup.draft() == []
    assert Lookup([7, 7, 7, 7], 3).draft() == [7, 7, 7]
    assert Lookup([1, 2, 1, 2], 0).draft() == []


def test_drafts_grow_while_they_are_right() -> None:
    lookup = Lookup([1, 2] * 9, 32)
    lengths = []
    for _ in range(5):
        lengths.append(len(lookup.draft()))
        lookup.verified(lengths[-1], lengths[-1])
    for _ in range(3):
        lookup.verified(8, 0)
        lengths.append(len(lookup.draft()))
    assert lengths == [4, 8, 16, 32, 32, 16, 8, 4]
    assert lookup.guessed == 92 + 24 and lookup.right == 92


@pytest.mark.parametrize("limit", [-1, 65, 1.5, True, "8"])
def test_bad_limits(limit: object, model: Model) -> None:
    with pytest.raises(UsageError):
        generate(model, [5], lookup=limit)  # type: ignore[arg-type]


def test_accept_draws_as_without_guesses() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((5, 40)).astype(np.float32) * 3
    for seed in range(50):
        how = Sampling(temperature=1.0, seed=seed, presence_penalty=0.5)
        alone, ids = Sampler(how), [1, 2]
        wanted = []
        for row in logits:
            wanted.append(alone.sample(row, ids))
            ids.append(wanted[-1])
        for right in range(5):
            draft = [*wanted[:right], *[(t + 1) % 40 for t in wanted[right:4]]]
            sampler = Sampler(how)
            assert accept(sampler, logits, draft, [1, 2]) == wanted[: right + 1]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("stop", [(), ("e",), ("th", "zz")])
def test_the_answer_is_the_same(model: Model, how: dict, stop: tuple[str, ...]) -> None:
    right = 0
    for prompt in (
        "Once upon a time there was a little robot. Once upon a time there was",
        "The end. The",
        "x",
    ):
        for tokens in (0, 1, 2, 40, 400):
            alone = generate(model, prompt, max_tokens=tokens, stop=stop, **how)
            text = "".join(alone)
            for lookup in (1, 3, 16):
                guessing = generate(model, prompt, max_tokens=tokens, stop=stop, lookup=lookup, **how)
                assert "".join(guessing) == text
                assert (guessing.ids, guessing.finish_reason) == (alone.ids, alone.finish_reason)
                assert guessing.session.ids == alone.session.ids
                right += guessing.guesses.right
    assert right or stop or how


@pytest.mark.parametrize("case", ["mistral-window", "gemma3-plain"])
def test_sliding_windows(tmp_path: Path, case: str) -> None:
    load_case(case).write_folder(tmp_path / "c")
    model = halfbyte.load(halfbyte.convert(tmp_path / "c", tmp_path / "m.hb", recipe="q8"))
    right = 0
    for start in range(5, 12):
        prompt = [start, 9, 8, 7] * 6
        alone, guessing = (generate(model, prompt, max_tokens=90, lookup=lookup) for lookup in (0, 12))
        assert "".join(alone) == "".join(guessing) and alone.session.ids == guessing.session.ids
        logits = (
            [g.session.feed([9]) for g in (alone, guessing)] if alone.finish_reason == "length" else [0, 0]
        )
        np.testing.assert_array_equal(*logits)
        right += guessing.guesses.right
    assert right > 0


def test_a_consumer_that_leaves_finds_the_session_as_without_guesses(model: Model) -> None:
    for leave in range(1, 12):
        sessions = []
        for lookup in (0, 16):
            answer = generate(
                model, "one, two, one, two, one, two,", max_tokens=60, lookup=lookup, session=model.session()
            )
            for _ in range(leave):
                next(answer)
            answer.close()
            sessions.append(answer.session)
        assert sessions[0].ids == sessions[1].ids


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Another model of the same tokenizer, of a shorter context and more rows of logits."""
    folder = tmp_path_factory.mktemp("draft")
    return halfbyte.load(
        halfbyte.convert(story_folder(folder / "c", context=96), folder / "m.hb", recipe="q3", method="rtn")
    )


@pytest.mark.parametrize("how", HOWS)
def test_a_draft_model_changes_no_answer(model: Model, small: Model, how: dict) -> None:
    right = 0
    for prompt in ("Once upon a time there was", "x", "The end. The end. The"):
        for tokens, lookup in ((1, 0), (60, 5), (400, 16)):
            alone = generate(model, prompt, max_tokens=tokens, **how)
            text = "".join(alone)
            for draft in (model, small):
                guessing = generate(model, prompt, max_tokens=tokens, lookup=lookup, draft=draft, **how)
                assert "".join(guessing) == text
                assert (guessing.ids, guessing.finish_reason) == (alone.ids, alone.finish_reason)
                assert guessing.session.ids == alone.session.ids
                right += guessing.guesses.right
    assert right > 0


def test_a_draft_model_that_is_the_model_is_always_right(model: Model) -> None:
    answer = generate(model, "q", max_tokens=40, lookup=16, draft=model)
    guesses = answer.guesses
    guesses._after = _Nothing()  # no n-gram is ever found
    "".join(answer)
    assert guesses.guessed == guesses.right > 20


class _Nothing(dict):
    def __setitem__(self, key: object, value: object) -> None:
        pass


def test_a_draft_model_needs_the_same_tokens(model: Model, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c")
    other = halfbyte.load(halfbyte.convert(tmp_path / "c", tmp_path / "m.hb", recipe="q8"))
    with pytest.raises(UsageError, match="another tokenizer"):
        generate(model, "x", draft=other)
