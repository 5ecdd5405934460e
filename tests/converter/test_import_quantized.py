"""Quantised checkpoints written by other tools: codes and weights exactly theirs, and the same text from them.

`make_import_fixtures.py` says how the fixtures are made and what their digests are.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import halfbyte
from halfbyte.converter import models
from halfbyte.converter.builder import Builder, Matrix
from halfbyte.converter.checkpoints import Packed, open_checkpoint
from halfbyte.converter.recipe import recipe
from halfbyte.formats import encodings, ops
from halfbyte.formats.container import File

FIXTURES = Path(__file__).resolve().parent / "fixtures"
FOLDERS = sorted(p.parent.name for p in FIXTURES.glob("*/expected.json"))
# 8-bit floats have no integer levels: their values times 2^9, the inverse of the smallest one.
FLOAT8_UNIT = 512


def expected(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name / "expected.json").read_text())


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def levels_of(packed: Packed) -> np.ndarray:
    """Code less zero point, int16."""
    level, _, _ = encodings.decode(packed.encoding, packed.planes(), packed.group, "f32")
    return (level * FLOAT8_UNIT if level.dtype == np.float32 else level).astype(np.int16)


def in_input_order(values: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    if order is None:
        return values
    natural = np.empty_like(values)
    natural[:, order] = values
    return natural


@pytest.mark.parametrize("name", FOLDERS)
def test_codes_and_weights_are_the_tools_own(name: str) -> None:
    with open_checkpoint(FIXTURES / name) as checkpoint:
        tensors = expected(name)["tensors"]
        packed_names = {n for n in checkpoint.names() if isinstance(checkpoint.read(n), Packed)}
        assert packed_names == set(tensors)
        for tensor, wanted in tensors.items():
            packed, order = checkpoint.read(tensor), checkpoint.input_order(tensor)
            assert isinstance(packed, Packed)
            assert packed.encoding == checkpoint.dtype(tensor) and packed.shape == checkpoint.shape(tensor)
            assert digest(in_input_order(levels_of(packed), order)) == wanted["levels"], tensor
            assert digest(in_input_order(packed.dequantize(), order)) == wanted["weights"], tensor


@pytest.mark.parametrize("name", FOLDERS)
def test_rows_are_those_of_the_whole(name: str) -> None:
    with open_checkpoint(FIXTURES / name) as checkpoint:
        for tensor in expected(name)["tensors"]:
            whole = checkpoint.read(tensor)
            assert isinstance(whole, Packed)
            rows = len(whole.codes)
            for start, stop in ((0, 0), (0, 1), (5, 9), (rows // 4 - 1, rows // 2 + 3), (rows - 1, rows)):
                part = checkpoint.read_rows(tensor, start, stop)
                assert isinstance(part, Packed)
                for plane, values in whole.take(slice(start, stop)).planes().items():
                    np.testing.assert_array_equal(part.planes()[plane], values)


@pytest.mark.parametrize("name", FOLDERS)
def test_files_hold_the_same_codes_and_weights(name: str, tmp_path: Path) -> None:
    file = File(halfbyte.convert(FIXTURES / name, tmp_path / "m.hb"))
    with open_checkpoint(FIXTURES / name) as checkpoint:
        builder = Builder(checkpoint, recipe("keep"))
        models.build(builder)
        seen = set()
        for matrix in builder.tensors:
            if not isinstance(matrix, Matrix) or not matrix.storage.packed:
                continue
            stored = file.tensors[file.tensor_index[matrix.name]]
            sources = [checkpoint.read(source) for source in matrix.sources]
            packed = [p for p in sources if isinstance(p, Packed)]
            assert {p.encoding for p in packed} == {stored.encoding}
            np.testing.assert_array_equal(
                file.codes(stored)["codes"], np.concatenate([p.codes for p in packed])
            )
            weights = np.concatenate([p.dequantize() for p in packed])
            assert digest(file.dequantize(stored)) == digest(weights), matrix.name
            seen.update(matrix.sources)
        assert seen == set(expected(name)["tensors"])


def test_one_gather_serves_all_matrices_of_one_order(tmp_path: Path) -> None:
    """q, k and v share their input's order, gate and up theirs: four gathers a layer, before the linears."""
    file = File(halfbyte.convert(FIXTURES / "gptq-4-act", tmp_path / "m.hb"))
    names = [ops.BY_CODE[int(code)].name for code in file.program["code"]]
    assert names.count("gather") == 4 and names.count("linear") == 4 + 1  # the output head
    assert all(names[i + 1] == "linear" for i, name in enumerate(names) if name == "gather")
    orders = [file.vector(t) for t in file.tensors if t.encoding == "u32"]
    assert [sorted(o.tolist()) == list(range(len(o))) for o in orders] == [True] * 4


@pytest.mark.parametrize("name", FOLDERS)
def test_greedy_tokens_are_those_of_the_tools_weights(name: str, tmp_path: Path) -> None:
    path = halfbyte.convert(FIXTURES / name, tmp_path / "m.hb")
    session = halfbyte.load(path, backend="reference", policy="f32", verify=True).session()
    wanted = expected(name)
    ids, tokens = wanted["prompt"], []
    for _ in wanted["tokens"]:
        logits = session.feed(ids)
        tokens.append(int(np.argmax(logits)))
        ids = tokens[-1:]
    assert tokens == wanted["tokens"]
