"""The demo model's folder as shipped, and the cleaning of the text it was trained on."""

import json
from pathlib import Path

import numpy as np
import pytest

from halfbyte.converter.demo.stories import clean, first_sentence, is_whole, split_stories

FOLDER = Path(__file__).resolve().parents[2] / "runtime" / "demo_model"
STORY = (
    "Once upon a time, there was a small boat. The boat was red and it had a white sail.\n"
    'One day, Tim saw the boat near the shore. "Can I come with you?" he asked. The boat said yes.\n'
    "They went far over the lake and came home before dark."
)


def test_stories_are_split_and_made_plain() -> None:
    text = "  One.  Two. \n\n Three. \n<|endoftext|>\n\u201cHi,\u201d she said \u2013 twice\u2026\n<|endoftext|>\n"
    assert split_stories(text) == ["One. Two.\nThree.", '"Hi," she said - twice...']


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s[:-1],  # stops inside a sentence
        lambda s: s[:100] + ".",  # too short
        lambda s: s.replace("Tim", "Tïm"),
        lambda s: s.replace('"Can', "Can"),  # a quotation that never opens
        lambda s: s.replace("small boat", "small small small boat"),
        lambda s: s + 3 * "\nThe boat was very happy.",
        lambda s: s.replace("red", "<red>"),
    ],
)
def test_a_spoilt_story_is_dropped(spoil) -> None:
    assert is_whole(STORY)
    assert not is_whole(spoil(STORY))


def test_clean_drops_repeats_and_made_up_words() -> None:
    variants = [STORY.replace("small", size) for size in ("small", "small", "white", "red", "far")]
    odd = STORY.replace("small", "smorl")
    # the copy goes, and with it no word of the others is rare; "smorl" stands in one story only
    assert clean([*variants, odd], rare=2) == [v for v in dict.fromkeys(variants) if "small boat" not in v]


def test_first_sentence() -> None:
    assert first_sentence(STORY) == "Once upon a time, there was a small boat."
    assert first_sentence("No end\nhere") == ""


def test_the_folder_is_small_and_complete() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000


def test_weights_match_the_config() -> None:
    import ml_dtypes
    from safetensors.numpy import load_file

    config = json.loads((FOLDER / "config.json").read_text())
    dim, ffn, depth = (config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    kv = config["num_key_value_heads"] * config["head_dim"]
    weights = load_file(FOLDER / "model.safetensors")
    assert len(weights) == 2 + 9 * depth and "lm_head.weight" not in weights
    assert weights["model.embed_tokens.weight"].shape == (config["vocab_size"], dim)
    for i in range(depth):
        at = f"model.layers.{i}."
        assert weights[at + "self_attn.k_proj.weight"].shape == (kv, dim)
        assert weights[at + "mlp.down_proj.weight"].shape == (dim, ffn)
    for weight in weights.values():
        assert weight.dtype == ml_dtypes.bfloat16
        assert np.isfinite(weight.astype(np.float32)).all()
    assert [dim % 32, ffn % 32, kv % 32] == [0, 0, 0]


def test_tokenizer_round_trip() -> None:
    from tokenizers import Tokenizer

    config = json.loads((FOLDER / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"] == 2048
    assert tokenizer.token_to_id("<s>") == config["bos_token_id"]
    assert tokenizer.token_to_id("</s>") == config["eos_token_id"]
    text = STORY + " Café, 火, \U0001f642, \t<tag>."
    ids = tokenizer.encode(text).ids
    assert ids[0] == config["bos_token_id"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
