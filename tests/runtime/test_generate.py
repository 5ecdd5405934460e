"""Generation: stopping, streaming, determinism."""

from pathlib import Path

import numpy as np
import pytest
from story import VOCAB, story_folder
from tiny import load_case

import halfbyte
from halfbyte.formats.errors import TokenizerError, UsageError
from halfbyte.runtime.model import Model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny story model as a file."""
    folder = tmp_path_factory.mktemp("story")
    return halfbyte.convert(story_folder(folder / "c"), folder / "m.hb", recipe="f32")


@pytest.fixture
def model(path: Path) -> Model:
    """The model on the reference backend."""
    return halfbyte.load(path, backend="reference")


def test_greedy_equals_argmax_by_hand(model: Model) -> None:
    ids = model.tokenizer.encode("Once upon")
    assert ids[0] == 0
    s, want = model.session(), []
    logits = s.feed(ids)
    for _ in range(12):
        want.append(int(logits.argmax()))
        logits = s.feed(want[-1:])
    answer = model.generate("Once upon", max_tokens=12)
    text = "".join(answer)
    cut = want.index(1) if 1 in want else len(want)
    assert answer.ids == want[:cut]
    assert text == model.tokenizer.decode([*ids, *want[:cut]])[len("Once upon") :]
    assert answer.finish_reason == ("stop" if 1 in want else "length")


def test_seed_decides(model: Model) -> None:
    def run(seed: int) -> str:
        return "".join(model.generate("Once", max_tokens=20, temperature=1.2, seed=seed))

    assert run(1) == run(1)
    assert len({run(i) for i in range(5)}) > 1


@pytest.mark.parametrize("width", [1, 2, 5])
def test_stop_strings_are_never_shown(model: Model, width: int) -> None:
    whole = "".join(model.generate("The", max_tokens=24, temperature=0.8, seed=3))
    stop = whole[7 : 7 + width]
    answer = model.generate("The", max_tokens=24, temperature=0.8, seed=3, stop=[stop, "never occurs"])
    pieces = list(answer)
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert all(pieces) and answer.finish_reason == "stop"


def test_end_token_stops(model: Model) -> None:
    bias = {1: 1e4}
    answer = model.generate("The", max_tokens=5, logit_bias=bias)
    assert list(answer) == [] and answer.finish_reason == "stop" and answer.ids == []


def test_context_ends_an_answer(model: Model) -> None:
    bias = {1: float("-inf")}
    answer = model.generate("The", max_tokens=10_000, logit_bias=bias)
    "".join(answer)
    assert answer.finish_reason == "context"
    # the last token is sampled from a full context and never fed
    assert answer.session.position == model.context_length
    assert len(answer.prompt_ids) + len(answer.ids) == model.context_length + 1


def test_continuing_a_session(model: Model) -> None:
    s = model.session()
    first = model.generate("Once upon", max_tokens=4, session=s, logit_bias={1: float("-inf")})
    "".join(first)
    s.feed(first.ids[-1:])  # the last token was shown, not fed
    "".join(model.generate(" a time", max_tokens=4, session=s))
    assert s.ids.count(0) == 1 or first.ids.count(0) > 0  # no second start token was put in


def test_ids_in_ids_out_without_a_tokenizer(tmp_path: Path) -> None:
    load_case("llama-plain").write_folder(tmp_path / "c")
    model = halfbyte.load(halfbyte.convert(tmp_path / "c", tmp_path / "m.hb"), backend="reference")
    answer = model.generate([5, 6], max_tokens=3)
    assert "".join(answer).split() == [str(i) for i in answer.ids]
    with pytest.raises(TokenizerError, match="no tokenizer"):
        model.generate("text")


def test_bad_requests(model: Model) -> None:
    for options in ({"max_tokens": -1}, {"temprature": 1}, {"temperature": -1.0}, {"top_p": 2.0}):
        with pytest.raises(UsageError):
            model.generate("The", **options)
    with pytest.raises(UsageError):
        model.generate([VOCAB]).__next__()


def test_emoji_come_whole(path: Path) -> None:
    """Tokens are bytes here, so every character of this text is split over several."""
    model = halfbyte.load(path, backend="reference")
    text = "robot 🤖 naïve 日本"
    stream, out = model.tokenizer.stream(), []
    for i in model.tokenizer.encode(text, bos=False):
        out.append(stream.push(i))
    out.append(stream.flush())
    assert "".join(out) == text and not any("�" in piece for piece in out)


def test_logits_are_the_callers_own(model: Model) -> None:
    s = model.session()
    a = s.feed([0, 5])
    kept = a.copy()
    s.feed([7])
    np.testing.assert_array_equal(a, kept)
