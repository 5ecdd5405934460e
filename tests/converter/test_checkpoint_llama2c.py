"""llama2.c checkpoints: three layouts of one model, exact codes, damaged headers."""

import struct
from pathlib import Path

import numpy as np
import pytest

from halfbyte.converter.checkpoints import Packed, open_checkpoint
from halfbyte.formats.errors import CheckpointError

DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB, POSITIONS = 16, 20, 2, 2, 1, 10, 6


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Meta's pairs (2i, 2i + 1) to Hugging Face's halves, by reshaping."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    kv_dim = DIM // HEADS * KV
    shapes = {
        "embedding": (VOCAB, DIM), "wq": (LAYERS, DIM, DIM), "wk": (LAYERS, kv_dim, DIM),
        "wv": (LAYERS, kv_dim, DIM), "wo": (LAYERS, DIM, DIM), "w1": (LAYERS, HIDDEN, DIM),
        "w2": (LAYERS, DIM, HIDDEN), "w3": (LAYERS, HIDDEN, DIM), "att": (LAYERS, DIM), "ffn": (LAYERS, DIM),
        "final": (DIM,), "output": (VOCAB, DIM),
    }  # fmt: skip
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def legacy_file(path: Path, w: dict[str, np.ndarray], tied: bool) -> Path:
    order = ["embedding", "att", "wq", "wk", "wv", "wo", "ffn", "w1", "w2", "w3", "final"]
    header = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB if tied else -VOCAB, POSITIONS)
    body = b"".join(w[k].tobytes() for k in order) + bytes(4 * POSITIONS * (DIM // HEADS))
    path.write_bytes(header + body + (b"" if tied else w["output"].tobytes()))
    return path


def v2_file(path: Path, w: dict[str, np.ndarray], group: int) -> dict[str, np.ndarray]:
    """Write version 2 and return each matrix as float32, dequantised while writing it."""
    header = struct.pack("<Ii7iBi", 0x616B3432, 2, DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB, POSITIONS, 1, group)
    data = header.ljust(256, b"\0") + b"".join(w[k].tobytes() for k in ("att", "ffn", "final"))
    exact = {}
    for key in ("embedding", "wq", "wk", "wv", "wo", "w1", "w2", "w3"):
        layers = w[key] if w[key].ndim == 3 else w[key][None]
        exact[key] = np.empty_like(layers)
        for layer, matrix in enumerate(layers):
            flat = matrix.reshape(-1, group)
            scale = (np.abs(flat).max(1) / np.float32(127)).astype(np.float32)
            codes = np.rint(flat / scale[:, None]).astype(np.int8)
            data += codes.tobytes() + scale.tobytes()
            exact[key][layer] = (scale[:, None] * codes.astype(np.float32)).reshape(matrix.shape)
    path.write_bytes(data)
    return exact


def test_legacy_and_v1_and_gguf_of_one_model_agree(shared_data: Path) -> None:
    folder = shared_data / "stories260K"
    legacy = open_checkpoint(folder / "stories260K.legacy_f32.bin")
    v1 = open_checkpoint(folder / "stories260K.v1_f32.bin")
    gguf = open_checkpoint(folder / "stories260K.gguf")
    assert len(legacy.names()) == 2 + 5 * 9
    assert set(legacy.names()) == set(v1.names()) == set(gguf.names()) - {"lm_head.weight"}
    for name in legacy.names():
        expected = legacy.read(name)
        assert isinstance(expected, np.ndarray) and expected.dtype == np.float32
        np.testing.assert_array_equal(v1.read(name), expected)
        np.testing.assert_array_equal(gguf.read(name), expected)
    assert legacy.config == v1.config
    for key in ("model_type", "hidden_size", "num_key_value_heads", "rms_norm_eps", "rope_theta"):
        assert gguf.config[key] == legacy.config[key]


def test_v2_codes_and_weights_equal_an_independent_unpacking(shared_data: Path) -> None:
    path = shared_data / "stories260K" / "stories260K.v2_q8_0.bin"
    raw = path.read_bytes()
    dim, hidden, layers, heads, kv, vocab, _ = struct.unpack_from("<7i", raw, 8)
    (group,) = struct.unpack_from("<i", raw, 37)
    position = 256 + 4 * dim * (2 * layers + 1)
    checkpoint = open_checkpoint(path)
    kv_dim = dim * kv // heads
    parts = [
        ("model.embed_tokens", 1, vocab, dim),
        ("model.layers.{}.self_attn.q_proj", layers, dim, dim),
        ("model.layers.{}.self_attn.k_proj", layers, kv_dim, dim),
        ("model.layers.{}.self_attn.v_proj", layers, kv_dim, dim),
        ("model.layers.{}.self_attn.o_proj", layers, dim, dim),
        ("model.layers.{}.mlp.gate_proj", layers, hidden, dim),
        ("model.layers.{}.mlp.down_proj", layers, dim, hidden),
        ("model.layers.{}.mlp.up_proj", layers, hidden, dim),
    ]
    for pattern, count, rows, cols in parts:
        for layer in range(count):
            codes = np.frombuffer(raw, np.int8, rows * cols, position).reshape(rows, cols)
            scales = np.frombuffer(raw, "<f4", rows * cols // group, position + rows * cols)
            position += rows * cols + 4 * (rows * cols // group)
            values = (codes.reshape(-1, group) * scales[:, None]).reshape(rows, cols)
            if "q_proj" in pattern or "k_proj" in pattern:
                n = heads if "q_proj" in pattern else kv
                codes, values = half_split(codes, n), half_split(values, n)
            packed = checkpoint.read(pattern.format(layer) + ".weight")
            assert isinstance(packed, Packed) and packed.encoding == "i8"
            assert packed.group == (4 if cols == 172 else 8)
            np.testing.assert_array_equal(packed.codes, codes)
            np.testing.assert_array_equal(packed.dequantize(), values)
    assert position == len(raw)


@pytest.mark.parametrize("tied", [True, False])
def test_legacy_is_read_in_half_split_order(tmp_path: Path, tied: bool) -> None:
    w = weights(np.random.default_rng(1))
    checkpoint = open_checkpoint(legacy_file(tmp_path / "m.bin", w, tied))
    assert checkpoint.config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in checkpoint.names()) is not tied
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), w["embedding" if tied else "output"])
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        q, k = half_split(w["wq"][layer], HEADS), half_split(w["wk"][layer], KV)
        np.testing.assert_array_equal(checkpoint.read(prefix + "self_attn.q_proj.weight"), q)
        np.testing.assert_array_equal(checkpoint.read(prefix + "self_attn.k_proj.weight"), k)
        np.testing.assert_array_equal(checkpoint.read(prefix + "mlp.down_proj.weight"), w["w2"][layer])
        ffn_norm = checkpoint.read(prefix + "post_attention_layernorm.weight")
        np.testing.assert_array_equal(ffn_norm, w["ffn"][layer])
    np.testing.assert_array_equal(checkpoint.read("model.norm.weight"), w["final"])


@pytest.mark.parametrize("group", [4, 8, 32])
def test_v2_groups_that_cross_rows_stay_exact(tmp_path: Path, group: int) -> None:
    exact = v2_file(tmp_path / "m.bin", weights(np.random.default_rng(2)), group)
    checkpoint = open_checkpoint(tmp_path / "m.bin")
    for key, name, heads in (("wq", "self_attn.q_proj", HEADS), ("w2", "mlp.down_proj", 0)):
        for layer in range(LAYERS):
            full = f"model.layers.{layer}.{name}.weight"
            packed = checkpoint.read(full)
            assert isinstance(packed, Packed)
            expected = half_split(exact[key][layer], heads) if heads else exact[key][layer]
            np.testing.assert_array_equal(packed.dequantize(), expected)
            for start, stop in ((0, 1), (3, 7), (5, 5)):
                part = checkpoint.read_rows(full, start, stop)
                assert isinstance(part, Packed)
                np.testing.assert_array_equal(part.dequantize(), expected[start:stop])
                np.testing.assert_array_equal(part.codes, packed.codes[start:stop])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "sizes"),
        ({"dim": -16}, "sizes"),
        ({"layers": 0}, "layers"),
        ({"heads": 3}, "divide"),
        ({"kv": 3}, "divide"),
        ({"heads": 16, "kv": 16}, "odd width"),
        ({"hidden": 1 << 23, "dim": 1 << 20}, "truncated"),
        ({"vocab": -(1 << 31)}, "sizes"),
        ({"hidden": 24}, "truncated"),
        ({"hidden": 16}, "accounts for"),
    ],
)
def test_legacy_headers_that_cannot_be_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = legacy_file(tmp_path / "m.bin", weights(np.random.default_rng(3)), tied=True)
    names = ("dim", "hidden", "layers", "heads", "kv", "vocab", "positions")
    header = dict(zip(names, struct.unpack_from("<7i", path.read_bytes()))) | change
    path.write_bytes(struct.pack("<7i", *header.values()) + path.read_bytes()[28:])
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_other_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    v2_file(path, weights(np.random.default_rng(4)), 32)
    good = path.read_bytes()
    for data, message in (
        (good[:-1], "truncated"),
        (good + b"\0", "accounts for"),
        (good[:100], "truncated"),
        (good[:4] + struct.pack("<i", 9) + good[8:], "version 9"),
        (good[:37] + struct.pack("<i", 0) + good[41:], "group size"),
        (good[:37] + struct.pack("<i", 64) + good[41:], "whole groups"),
        (b"", "too short"),
    ):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
    path.write_bytes(good)
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError, match="no tensor"):
        checkpoint.read("model.layers.9.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match="no rows"):
        checkpoint.read_rows("model.norm.weight", 3, DIM + 1)


def test_the_tokenizer_of_the_right_size_is_found(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "stories260K"
    source = open_checkpoint(folder / "stories260K.v1_f32.bin").tokenizer_source
    assert source is not None and source.kind == "llama2.c"
    assert source.data == (folder / "tok512.bin").read_bytes()
    model = tmp_path / "m.bin"
    model.write_bytes((folder / "stories260K.v1_f32.bin").read_bytes())
    assert open_checkpoint(model).tokenizer_source is None
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<ifi", 3, 0.0, 3) + b"abc")  # one piece: not ours
    (tmp_path / "tok512.model").write_bytes((folder / "tok512.model").read_bytes())
    source = open_checkpoint(model).tokenizer_source
    assert source is not None and source.kind == "sentencepiece"
    given = open_checkpoint(model, tokenizer=tmp_path / "tokenizer.bin").tokenizer_source
    assert given is not None and given.kind == "llama2.c"
    with pytest.raises(CheckpointError, match="cannot tell"):
        open_checkpoint(model, tokenizer=tmp_path / "words.txt")
