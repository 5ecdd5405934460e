"""The proof of a file made readable: what the terminal, JSON and the HTML page show."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from halfbyte.formats import program, proof
from halfbyte.formats.container import File
from halfbyte.formats.errors import UsageError

OTHER = ""  # the group of matrices that belong to no layer


@dataclass(frozen=True)
class Row:
    """One matrix of a proof. layer is None for those outside the layers; kind is its name without the layer."""

    name: str
    kind: str
    layer: int | None
    weights: int
    encoding: str
    bits: float
    error: float


@dataclass(frozen=True)
class Group:
    """The matrices of a layer, or one matrix outside the layers; bits and error are means over the weights."""

    label: str
    rows: tuple[Row, ...]

    def _mean(self, values: Iterable[float]) -> float:
        return sum(v * r.weights for v, r in zip(values, self.rows)) / sum(r.weights for r in self.rows)

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return self._mean(r.bits for r in self.rows)

    @property
    def error(self) -> float:
        """Relative squared error, each matrix relative to itself."""
        return self._mean(r.error for r in self.rows)

    @property
    def worst(self) -> Row:
        """The matrix of the largest error."""
        return max(self.rows, key=lambda r: r.error)


def open_proof(path: str) -> tuple[File, proof.Proof]:
    """A file and its proof. Raises UsageError when it has none, FormatError when either is damaged."""
    file = File(path)
    found = proof.read(file)
    if found is None:
        raise UsageError(f"{path} has no proof in it; convert it again, with --proof")
    return file, found


def rows(file: File, found: proof.Proof) -> list[Row]:
    """The matrices of the proof that the file has, in the order of the proof."""
    layers: dict[int, int] = {}
    for r in file.program:
        for w in r["w"]:
            layers.setdefault(int(w), int(r["layer"]))
    out = []
    for m in found.matrices:
        i = file.tensor_index.get(m.name)
        if i is None or len(file.tensors[i].shape) != 2:
            continue
        layer = layers.get(i, program.NO_LAYER)
        out.append(
            Row(
                m.name,
                re.sub(r"^layers\.\d+\.(?:.*\.)?", "", m.name),
                None if layer == program.NO_LAYER else layer,
                file.tensors[i].shape[0] * file.tensors[i].shape[1],
                m.encoding,
                m.bits,
                m.error,
            )
        )
    return out


def groups(matrices: Iterable[Row]) -> list[Group]:
    """In order: matrices before the layers (the embedding), the layers, and those after them."""
    before: list[Group] = []
    after: list[Group] = []
    layers: dict[int, list[Row]] = {}
    for r in matrices:
        if r.layer is not None:
            layers.setdefault(r.layer, []).append(r)
        else:
            (after if layers else before).append(Group(r.name, (r,)))
    return [*before, *(Group(str(i), tuple(layers[i])) for i in sorted(layers)), *after]


def options(found: proof.Proof) -> list[tuple[str, str]]:
    """Recipe and options in words, name first."""
    out = []
    for key, value in found.recipe.items():
        name = "recipe" if key == "name" else key.replace("_", " ")
        if isinstance(value, dict):
            value = f"{value.get('name', '')} (SHA-256 {value.get('sha256', '')})"
        out.append((name, "yes" if value is True else str(value)))
    return sorted(
        out, key=lambda item: ("recipe", "method").index(item[0]) if item[0] in ("recipe", "method") else 2
    )


def sources(found: proof.Proof) -> list[dict[str, object]]:
    """The files that the weights came from: name, bytes, sha256."""
    files = found.source.get("files", [])
    return [f for f in files if isinstance(f, dict)] if isinstance(files, list) else []
