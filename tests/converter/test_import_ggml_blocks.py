"""ggml's block types: rows quantised by llama.cpp's library become what the same library reads in them."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from halfbyte.converter.checkpoints import Packed, ggml_types
from halfbyte.formats import tiles
from halfbyte.formats.encodings import BY_NAME, decode, parameters_are_valid, weights
from halfbyte.formats.errors import CheckpointError

BLOCKS = np.load(Path(__file__).resolve().parent / "fixtures" / "ggml-blocks.npz")
QUANTIZED = [name for name, kind in ggml_types.TYPES.items() if kind.unpack is not None]


def test_every_type_is_recorded() -> None:
    assert {key.partition(".")[0] for key in BLOCKS.files} == set(QUANTIZED)


@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_are_the_librarys_own(name: str) -> None:
    packed = ggml_types.decode(BLOCKS[f"{name}.data"], name)
    assert isinstance(packed, Packed) and packed.encoding == ggml_types.TYPES[name].dtype
    found = hashlib.sha256(packed.dequantize().tobytes()).digest()
    assert found == BLOCKS[f"{name}.weights"].tobytes()


@pytest.mark.parametrize("name", QUANTIZED)
def test_files_hold_them_exactly(name: str) -> None:
    """Through the planes of a file and back: the same codes, scales and weights."""
    packed = ggml_types.decode(BLOCKS[f"{name}.data"], name)
    assert isinstance(packed, Packed)
    encoding = BY_NAME[packed.encoding]
    assert parameters_are_valid(encoding, packed.group, packed.scale_type)
    (rows, cols), stored = packed.shape, packed.planes()
    planes = {p.name for p in tiles.planes(packed.encoding, rows, cols, packed.group, packed.scale_type)}
    assert planes - {"high"} == set(stored)
    packed_codes = tiles.pack_code_planes(stored["codes"], encoding.bits)
    back = {"codes": tiles.unpack_code_planes(packed_codes, encoding.bits, rows, cols, encoding.signed)}
    for plane, values in stored.items():
        if plane != "codes":
            bits = values.view(np.uint16) if values.dtype.name == "bfloat16" else values
            back[plane] = tiles.unpack_groups(tiles.pack_groups(bits), rows, bits.shape[1])
    level, s, m = decode(packed.encoding, back, packed.group, packed.scale_type)
    np.testing.assert_array_equal(weights(level, s, m, packed.group), packed.dequantize())


@pytest.mark.parametrize("name", QUANTIZED)
def test_any_bytes_give_codes_in_range_or_an_error(name: str) -> None:
    kind, rng = ggml_types.TYPES[name], np.random.default_rng(sum(map(ord, name)))
    data = rng.integers(0, 256, (16, 512 // kind.elements * kind.nbytes), np.uint8)
    try:
        packed = ggml_types.decode(data, name)
    except CheckpointError:
        assert name == "TQ2_0"  # the one type with codes that mean nothing
        return
    assert isinstance(packed, Packed) and packed.shape == (16, 512)
    encoding = BY_NAME[packed.encoding]
    assert int(packed.codes.view(np.uint8).max()) < 1 << encoding.bits


def test_gguf_py_agrees_on_random_blocks() -> None:
    """The reference in Python, where it is installed (it is no dependency)."""
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    rng = np.random.default_rng(int(os.environ.get("HALFBYTE_SEED", "0")))
    for name in QUANTIZED:
        data = BLOCKS[f"{name}.data"].copy()
        noisy = rng.permutation(data.reshape(-1, ggml_types.TYPES[name].nbytes)).reshape(data.shape)
        packed = ggml_types.decode(noisy, name)
        assert isinstance(packed, Packed)
        np.testing.assert_array_equal(
            packed.dequantize(), quants.dequantize(noisy, GGMLQuantizationType[name])
        )
