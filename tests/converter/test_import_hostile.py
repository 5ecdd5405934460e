"""Quantised checkpoints that are damaged, hostile or of a kind that is not read: one line, never a traceback."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import halfbyte
from halfbyte.converter.checkpoints import Packed, open_checkpoint
from halfbyte.converter.checkpoints.bounded_file import BoundedFile
from halfbyte.converter.checkpoints.quantized import METHODS
from halfbyte.converter.checkpoints.quantized_matrix import unpack_fields
from halfbyte.formats.errors import CheckpointError, HalfbyteError

FIXTURES = Path(__file__).resolve().parent / "fixtures"
FOLDERS = sorted(p.parent.name for p in FIXTURES.glob("*/expected.json"))
Q = "model.layers.0.self_attn.q_proj"
Header = dict[str, Any]


def changed(
    folder: Path,
    name: str,
    config: Callable[[Any], object] = lambda c: None,
    header: Callable[[Header, bytearray], object] = lambda h, d: None,
) -> Path:
    """A copy of a fixture with its configuration, or its tensor table and data, changed in place."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    settings = json.loads((FIXTURES / name / "config.json").read_text())
    config(settings)
    (folder / "config.json").write_text(json.dumps(settings))
    raw = (FIXTURES / name / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    table, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    header(table, data)
    text = json.dumps(table).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return folder


def set_key(key: str, value: object) -> Callable[[Any], object]:
    return lambda c: c["quantization_config"].__setitem__(key, value)


def put(tensor: str, dtype: str, values: list[int]) -> Callable[[Header, bytearray], object]:
    """Overwrite the first elements of a tensor."""

    def change(table: Header, data: bytearray) -> None:
        begin = table[tensor]["data_offsets"][0]
        raw = np.array(values, dtype).tobytes()
        data[begin : begin + len(raw)] = raw

    return change


def reshape(tensor: str, *shape: int) -> Callable[[Header, bytearray], object]:
    return lambda table, data: table[tensor].__setitem__("shape", list(shape))


def rename(tensor: str, to: str) -> Callable[[Header, bytearray], object]:
    return lambda table, data: table.__setitem__(to, table.pop(tensor))


@pytest.mark.parametrize(
    "method", ["bitsandbytes", "hqq", "aqlm", "quark", "torchao", "exl3", "mxfp4", 7, None]
)
def test_other_methods_are_refused_by_name(tmp_path: Path, method: object) -> None:
    folder = changed(tmp_path / "m", "gptq-4-act", set_key("quant_method", method))
    name = "unnamed" if method is None else str(method)
    with pytest.raises(CheckpointError, match=f"quantised by {name}, .*convert the original float") as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_old_bitsandbytes_folders_are_refused_by_name(tmp_path: Path) -> None:
    def change(config: Any) -> None:
        config["quantization_config"] = {"load_in_4bit": True}

    with pytest.raises(CheckpointError, match="quantised by bitsandbytes"):
        open_checkpoint(changed(tmp_path / "m", "gptq-4-act", change))


@pytest.mark.parametrize(
    ("name", "file", "own"),
    [
        ("gptq-3-act-asym", "quantize_config.json", {"bits": 3, "group_size": 32, "desc_act": True}),
        (
            "awq-4",
            "quant_config.json",
            {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"},
        ),
    ],
)
def test_configs_of_older_tools_are_found_in_their_own_file(
    tmp_path: Path, name: str, file: str, own: Any
) -> None:
    folder = changed(tmp_path / "m", name, lambda c: c.pop("quantization_config"))
    with pytest.raises(CheckpointError, match="I32"):
        open_checkpoint(folder)
    (folder / file).write_text(json.dumps(own))
    with open_checkpoint(folder) as old, open_checkpoint(FIXTURES / name) as new:
        a, b = old.read(f"{Q}.weight"), new.read(f"{Q}.weight")
        assert isinstance(a, Packed) and isinstance(b, Packed)
        np.testing.assert_array_equal(a.dequantize(), b.dequantize())


def test_every_method_has_a_fixture() -> None:
    """intel/auto-round is the old name of auto-round; fbgemm_fp8 is read by the code of fp8 and has no packer here."""
    found = {
        json.loads((FIXTURES / n / "config.json").read_text())["quantization_config"]["quant_method"]
        for n in FOLDERS
    }
    assert found == set(METHODS) - {"intel/auto-round", "fbgemm_fp8"}


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("gptq-4-act", "checkpoint_format", "marlin", "'marlin'"),
        ("gptq-4-act", "checkpoint_format", ["gptq"], "checkpoint format"),
        ("gptq-4-act", "is_marlin_format", True, "'marlin'"),
        ("gptq-4-act", "pack_dtype", "int8", "int32"),
        ("awq-4", "version", "gemv", "'gemv'"),
        ("awq-4", "bits", 3, "4 bits"),
        ("awq-4", "backend", "llm-awq", "llm-awq"),
        ("auto-round-4-sym", "data_type", "mx_fp", "'mx_fp'"),
        ("auto-round-4-sym", "rotation_config", {"a": 1}, "rotations"),
        ("auto-round-4-sym", "packing_format", "other", "packing 'other'"),
        ("pack-8-channel", "format", "marlin-24", "'marlin-24'"),
        ("pack-8-channel", "format", "nvfp4-pack-quantized", "'nvfp4-pack-quantized'"),
        ("pack-8-channel", "sparsity_config", {"format": "sparse-24-bitmask"}, "sparse-24"),
        ("pack-8-channel", "transform_config", {"a": 1}, "transforms"),
        ("pack-8-channel", "config_groups", None, "config_groups"),
        ("pack-8-channel", "config_groups", {}, "number of bits"),
        ("fp8-block", "weight_block_size", [0, 128], "weight_block_size"),
        ("fp8-block", "weight_block_size", [128, 128], "scales of shape"),
        ("bitnet", "quantization_mode", "online", "online"),
        ("bitnet", "use_rms_norm", True, "use_rms_norm"),
    ],
)
def test_variants_are_refused_by_name(
    tmp_path: Path, name: str, key: str, value: object, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(changed(tmp_path / "m", name, set_key(key, value)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq-4-act", put(f"{Q}.g_idx", "<i4", [-1]), "outside its 2 groups"),
        ("gptq-4-act", put(f"{Q}.g_idx", "<i4", [2]), "outside its 2 groups"),
        ("gptq-4-act", put(f"{Q}.g_idx", "<i4", [1] * 64), "different sizes"),
        ("gptq-4-act", reshape(f"{Q}.g_idx", 8, 8), "g_idx of I32"),
        ("gptq-4-act", reshape(f"{Q}.qweight", 4, 128), "do not fit"),
        ("gptq-4-act", reshape(f"{Q}.qweight", 512), "qweight of I32"),
        ("gptq-4-act", rename(f"{Q}.scales", f"{Q}.scale"), "a part scale, "),
        ("gptq-4-act", rename(f"{Q}.qzeros", "model.norm.qzeros"), "lacks its part qzeros"),
        ("awq-4", reshape(f"{Q}.qzeros", 4, 4), "GEMM packing"),
        ("pack-4-group-asym", put(f"{Q}.weight_shape", "<i8", [64, 1 << 40]), "says that its shape"),
        ("pack-4-group-asym", put(f"{Q}.weight_shape", "<i8", [-64, -64]), "says that its shape"),
        ("pack-4-group-asym", reshape(f"{Q}.weight_scale", 32, 4), "scales of shape"),
        ("pack-4-group-asym", reshape(f"{Q}.weight_zero_point", 4, 4), "zero points of shape"),
        ("pack-4-act-order", put(f"{Q}.weight_g_idx", "<i4", [7]), "outside its 2 groups"),
        ("float8-channel", put(f"{Q}.weight", "u1", [0x7F]), "not finite"),
        ("float8-block", reshape(f"{Q}.weight_scale", 2, 4), "scales of shape"),
        ("bitnet", put(f"{Q}.weight", "u1", [0xFF]), "code 3"),
        ("bitnet", rename(f"{Q}.weight_scale", f"{Q}.scale"), "U8"),
    ],
)
def test_parts_that_make_no_sense_are_refused(
    tmp_path: Path, name: str, change: Callable[[Header, bytearray], object], message: str
) -> None:
    folder = changed(tmp_path / "m", name, header=change)
    with pytest.raises(CheckpointError, match=message) as caught, open_checkpoint(folder) as checkpoint:
        checkpoint.input_order(f"{Q}.weight")
        checkpoint.read(f"{Q}.weight")
    assert "\n" not in str(caught.value)


def test_groups_that_no_file_holds_are_refused_by_name(tmp_path: Path) -> None:
    """96 columns in 4 groups: such codes cannot be kept, but the weights can be rounded anew."""
    scale = "model.layers.0.mlp.down_proj.weight_scale"

    def four_groups(table: Header, data: bytearray) -> None:
        begin, end = table[scale]["data_offsets"]
        data[begin:end] = bytes(data[begin:end]) * 4
        more = 3 * (end - begin)
        for entry in table.values():
            if entry.get("data_offsets", [0])[0] >= end:
                entry["data_offsets"] = [offset + more for offset in entry["data_offsets"]]
        table[scale] |= {"shape": [64, 4], "data_offsets": [begin, end + more]}

    folder = changed(tmp_path / "m", "int8-channel", header=four_groups)
    with pytest.raises(
        CheckpointError, match=r"down_proj\.weight has groups of 24 columns.*choose --recipe q8"
    ):
        halfbyte.convert(folder, tmp_path / "m.hb")
    halfbyte.convert(folder, tmp_path / "m.hb", recipe="q8")


def test_empty_biases_of_autogptq_need_no_use(tmp_path: Path) -> None:
    """It gave every module a bias: one of zeros is not listed, but can be read; any other is a bias."""

    def add_bias(value: int) -> Callable[[Header, bytearray], object]:
        def change(table: Header, data: bytearray) -> None:
            begin = len(data)
            data += np.full(64, value, np.float16).tobytes()
            table[f"{Q}.bias"] = {"dtype": "F16", "shape": [64], "data_offsets": [begin, begin + 128]}

        return change

    folder = changed(tmp_path / "m", "gptq-4-act", header=add_bias(0))
    with open_checkpoint(folder) as checkpoint:
        assert f"{Q}.bias" not in checkpoint.names() and f"{Q}.bias" in checkpoint
        assert not np.any(checkpoint.read(f"{Q}.bias"))
    halfbyte.convert(folder, tmp_path / "m.hb")
    with pytest.raises(CheckpointError, match="bias is not part of"):
        halfbyte.convert(changed(tmp_path / "m", "gptq-4-act", header=add_bias(1)), tmp_path / "m.hb")


def test_zero_points_are_stored_one_less_in_words(tmp_path: Path) -> None:
    """GPTQModel takes 0x11111111 off a whole word, so a zero point of 0 borrows from the next: undone alike."""
    zeros = [0, 5, 15, 0, 0, 7, 8, 3]
    word = sum(z << 4 * i for i, z in enumerate(zeros)) - 0x11111111
    change = put(f"{Q}.qzeros", "<u4", [word % (1 << 32)])
    with open_checkpoint(changed(tmp_path / "m", "gptq-4-act", header=change)) as checkpoint:
        packed = checkpoint.read(f"{Q}.weight")
        assert isinstance(packed, Packed) and packed.zeros is not None and packed.encoding == "z4"
        assert packed.zeros[:8, 0].tolist() == zeros


@pytest.mark.parametrize("bits", range(2, 9))
def test_fields_cross_words(bits: int) -> None:
    """Against arithmetic on whole numbers."""
    rng = np.random.default_rng(bits)
    fields = rng.integers(0, 1 << bits, (3, 64), np.uint8)
    words = np.array(
        [[(sum(int(f) << i * bits for i, f in enumerate(row)) >> 32 * w) & 0xFFFFFFFF for w in range(2 * bits)]
         for row in fields], np.uint32)  # fmt: skip
    np.testing.assert_array_equal(unpack_fields(words, bits, 64), fields)
    np.testing.assert_array_equal(unpack_fields(words, bits, 50), fields[:, :50])
    assert unpack_fields(words[:0], bits, 64).shape == (0, 64)


@pytest.mark.parametrize("name", ["gptq-4-act", "awq-4", "pack-4-group-asym", "float8-block", "bitnet"])
def test_few_rows_cost_few_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_checkpoint(FIXTURES / name) as checkpoint:
        tensor = "model.layers.0.mlp.up_proj.weight"
        checkpoint.read_rows(tensor, 0, 1)  # what is read once: symmetry, group indices
        counted, plain = [], BoundedFile.read
        monkeypatch.setattr(BoundedFile, "read", lambda self, at, n: counted.append(n) or plain(self, at, n))
        checkpoint.read(tensor)
        whole, counted[:] = sum(counted), []
        checkpoint.read_rows(tensor, 0, 8)
        assert sum(counted) < whole / 3


@pytest.mark.parametrize("name", FOLDERS)
def test_damage_anywhere_is_an_error_or_a_model(tmp_path: Path, name: str) -> None:
    """Values of the configuration and of the tensor table replaced, bytes flipped: nothing but HalfbyteError."""
    rng = random.Random(name)
    odd: list[Any] = [None, -1, 0, 3, 1 << 31, 1 << 70, 1.5, "x", [], {}, [1], True, float("nan")]

    def replace_something(tree: Any) -> None:
        while isinstance(tree, (dict, list)) and tree:
            key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
            if not isinstance(tree[key], (dict, list)) or not tree[key] or rng.random() < 0.3:
                tree[key] = rng.choice(odd)
                return
            tree = tree[key]

    def flip(table: Header, data: bytearray) -> None:
        for _ in range(20):
            data[rng.randrange(len(data))] = rng.randrange(256)

    changes: list[dict[str, Any]] = [
        {"config": lambda c: replace_something(c["quantization_config"])},
        {"header": lambda h, d: replace_something(h)},
        {"header": flip},
    ]
    for i in range(18):
        folder = changed(tmp_path / "m", name, **changes[i % len(changes)])
        try:
            with open_checkpoint(folder) as checkpoint:
                for tensor in checkpoint.names():
                    checkpoint.input_order(tensor)
                    checkpoint.read(tensor)
        except HalfbyteError as error:
            assert "\n" not in str(error)
