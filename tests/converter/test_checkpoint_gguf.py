"""GGUF checkpoints: code-exact blocks, translated names and configs, damage in every byte."""

import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from halfbyte.converter.checkpoints import Packed, ggml_types, open_checkpoint
from halfbyte.formats.errors import CheckpointError

WIDTH, HIDDEN, HEADS, KV, VOCAB = 64, 96, 4, 2, 8
HEAD_DIM = WIDTH // HEADS
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "IQ2_S": 22, "BF16": 30}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, value: Any) -> bytes:
    """A metadata pair: bool, int (u32), float (f32), str, or a list of one of these."""
    kinds = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}
    head = text(key)
    if isinstance(value, str):
        return head + struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        if isinstance(value[0], str):
            return head + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(v) for v in value)
        number, code = kinds[type(value[0])]
        return head + struct.pack(f"<IIQ{len(value)}{code}", 9, number, len(value), *value)
    number, code = kinds[type(value)]
    return head + struct.pack("<I" + code, number, value)


def encode(array: np.ndarray, kind: str) -> bytes:
    """Quantise the way ggml's reference does (values, not ties, matter here: tests compare the codes)."""
    if kind in ("F32", "F16", "BF16"):
        return array.astype(
            {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind]
        ).tobytes()
    out = b""
    for block in array.reshape(-1, 32):
        scale = np.float16(np.abs(block).max() / (127 if kind == "Q8_0" else 7))
        codes = np.rint(block / np.float32(scale)).astype(np.int8)
        if kind == "Q8_0":
            out += scale.tobytes() + codes.tobytes()
        else:
            nibbles = np.clip(codes + 8, 0, 15).astype(np.uint8)
            out += scale.tobytes() + (nibbles[:16] | nibbles[16:] << 4).tobytes()
    return out


def gguf_bytes(
    metadata: dict[str, Any],
    tensors: dict[str, tuple[np.ndarray, str]],
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(pair(k, v) for k, v in metadata.items())
    data = b""
    for name, (array, kind) in tensors.items():
        data += bytes(-len(data) % alignment)
        dims = array.shape[::-1]
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, TYPES[kind], len(data))
        data += encode(array, kind) if kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0") else bytes(array.size)
    return head + bytes(-len(head) % alignment) + data


def metadata_of(arch: str, **more: Any) -> dict[str, Any]:
    """The keys every architecture has; `__` in a further key stands for a dot."""
    own = {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": WIDTH,
        "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV,
        "attention.layer_norm_rms_epsilon": 1e-6,
        **{k.replace("__", "."): v for k, v in more.items()},
    }
    return {"general.architecture": arch, **{f"{arch}.{k}": v for k, v in own.items()}}


def layer(rng: np.random.Generator, kind: str = "F32") -> dict[str, tuple[np.ndarray, str]]:
    shapes = {
        "token_embd": (VOCAB, WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (KV * HEAD_DIM, WIDTH),
        "blk.0.attn_v": (KV * HEAD_DIM, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_norm": (WIDTH,),
        "blk.0.ffn_gate": (HIDDEN, WIDTH),
        "blk.0.ffn_up": (HIDDEN, WIDTH),
        "blk.0.ffn_down": (WIDTH, HIDDEN),
    }
    tensors = {}
    for name, shape in shapes.items():
        array = rng.standard_normal(shape).astype(np.float32)
        tensors[f"{name}.weight"] = (array, kind if len(shape) == 2 else "F32")
    return tensors


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of llama.cpp's permutation of query and key rows, by reshaping."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(path: Path, *args: Any, **kwargs: Any) -> Path:
    path.write_bytes(gguf_bytes(*args, **kwargs))
    return path


@pytest.mark.parametrize("arch", ["llama", "smollm3", "granite", "qwen2"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_every_type_is_exact_and_in_half_split_order(tmp_path: Path, arch: str, kind: str) -> None:
    tensors = layer(np.random.default_rng(7), kind)
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", metadata_of(arch), tensors))
    for name, gguf_name, heads in (
        ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight", HEADS),
        ("model.layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight", KV),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight", 0),
    ):
        array = tensors[gguf_name][0]
        heads = 0 if arch == "qwen2" else heads
        if kind in ("Q8_0", "Q4_0"):
            size = 34 if kind == "Q8_0" else 18
            blocks = np.frombuffer(encode(array, kind), np.uint8).reshape(-1, size)
            scales = blocks[:, :2].copy().view(np.float16).reshape(array.shape[0], -1)
            if kind == "Q8_0":
                codes = blocks[:, 2:].copy().view(np.int8)
            else:
                codes = np.stack([b >> s & 15 for b in blocks[:, 2:] for s in (0, 4)])
            codes = codes.reshape(array.shape)
            values = np.repeat(scales.astype(np.float32), 32, 1) * (codes - np.float32(8 * (kind == "Q4_0")))
            packed = checkpoint.read(name)
            assert isinstance(packed, Packed) and packed.group == 32
            assert packed.encoding == checkpoint.dtype(name) == {"Q8_0": "q8", "Q4_0": "i4"}[kind]
            wanted = [half_split(a, heads) if heads else a for a in (codes, scales, values)]
            for found, expected in zip((packed.codes, packed.scales, packed.dequantize()), wanted):
                np.testing.assert_array_equal(found, expected)
            part = checkpoint.read_rows(name, 3, 21)
            assert isinstance(part, Packed)
            np.testing.assert_array_equal(part.dequantize(), wanted[2][3:21])
        else:
            dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind]
            expected = (half_split(array, heads) if heads else array).astype(dtype)
            found = checkpoint.read(name)
            assert isinstance(found, np.ndarray) and found.dtype == dtype
            assert found.tobytes() == expected.tobytes()
            part = checkpoint.read_rows(name, 3, 21)
            assert isinstance(part, np.ndarray) and part.tobytes() == expected[3:21].tobytes()


def test_tied_head_bias_and_rope_factors(tmp_path: Path) -> None:
    tensors = layer(np.random.default_rng(8))
    bias = np.arange(WIDTH, dtype=np.float32)
    factors = np.array([1.0, 1.1, 8.0], np.float32)
    tensors |= {"blk.0.attn_q.bias": (bias, "F32"), "rope_freqs.weight": (factors, "F32")}
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", metadata_of("llama"), tensors, version=2))
    assert checkpoint.config["tie_word_embeddings"] and checkpoint.config["attention_bias"]
    assert checkpoint.config["rope_freq_factors"] == [1.0, 1.1, 8.0]
    assert checkpoint.ignored == ("rope_freqs.weight",)
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), tensors["token_embd.weight"][0])
    found = checkpoint.read("model.layers.0.self_attn.q_proj.bias")
    np.testing.assert_array_equal(found, half_split(bias[:, None], HEADS)[:, 0])


def test_gemma_norms_lose_their_offset_and_the_largest_its_scale(tmp_path: Path) -> None:
    tensors = layer(np.random.default_rng(9))
    sizes = {"post_attention_norm": WIDTH, "post_ffw_norm": WIDTH, "attn_q_norm": HEAD_DIM}
    sizes["attn_k_norm"] = HEAD_DIM
    for extra, size in sizes.items():
        tensors[f"blk.0.{extra}.weight"] = (np.full(size, 1.25, np.float32), "F32")
    metadata = metadata_of("gemma3", attention__sliding_window=512, rope__scaling__type="linear",
                           rope__scaling__factor=8.0)  # fmt: skip
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", metadata, tensors))
    prefix = "model.layers.0."
    for name in (
        "post_attention_layernorm", "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm"
    ):  # fmt: skip
        np.testing.assert_array_equal(checkpoint.read(f"{prefix}{name}.weight"), np.float32(0.25))
    expected = tensors["blk.0.ffn_norm.weight"][0] - np.float32(1)
    np.testing.assert_array_equal(checkpoint.read(prefix + "pre_feedforward_layernorm.weight"), expected)
    config = checkpoint.config
    assert config["model_type"] == "gemma3_text" and config["query_pre_attn_scalar"] == HEAD_DIM
    assert config["rope_theta"] == 1e6 and config["rope_local_base_freq"] == 1e4
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert config["layer_types"] == ["sliding_attention"] and config["rms_norm_eps"] == 1e-6


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("arch", "more", "renamed", "expected"),
    [
        ("llama", {"attention__sliding_window": 64}, {}, {"model_type": "mistral", "sliding_window": 64}),
        ("llama", {"rope__dimension_count": 8}, {}, {"partial_rotary_factor": 0.5}),
        ("qwen3", {"attention__key_length": 32, "attention__value_length": 32}, {}, {"head_dim": 32}),
        (
            "qwen2",
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 32,
            },
            {},
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        ),
        (
            "granite",
            {"attention__scale": 0.5, "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0},
            {},
            {
                "attention_multiplier": 0.5,
                "embedding_multiplier": 12.0,
                "residual_multiplier": 0.22,
                "logits_scaling": 8.0,
            },
        ),
        ("gemma2", {}, {}, {"attn_logit_softcapping": 50.0, "hidden_activation": "gelu_pytorch_tanh"}),
        ("smollm3", {}, {}, {"no_rope_layers": [1]}),
        (
            "olmo2",
            {},
            {"attn_norm": "post_attention_norm", "ffn_norm": "post_ffw_norm"},
            {"model_type": "olmo2"},
        ),
        (
            "phi3",
            {},
            {"attn_q": "attn_qkv", "attn_k": None, "attn_v": None, "ffn_gate": None},
            {"sliding_window": None},
        ),
    ],
)
def test_configs_and_names(
    tmp_path: Path, arch: str, more: dict[str, Any], renamed: dict[str, str | None], expected: dict[str, Any]
) -> None:
    tensors = {}
    for name, tensor in layer(np.random.default_rng(10)).items():
        part = name.split(".")[-2]
        new = renamed.get(part, part)
        if new is not None:
            tensors[name.replace(f".{part}.", f".{new}.")] = tensor
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", metadata_of(arch, **more), tensors))
    assert {k: checkpoint.config[k] for k in expected} == expected
    assert len(checkpoint.names()) == len(tensors)
    last = {name.split(".")[-2] for name in checkpoint.names() if "self_attn" in name}
    assert last == ({"qkv_proj", "o_proj"} if arch == "phi3" else ATTENTION)
    for name in checkpoint.names():
        assert checkpoint.read_rows(name, 0, 2).shape[0] == 2


def test_longrope_factors_become_config(tmp_path: Path) -> None:
    tensors = layer(np.random.default_rng(11))
    tensors = {k: v for k, v in tensors.items() if not k.startswith("blk.0.attn_") and "gate" not in k}
    for which, value in (("long", 2.5), ("short", 1.0)):
        tensors[f"rope_factors_{which}.weight"] = (np.full(2, value, np.float32), "F32")
    metadata = metadata_of("phi3", rope__scaling__original_context_length=64, rope__scaling__attn_factor=1.5)
    config = open_checkpoint(write(tmp_path / "m.gguf", metadata, tensors)).config
    assert config["original_max_position_embeddings"] == 64
    assert config["rope_scaling"]["long_factor"] == [2.5, 2.5]
    assert config["rope_scaling"]["short_factor"] == [1.0, 1.0]


def test_tokenizer_and_generation(tmp_path: Path) -> None:
    tokens = [f"t{i}" for i in range(VOCAB)]
    own = {
        "model": "gpt2", "pre": "qwen2", "tokens": tokens, "token_type": [1] * VOCAB, "bos_token_id": 3,
        "eos_token_id": 4, "eot_token_id": 5, "eom_token_id": 4, "add_bos_token": False,
    }  # fmt: skip
    metadata = metadata_of("llama") | {f"tokenizer.ggml.{k}": v for k, v in own.items()}
    metadata["tokenizer.chat_template"] = "{{ x }}"
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", metadata, layer(np.random.default_rng(12))))
    assert checkpoint.generation == {"bos_token_id": 3, "eos_token_id": [4, 5], "add_bos": False}
    assert checkpoint.chat_template == "{{ x }}"
    source = checkpoint.tokenizer_source
    assert source is not None and source.kind == "gguf" and isinstance(source.data, dict)
    assert source.data["tokenizer.ggml.tokens"] == tokens and source.data["tokenizer.ggml.pre"] == "qwen2"


def test_story_model(shared_data: Path) -> None:
    checkpoint = open_checkpoint(shared_data / "stories260K" / "stories260K.gguf")
    assert checkpoint.generation == {"bos_token_id": 1, "eos_token_id": [2], "add_bos": True}
    source = checkpoint.tokenizer_source
    assert source is not None and isinstance(source.data, dict)
    assert len(source.data["tokenizer.ggml.tokens"]) == checkpoint.config["vocab_size"] == 512
    assert len(checkpoint.digest()) == 64


@pytest.mark.parametrize("kind", [k for k, t in ggml_types.TYPES.items() if t.unpack is not None])
def test_codes_of_heads_are_reordered_with_their_rows(tmp_path: Path, kind: str) -> None:
    """Real blocks of every type as query rows: half-split rows, whatever is asked for."""
    data = np.load(Path(__file__).resolve().parent / "fixtures" / "ggml-blocks.npz")[f"{kind}.data"]
    block = ggml_types.TYPES[kind]
    # 32 rows of 256 columns
    rows = np.resize(
        data.reshape(-1, 256 // block.elements * block.nbytes), (32, 256 // block.elements * block.nbytes)
    )
    stored = ggml_types.decode(rows, kind)
    assert isinstance(stored, Packed)
    number = next(n for n, name in ggml_types.NAMES.items() if name == kind)
    shapes = {"token_embd": (8, 256), "output_norm": (256,), "blk.0.attn_q": (32, 256)}
    tensors = {f"{n}.weight": (np.ones(s, np.float32), "F32") for n, s in shapes.items()}
    content = gguf_bytes(metadata_of("llama", embedding_length=256), tensors)
    # the query is the last tensor: the type in its row of the table, then its bytes
    at = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    content = content[:at] + struct.pack("<I", number) + content[at + 4 : -32 * 256 * 4] + rows.tobytes()
    (tmp_path / "m.gguf").write_bytes(content)
    name = "model.layers.0.self_attn.q_proj.weight"
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.dtype(name) == stored.encoding
        for start, stop in ((0, 32), (3, 9), (31, 32), (7, 7)):
            part = checkpoint.read_rows(name, start, stop)
            assert isinstance(part, Packed)
            for plane, values in stored.planes().items():
                np.testing.assert_array_equal(part.planes()[plane], half_split(values, HEADS)[start:stop])


def test_unsupported_files_are_refused_by_name(tmp_path: Path) -> None:
    path, good = tmp_path / "m.gguf", layer(np.random.default_rng(13))
    metadata = metadata_of("llama")
    data = gguf_bytes(metadata, good)
    codebook = good | {"blk.0.ffn_up.weight": (good["blk.0.ffn_up.weight"][0], "IQ2_S")}
    stray = good | {"blk.0.attn_q_norm.weight": (np.ones(4, np.float32), "F32")}
    beyond = good | {"blk.1.attn_norm.weight": (np.ones(4, np.float32), "F32")}
    no_embedding = {k: v for k, v in good.items() if k != "token_embd.weight"}
    for content, message in (
        (gguf_bytes(metadata, codebook), r"blk\.0\.ffn_up\.weight.*IQ2_S"),
        (gguf_bytes(metadata, stray), "attn_q_norm"),
        (gguf_bytes(metadata, beyond), r"blk\.1\.attn_norm"),
        (gguf_bytes(metadata, no_embedding), "token_embd"),
        (gguf_bytes(metadata_of("mamba"), good), "architecture 'mamba'"),
        (gguf_bytes(metadata | {"split.count": 2}, good), "parts"),
        (gguf_bytes(metadata | {"llama.expert_count": 8}, good), "mixtures of experts"),
        (gguf_bytes(metadata | {"llama.block_count": 1 << 30}, good), "layers"),
        (gguf_bytes(metadata | {"llama.attention.head_count": 3}, good), "heads"),
        (gguf_bytes(metadata | {"general.alignment": 24}, good), "alignment"),
        (gguf_bytes(metadata, good, version=1), "version 1"),
        (data[:4] + struct.pack(">I", 3) + data[8:], "big-endian"),
        (b"FUGG" + data[4:], "little-endian"),
        (data[:8] + struct.pack("<QQ", 1 << 60, 0) + data[24:], "claims"),
        (data[:8] + struct.pack("<QQ", 0, 1 << 60) + data[24:], "claims"),
        (data.replace(b"blk.0.attn_v.weight", b"blk.0.attn_k.weight"), "twice"),
        (data.replace(b"llama.context_length", b"llama.embedding_lengt"[:20]), "context_length"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_hostile_arrays_are_refused_without_reading_them(tmp_path: Path) -> None:
    """Files of some 40 bytes whose one array claims 2^61 elements of each kind, nested ones included."""
    path = tmp_path / "m.gguf"
    for kind in range(14):
        body = text("k") + struct.pack("<IIQ", 9, kind, 1 << 61)
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + body + bytes(8))
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def small_file() -> bytes:
    tensors = layer(np.random.default_rng(14), "Q4_0")
    keep = ("token_embd.weight", "blk.0.attn_k.weight", "output_norm.weight")
    tokenizer = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.scores": [0.5],
    }
    return gguf_bytes(metadata_of("llama") | tokenizer, {k: tensors[k] for k in keep})


def exercise(path: Path) -> bool:
    """Open and read everything; whether it all worked. Anything but CheckpointError fails the test."""
    try:
        with open_checkpoint(path) as checkpoint:
            for name in checkpoint.names():
                checkpoint.read(name)
            _ = checkpoint.tokenizer_source, checkpoint.digest()
    except CheckpointError:
        return False
    return True


def test_truncation_at_every_length_is_refused(tmp_path: Path) -> None:
    path, data = tmp_path / "m.gguf", small_file()
    path.write_bytes(data)
    assert exercise(path)
    for length in reversed(range(4, len(data))):
        os.truncate(path, length)
        assert not exercise(path), length


def test_flipped_bytes_are_refused_or_harmless(tmp_path: Path) -> None:
    path, data = tmp_path / "m.gguf", small_file()
    path.write_bytes(data)
    rng = np.random.default_rng(15)
    header = data.index(b"output_norm") + 64
    outcomes = set()
    with open(path, "r+b", buffering=0) as file:
        for _ in range(3000):
            damaged = bytearray(data)
            for position in rng.integers(4, header, rng.integers(1, 4)):
                damaged[position] = rng.integers(256)
            file.seek(0)
            file.write(damaged)
            outcomes.add(exercise(path))
    assert outcomes == {True, False}
