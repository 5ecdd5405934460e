"""The demo model's folder as shipped, and the cleaning of the text it was trained on."""

import json
from pathlib import Path

import numpy as np
import pytest

import halfbyte
from halfbyte.converter import calibrate
from halfbyte.converter.demo.stories import clean, first_sentence, is_whole, split_stories
from halfbyte.formats.container import File
from halfbyte.runtime.evaluate import measure
from halfbyte.runtime.lockstep import lockstep

FOLDER = Path(__file__).resolve().parents[2] / "runtime" / "demo_model"
SHIPPED = FOLDER / "demo.hb"
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
        "demo.hb",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sizes.pop("demo.hb") <= 1_250_000 and sum(sizes.values()) <= 4_000_000


# ---- the file in four bits ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The float model, and its four bits without training, by recipe or method."""
    folder = tmp_path_factory.mktemp("untrained")
    options = {"f32": {"recipe": "f32"}} | {m: {"recipe": "q4-", "method": m} for m in ("rtn", "gptq")}
    return {n: halfbyte.convert(FOLDER, folder / f"{n}.hb", proof=False, **o) for n, o in options.items()}


def test_the_file_verifies_and_is_of_this_checkpoint(untrained: dict[str, Path]) -> None:
    model = halfbyte.load(SHIPPED, backend="reference", verify=True)
    other = halfbyte.load(untrained["gptq"], backend="reference")
    facts, same = model.facts(), other.facts()
    assert facts["quantization.method"] == "qat" and facts["bits_per_weight"] == same["bits_per_weight"]
    assert File(SHIPPED).sections.keys() == {*File(untrained["gptq"]).sections, "PROF"}
    assert [model.vocab_size, model.context_length] == [other.vocab_size, other.context_length]
    assert [(t.name, t.encoding, t.shape) for t in File(SHIPPED).tensors] == [
        (t.name, t.encoding, t.shape) for t in File(untrained["gptq"]).tensors
    ]


def test_the_file_runs_on_every_backend(backend: str) -> None:
    """Every op as the reference has it on the same inputs, and text."""
    for outcome in lockstep(File(SHIPPED), backend, "i8g32", rows_of=(5, 1)):
        assert outcome.ok, outcome
    model = halfbyte.load(SHIPPED, backend=backend)
    assert "".join(model.generate("Once upon a time", max_tokens=8, temperature=0.6, seed=1)).isascii()


@pytest.mark.parametrize("mode", ["k4v4", "tq3-qjl"])
def test_attention_to_few_positions_is_close_on_packed_caches(backend: str, mode: str) -> None:
    """Unlike a random model's, its weights are of very different sizes, over which 127 steps are few: .03 to .05."""
    found = lockstep(File(SHIPPED), backend, "i8g32", kv=mode, rows_of=(64, 64))
    assert all(o.ok for o in found), found
    assert next(o.worst for o in found if o.op == "attend") < 2.0**-7


def test_the_file_is_closer_than_four_bits_without_training(untrained: dict[str, Path]) -> None:
    """KL divergence from the float model on text that it writes itself; the training's had other seeds."""
    parts = calibrate.own_sequences(untrained["f32"], 256, 16, seed=12345)
    reference = halfbyte.load(untrained["f32"])
    files = {"trained": SHIPPED, "rtn": untrained["rtn"], "gptq": untrained["gptq"]}
    kl = {n: measure(halfbyte.load(p), parts, against=reference)["kld_mean"] for n, p in files.items()}
    assert kl["trained"] < kl["gptq"] < kl["rtn"]


# ---- the checkpoint -----------------------------------------------------------------------------


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
