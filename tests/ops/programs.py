"""Builds tiny `.hb` files by hand: random matrices of every encoding, slots, views and records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfbyte.formats import encodings, program, tiles
from halfbyte.formats.container import File
from halfbyte.formats.metadata import Value
from halfbyte.formats.writer import TensorSpec, Writer

F32 = np.float32
MIN_IDS = 48  # token ids that every embedding table of a tiny file has at least


@dataclass
class Logical:
    """A tensor before packing: plane name -> logical array ([rows, cols], [rows, groups] or [rows])."""

    spec: TensorSpec
    planes: dict[str, np.ndarray]

    def packed(self) -> dict[str, np.ndarray]:
        """Plane name -> flat array as it is stored."""
        e = encodings.BY_NAME[self.spec.encoding]
        if len(self.spec.shape) == 1:
            return self.planes
        out = {}
        for name, a in self.planes.items():
            if name == "codes":
                out.update(tiles.pack_code_planes(a, e.bits))
            else:
                out[name] = tiles.pack_groups(a.reshape(len(a), -1))
        return out


def float_tensor(name: str, values: np.ndarray, encoding: str = "f32") -> Logical:
    """float32 values of rank 1 or 2 stored as a float encoding."""
    return Logical(
        TensorSpec(name, encoding, values.shape), {"values": encodings.float_to_bits(values, encoding)}
    )


def code_matrix(
    name: str,
    encoding: str,
    rows: int,
    cols: int,
    rng: np.random.Generator,
    group: int = 0,
    scale_type: str = "f16",
    exact: bool = False,
) -> Logical:
    """Random codes over their whole range and random scales; `exact` makes every scale a power of two."""
    e = encodings.BY_NAME[encoding]
    group = e.group if e.group is not None else group
    scale_type = {"f16": "f16", "sub7": "", "*": scale_type}[e.scale]
    groups = encodings.group_count(cols, group)
    low, high = (-(1 << (e.bits - 1)), 1 << (e.bits - 1)) if e.signed else (0, 1 << e.bits)
    codes = rng.integers(low, high, (rows, cols)).astype(np.int8 if e.signed else np.uint8)
    if e.is_integer:
        codes.flat[0], codes.flat[-1] = low, high - 1  # the extremes always occur
    else:
        codes = finite_float8(e, rng, rows, cols)
    spec = TensorSpec(name, encoding, (rows, cols), group, scale_type)
    planes: dict[str, np.ndarray] = {"codes": codes}
    if e.row_scale:
        k = rng.choice([126, 127, 128, 129] if exact else np.arange(256), (rows, groups)).astype(np.uint8)
        exponent = rng.integers(40, 46, rows)
        row = (exponent << 2 | (0 if exact else rng.integers(0, 4, rows))).astype(np.uint8)
        row[rows // 2] = 0 if rows > 2 else row[rows // 2]
        return Logical(spec, {**planes, "scales": k, "row": row})

    def numbers(low_exponent: int, high_exponent: int, signs: list[int], count: int) -> np.ndarray:
        power = 2.0 ** rng.integers(low_exponent, high_exponent, (rows, count))
        fraction = 1.0 if exact else rng.uniform(1, 2, (rows, count))
        return (power * fraction * rng.choice(signs, (rows, count))).astype(F32)

    if scale_type == encodings.K256:
        return Logical(spec, {**planes, **two_level(e, rng, rows, cols, groups, exact, numbers)})

    def stored(low_exponent: int, high_exponent: int, signs: list[int]) -> np.ndarray:
        return encodings.float_to_bits(numbers(low_exponent, high_exponent, signs, groups), scale_type)

    planes["scales"] = stored(-9, -7, [1, 1, 1, -1])
    if e.offset == "min":
        planes["mins"] = stored(-5, -3, [1, -1])
    if e.offset == "zero":
        top = 256 if e.bits == 8 else (1 << e.bits) + 1
        planes["zeros"] = rng.integers(0, top, (rows, groups)).astype(np.uint8)
    return Logical(spec, planes)


def finite_float8(e: encodings.Encoding, rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Codes of 8-bit floats below 2^6, lest one of them be all that a sum shows; zeros and subnormals too."""
    values = np.array(e.levels, F32)
    return rng.choice(np.flatnonzero(np.abs(values) < 64), (rows, cols)).astype(np.uint8)


def two_level(
    e: encodings.Encoding,
    rng: np.random.Generator,
    rows: int,
    cols: int,
    groups: int,
    exact: bool,
    numbers: Callable[[int, int, list[int], int], np.ndarray],
) -> dict[str, np.ndarray]:
    """The planes of k256 scales; `exact` makes every product a power of two."""
    supers = encodings.group_count(cols, encodings.SUPER)
    signed = e.offset != "min"
    dtype = np.int8 if signed else np.uint8

    def bytes_() -> np.ndarray:
        if exact:
            return rng.choice([1, -2 if signed else 2], (rows, groups)).astype(dtype)
        return rng.integers(-128 if signed else 0, 128 if signed else 256, (rows, groups)).astype(dtype)

    low, high = (-9, -8) if exact else (-14, -12)
    planes = {"scales": bytes_(), "super": numbers(low, high, [1, 1, -1], supers).astype(np.float16)}
    if not signed:
        planes["mins"] = bytes_()
        planes["supermin"] = numbers(low + 4, high + 4, [1, -1], supers).astype(np.float16)
    return planes


def exact_activations(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """float32[rows, cols] that int8 rounding per 32 columns keeps: integers to +-127 times a power of two."""
    x = rng.integers(-127, 128, (rows, cols)).astype(F32)
    for a in range(0, cols, 32):
        width = min(32, cols - a)
        x[np.arange(rows), a + rng.integers(0, width, rows)] = 127 * rng.choice([-1, 1], rows)
        x[:, a : a + width] *= F32(2.0) ** rng.integers(-3, 1, rows).astype(F32)[:, None]
    return x


class Tiny:
    """A program under construction. `variant` decides where operands of the op under test live:

    plain    each in its own slot                 view   in odd-offset columns of wider slots
    inplace  the output is the first input        picked on picked rows instead of token rows
    """

    def __init__(self, seed: int, variant: str = "plain"):
        self.rng = np.random.default_rng(seed)
        self.variant = variant
        self.slots: list[tuple[int, int, int, int]] = []
        self.caches: list[tuple[int, int, int, int]] = []
        self.records: list[np.ndarray] = []
        self.tensors: list[Logical] = []
        self.tested = -1  # index of the record under test

    def slot(self, width: int, rows: int = program.TOKENS) -> int:
        """A fresh base slot."""
        self.slots.append((width, len(self.slots), 0, rows))
        return len(self.slots) - 1

    def view(self, base: int, offset: int, width: int) -> int:
        """Columns of a base slot."""
        self.slots.append((width, base, offset, self.slots[base][3]))
        return len(self.slots) - 1

    def tensor(self, t: Logical) -> int:
        """Add a tensor; its index."""
        self.tensors.append(t)
        return len(self.tensors) - 1

    def vector(self, values: np.ndarray) -> int:
        """An f32 vector."""
        return self.tensor(float_tensor(f"vector{len(self.tensors)}", values.astype(F32)))

    def index(self, values: np.ndarray) -> int:
        """A u32 vector of column numbers."""
        spec = TensorSpec(f"index{len(self.tensors)}", "u32", values.shape)
        return self.tensor(Logical(spec, {"values": values.astype("<u4")}))

    def emit(
        self, op: str, out: list[int], ins: list[int], weights: tuple[int | None, ...] = (), **attrs
    ) -> None:
        """Append a record."""
        self.records.append(program.record(op, program.NO_LAYER, out, ins, weights, **attrs))

    def values(self, ids: int, width: int) -> np.ndarray:
        """Activations of mixed size: normal, each row times a power of two, some exact zeros."""
        x = self.rng.normal(size=(ids, width)) * 2.0 ** self.rng.integers(-3, 3, (ids, 1))
        x[self.rng.random((ids, width)) < 0.02] = 0
        return x.astype(F32)

    def input(self, width: int, values: np.ndarray | None = None, ids: int = 256) -> int:
        """A slot holding row ids[t] of a table of known values."""
        if values is None:
            values = self.values(max(MIN_IDS, ids), width)
        if self.variant == "view":
            pad = self.values(len(values), 13)
            values = np.concatenate([pad[:, :5], values, pad[:, 5:]], axis=1)
        table = self.tensor(float_tensor(f"table{len(self.tensors)}", values))
        x = self.slot(values.shape[1])
        self.emit("embed", [x], [], (table,))
        if self.variant == "view":
            return self.view(x, 5, width)
        if self.variant == "picked":
            picked = self.slot(width, program.PICKS)
            self.emit("pick", [picked], [x])
            return picked
        return x

    def output(self, width: int, like: int | None = None, rows: int | None = None) -> int:
        """Where the op under test writes."""
        if self.variant == "inplace" and like is not None:
            return like
        if rows is None:
            rows = program.PICKS if self.variant == "picked" else program.TOKENS
        if self.variant == "view":
            return self.view(self.slot(width + 9, rows), 3, width)
        return self.slot(width, rows)

    def test(
        self, op: str, out: list[int], ins: list[int], weights: tuple[int | None, ...] = (), **attrs
    ) -> None:
        """Append the record under test and, where needed, a PICK that makes its output the logits."""
        self.tested = len(self.records)
        self.emit(op, out, ins, weights, **attrs)
        if out and self.slots[out[0]][3] == program.TOKENS:
            self.finish(out[0])

    def finish(self, y: int) -> None:
        """PICK of y into the slot of the logits."""
        logits = self.slot(self.slots[y][0], program.PICKS)
        self.emit("pick", [logits], [y])

    def write(
        self, path: Path, meta: dict[str, Value] | None = None, tokenizer: bytes = b"", template: str = ""
    ) -> File:
        """Write the file and open it."""
        vocab = self.slots[int(self.records[-1]["out"][0])][0]
        metadata: dict[str, Value] = {"model.vocab_size": vocab, "model.context_length": 4096, **(meta or {})}
        with Writer(
            path,
            meta=metadata,
            slots=np.array(self.slots, program.SLOT_DTYPE),
            caches=np.array(self.caches, program.CACHE_DTYPE),
            program=np.array(self.records, program.OP_DTYPE),
            tensors=[t.spec for t in self.tensors],
            tokenizer=tokenizer,
            template=template,
        ) as w:
            for i, t in enumerate(self.tensors):
                for plane, data in t.packed().items():
                    w.write(i, plane, 0, data)
        return File(path)
