"""Hugging Face folders: whole, sharded, tied, bfloat16, wrapped; hostile safetensors files."""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from halfbyte.converter.checkpoints import open_checkpoint
from halfbyte.converter.checkpoints.bounded_file import BoundedFile
from halfbyte.converter.checkpoints.safetensors_header import read_safetensors_header
from halfbyte.formats.errors import CheckpointError

CONFIG = {"model_type": "llama", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": [2, 3]}
NAMES = {"<f4": "F32", "<f2": "F16", "<f8": "F64", "<i8": "I64", "bfloat16": "BF16"}


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        dtype = NAMES["bfloat16" if array.dtype == ml_dtypes.bfloat16 else array.dtype.str]
        begin, data = len(data), data + array.tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_folder(folder: Path, files: dict[str, Any]) -> Path:
    """Files by name: dicts of arrays become safetensors, other dicts JSON."""
    for name, content in files.items():
        if name.endswith(".safetensors") and isinstance(content, dict):
            content = safetensors_bytes(content)
        elif not isinstance(content, bytes):
            content = json.dumps(content).encode()
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "model.embed_tokens.weight": rng.standard_normal((6, 4)).astype(ml_dtypes.bfloat16),
        "model.norm.weight": rng.standard_normal(4).astype(np.float32),
        "model.layers.0.mlp.up_proj.weight": rng.standard_normal((8, 4)).astype(np.float16),
        "model.layers.0.mlp.down_proj.weight": rng.standard_normal((4, 8)),
        "lm_head.weight": rng.standard_normal((6, 4)).astype(np.float32),
    }


def check_tensors(checkpoint: Any, tensors: dict[str, np.ndarray]) -> None:
    assert sorted(checkpoint.names()) == sorted(tensors)
    for name, expected in tensors.items():
        found = checkpoint.read(name)
        if expected.dtype == np.float64:
            expected = expected.astype(np.float32)
        assert name in checkpoint and checkpoint.shape(name) == expected.shape
        assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes()
        assert checkpoint.read_rows(name, 1, 3).tobytes() == expected[1:3].tobytes()
        assert checkpoint.read_rows(name, 2, 2).shape == expected[2:2].shape


def test_one_file(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    write_folder(tmp_path, {"config.json": CONFIG, "model.safetensors": tensors})
    with open_checkpoint(tmp_path) as checkpoint:
        check_tensors(checkpoint, tensors)
        assert checkpoint.format == "huggingface" and checkpoint.tokenizer_source is None
        assert checkpoint.generation == {"bos_token_id": 1, "eos_token_id": [2, 3], "add_bos": None}
        assert [checkpoint.dtype(n) for n in tensors] == ["bf16", "f32", "f16", "f64", "f32"]
    with pytest.raises(CheckpointError):
        checkpoint.read("model.norm.weight")


@pytest.mark.parametrize("with_index", [True, False])
def test_shards(tmp_path: Path, tensors: dict[str, np.ndarray], with_index: bool) -> None:
    names = list(tensors)
    parts = {
        "a.safetensors": {n: tensors[n] for n in names[:2]},
        "b.safetensors": {n: tensors[n] for n in names[2:]},
    }
    index = {"metadata": {}, "weight_map": {n: shard for shard, part in parts.items() for n in part}}
    write_folder(tmp_path, {"config.json": CONFIG, **parts})
    if with_index:
        write_folder(tmp_path, {"model.safetensors.index.json": index})
    check_tensors(open_checkpoint(tmp_path), tensors)


def test_digest_names_the_source(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    write_folder(tmp_path, {"config.json": CONFIG, "model.safetensors": tensors})
    first = open_checkpoint(tmp_path).digest()
    assert first == open_checkpoint(tmp_path).digest() and len(first) == 64
    write_folder(tmp_path, {"config.json": {**CONFIG, "rms_norm_eps": 1e-5}})
    assert open_checkpoint(tmp_path).digest() != first


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_embeddings_are_found_under_both_names(tmp_path: Path, stored: str) -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    config = {"model_type": "gemma2"}  # says nothing: only one is stored, so they are tied
    write_folder(tmp_path, {"config.json": config, "model.safetensors": {stored: matrix}})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names() == ["model.embed_tokens.weight"]
    assert checkpoint.config["tie_word_embeddings"] is True
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert name in checkpoint
        np.testing.assert_array_equal(checkpoint.read(name), matrix)
    write_folder(tmp_path, {"config.json": CONFIG})
    with pytest.raises(CheckpointError, match="does not tie"):
        open_checkpoint(tmp_path)


def test_story_model_whose_head_alone_is_stored(shared_data: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    folder = shared_data / "tinystories-656k"
    expected = safetensors.load_file(folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    np.testing.assert_array_equal(
        checkpoint.read("model.embed_tokens.weight"), expected.pop("lm_head.weight")
    )
    assert set(checkpoint.names()) == {*expected, "model.embed_tokens.weight"}
    for name, array in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)
    assert checkpoint.tokenizer_source is not None and checkpoint.tokenizer_source.kind == "tokenizer.json"
    assert checkpoint.generation == {"bos_token_id": 1, "eos_token_id": [2], "add_bos": True}


def test_multimodal_wrapper_is_unwrapped(tmp_path: Path) -> None:
    ones = np.ones((2, 4), np.float32)
    config = {
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {"model_type": "gemma3_text", "hidden_size": 4, "sliding_window": 1024},
        "vision_config": {"hidden_size": 9},
    }
    stored = {
        "language_model.model.embed_tokens.weight": ones,
        "language_model.model.layers.0.self_attn.q_proj.weight": 2 * ones,
        "vision_tower.vision_model.post_layernorm.weight": ones,
        "multi_modal_projector.mm_soft_emb_norm.weight": ones,
    }
    write_folder(tmp_path, {"config.json": config, "model.safetensors": stored})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names() == ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
    assert set(checkpoint.ignored) == set(list(stored)[2:])
    assert checkpoint.config["sliding_window"] == 1024 and checkpoint.config["num_attention_heads"] == 8
    assert checkpoint.config["model_type"] == "gemma3_text"
    assert checkpoint.generation["eos_token_id"] == [1, 106]
    newer = {k.replace("language_model.model.", "model.language_model."): v for k, v in stored.items()}
    write_folder(tmp_path, {"model.safetensors": newer})
    assert open_checkpoint(tmp_path).names() == checkpoint.names()


def test_newer_rope_parameters_are_said_the_older_way(tmp_path: Path) -> None:
    llama3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
    config = {"model_type": "llama", "rope_parameters": llama3}
    write_folder(tmp_path, {"config.json": config, "model.safetensors": {"lm_head.weight": np.ones((2, 2))}})
    read = open_checkpoint(tmp_path).config
    assert read["rope_theta"] == 500000.0 and read["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    local = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_theta": 1e4},
    }
    write_folder(tmp_path, {"config.json": {"model_type": "gemma3_text", "rope_parameters": local}})
    read = open_checkpoint(tmp_path).config
    assert (read["rope_theta"], read["rope_local_base_freq"]) == (1e6, 1e4) and "rope_scaling" not in read


def test_chat_template_and_generation_config(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    files = {
        "config.json": CONFIG,
        "model.safetensors": {"model.norm.weight": np.ones(2, np.float32)},
        "generation_config.json": {"eos_token_id": 7},
        "tokenizer_config.json": {"chat_template": named, "add_bos_token": False},
        "added_tokens.json": {"<x>": 5},
        "tokenizer.model": b"model",
    }
    checkpoint = open_checkpoint(write_folder(tmp_path, files))
    assert checkpoint.chat_template == "D"
    assert checkpoint.generation == {"bos_token_id": 1, "eos_token_id": [7], "add_bos": False}
    source = checkpoint.tokenizer_source
    assert source is not None
    assert (source.kind, source.data, source.added) == ("sentencepiece", b"model", {"<x>": 5})
    write_folder(tmp_path, {"chat_template.jinja": b"J", "tokenizer.json": b"{}"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.chat_template == "J"
    assert checkpoint.tokenizer_source is not None and checkpoint.tokenizer_source.kind == "tokenizer.json"


NORM = {"model.norm.weight": np.ones(2, np.float32)}
GOOD = safetensors_bytes(NORM)
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.safetensors": NORM}, "no config.json"),
        ({"config.json": CONFIG}, "no .safetensors"),
        ({"config.json": CONFIG, "pytorch_model.bin": b"x"}, "convert it to safetensors"),
        ({"config.json": b"{", "model.safetensors": NORM}, "not valid JSON"),
        ({"config.json": b"[" * 100000, "model.safetensors": NORM}, "not valid JSON"),
        ({"config.json": [], "model.safetensors": NORM}, "JSON object"),
        ({"config.json": {}, "model.safetensors": NORM}, "model_type"),
        ({"config.json": {**CONFIG, "quantization_config": {"quant_method": "hqq"}}}, "quantised by hqq"),
        ({"config.json": CONFIG, "model.safetensors": GOOD[:-1]}, "truncated"),
        ({"config.json": CONFIG, "model.safetensors": GOOD[:20]}, "truncated"),
        ({"config.json": CONFIG, "model.safetensors": {"t": np.ones(2, np.int64)}}, "t of .* is I64"),
        ({"config.json": CONFIG, "a.safetensors": NORM, "b.safetensors": NORM}, "twice"),
        ({"config.json": CONFIG, INDEX: {}}, "weight_map"),
        (
            {"config.json": CONFIG, INDEX: {"weight_map": {"t": "a.safetensors"}}},
            "lacks the shard",
        ),
        ({"config.json": CONFIG, INDEX: {"weight_map": {"t": "../a"}}}, "outside"),
        (
            {
                "config.json": CONFIG,
                INDEX: {"weight_map": {"t": "a.safetensors"}},
                "a.safetensors": NORM,
            },
            "names t, which a.safetensors lacks",
        ),
    ],
)
def test_broken_folders_are_refused_in_one_line(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    write_folder(tmp_path, files)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_of_no_known_kind_are_refused(tmp_path: Path) -> None:
    for name, content, message in (
        ("m.txt", b"hello", "neither"),
        ("m.bin", b"PK\x03\x04 and so on", "convert it to safetensors"),
        ("model.safetensors", GOOD, "give the folder"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot open"):
        open_checkpoint(tmp_path / "absent.bin")


def test_safetensors_conformance_cases(shared_data: Path) -> None:
    folder = shared_data / "conformance" / "safetensors-cases"
    cases = json.loads((folder / "expected.json").read_text())
    assert len(cases) > 10
    for case in cases:
        file = BoundedFile(folder / case["file"])
        if case["expect"] == "ok":
            read_safetensors_header(file)
        else:
            with pytest.raises(CheckpointError):
                read_safetensors_header(file)


ENTRY = '"%s":{"dtype":"F32","shape":[%d],"data_offsets":[%d,%d]}'
BOTH = "{" + ENTRY + "," + ENTRY + "}"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (BOTH % ("a", 1, 0, 4, "a", 1, 4, 8), "twice"),
        (BOTH % ("a", 2, 0, 8, "b", 1, 4, 8), "overlaps"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "hole"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "end at byte"),
        ('{"a":{"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,8]}}', "8 bytes"),
        ('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', "shape"),
        ('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,8]}}', "shape"),
        ('{"a":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}}', "unknown dtype"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}', "outside"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8e0]}}', "data_offsets"),
        ('{"a":7}', "object"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: str, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
    with pytest.raises(CheckpointError, match=message):
        read_safetensors_header(BoundedFile(path))
