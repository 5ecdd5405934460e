"""From a built program and an open checkpoint to the bytes of a `.hb` file, a block of rows at a time.

Memory stays bounded by a few blocks, whatever the size of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from halfbyte.converter.builder import Builder, Matrix, Vector
from halfbyte.converter.checkpoints.checkpoint import Packed
from halfbyte.converter.recipe import Storage
from halfbyte.converter.weights import Weights, check_finite
from halfbyte.formats import encodings, tiles
from halfbyte.formats.container import SECTION_ALIGNMENT
from halfbyte.formats.errors import CheckpointError
from halfbyte.formats.metadata import Value
from halfbyte.formats.writer import TensorSpec, Writer

Planes = dict[str, np.ndarray]  # codes [rows, cols], scales [rows, groups], row [rows], ... by plane
Write = Callable[[int, int, Planes], None]  # (index of the tensor, first row, planes of some rows)

BLOCK_WEIGHTS = 1 << 22  # weights held at once: 16 MiB as float32


def assemble(
    b: Builder,
    path: Path,
    meta: dict[str, Value],
    tokenizer: bytes,
    template: str,
    progress: Callable[[str, int], None],
    weights: Weights | None = None,
    quantize: Callable[[Write], set[int]] | None = None,
    prove: Callable[[Path], bytes] | None = None,
) -> None:
    """Write the file. `progress(tensor name, weights done)` is called after every block.

    weights: where float rows come from, by default the builder's checkpoint. quantize(write): quantises some
    matrices by another method than rounding to nearest, hands their planes to `write` and returns their indices.
    prove(path): the section PROF of the file, which is complete under that path but for it.

    Raises CheckpointError for weights that are not finite, HalfbyteError when the disk is full; in
    either case nothing remains under `path`.
    """
    with _writer(b, path, meta, tokenizer, template, ("PROF",) if prove else ()) as writer:
        for i, t in enumerate(b.tensors):
            if isinstance(t, Vector):
                writer.write(i, "values", 0, t.values)

        def write(index: int, row: int, planes: Planes) -> None:
            t = b.tensors[index]
            assert isinstance(t, Matrix)
            for plane, data in _packed(planes, encodings.BY_NAME[t.storage.encoding].bits).items():
                writer.write(index, plane, row // tiles.PANEL, data)

        def write_and_report(index: int, row: int, planes: Planes) -> None:
            write(index, row, planes)
            progress(b.tensors[index].name, next(iter(planes.values())).size)

        weights = weights or Weights(b)
        done = quantize(write) if quantize else set()
        for i, t in enumerate(b.tensors):
            if isinstance(t, Matrix) and i not in done:
                encode(t, weights, partial(write_and_report, i))
        if prove:
            writer.seal()
            writer.annotate("PROF", prove(writer.partial))


def assemble_float(
    b: Builder, path: Path, meta: dict[str, Value], tokenizer: bytes, weights: Weights, encoding: str = "f32"
) -> None:
    """Write the same program with every matrix as floats."""
    tensors, storage = b.tensors, Storage(encoding)
    b.tensors = [replace(t, storage=storage) if isinstance(t, Matrix) else t for t in tensors]
    try:
        assemble(b, path, meta, tokenizer, "", lambda name, count: None, weights)
    finally:
        b.tensors = tensors


def _writer(
    b: Builder,
    path: Path,
    meta: dict[str, Value],
    tokenizer: bytes,
    template: str,
    annotations: tuple[str, ...] = (),
) -> Writer:
    records, slots, caches = b.finish()
    specs = [
        TensorSpec(t.name, "u32" if t.values.dtype == np.uint32 else "f32", t.shape)
        if isinstance(t, Vector)
        else TensorSpec(t.name, t.storage.encoding, t.shape, t.storage.group, t.storage.scale_type)
        for t in b.tensors
    ]
    return Writer(
        path,
        meta=meta,
        slots=slots,
        caches=caches,
        program=records,
        tensors=specs,
        tokenizer=tokenizer,
        template=template,
        annotations=annotations,
    )


def length(b: Builder, meta: dict[str, Value], tokenizer: bytes, template: str, proof: int = 0) -> int:
    """Bytes of the file that `assemble` would write, with a proof of so many bytes."""
    writer = _writer(b, Path("unwritten"), meta, tokenizer, template, ("PROF",) if proof else ())
    return tiles.align(writer.length, SECTION_ALIGNMENT) + proof if proof else writer.length


def encode(
    t: Matrix,
    weights: Weights,
    each: Callable[[int, Planes], None],
    importance: np.ndarray | None = None,
) -> None:
    """Call each(first row, planes) for blocks that cover a matrix: codes as they arrived, or rounded to nearest.

    importance float64[cols] weighs the columns where the encoding searches for scales.
    """
    rows, cols = t.shape
    step = max(tiles.PANEL, BLOCK_WEIGHTS // cols // tiles.PANEL * tiles.PANEL)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if t.storage.packed:
            each(start, _stacked([p for p in weights.stored(t, start, stop) if isinstance(p, Packed)], t))
        else:
            each(start, _rounded(weights.rows(t, start, stop), t, importance))


def _packed(planes: Planes, bits: int) -> Planes:
    """Planes of rows in the arrangement of a file."""
    out: Planes = {}
    for name, a in planes.items():
        if name == "codes":
            out |= tiles.pack_code_planes(a, bits)
        else:
            a = a.reshape(len(a), -1)
            out[name] = tiles.pack_groups(a.view(np.uint16) if a.dtype.name == "bfloat16" else a)
    return out


def _stacked(parts: list[Packed], t: Matrix) -> Planes:
    """Planes of codes that arrived quantised, kept as they are."""
    e = encodings.BY_NAME[t.storage.encoding]
    planes = [p.planes() for p in parts]
    out = {name: np.concatenate([p[name] for p in planes]) for name in planes[0]}
    for name, a in out.items():
        if name != "codes":
            check_finite(a, t)
        elif not e.is_integer:  # 8-bit floats have codes for NaN and infinity
            check_finite(np.asarray(e.levels, np.float32)[a], t)
    return out


def _rounded(w: np.ndarray, t: Matrix, importance: np.ndarray | None = None) -> Planes:
    """Planes of float rows, every weight at its nearest."""
    e = encodings.BY_NAME[t.storage.encoding]
    if e.is_float:
        stored = encodings.float_to_bits(w, e.name)
        if e.name == "f16" and not np.isfinite(stored).all():
            raise CheckpointError(
                f"tensor {t.name}: a weight of {np.abs(w).max():g} does not fit f16; use bf16 or f32"
            )
        return {"values": stored}
    from halfbyte.converter.quantizers import rtn

    if e.name == "q8":
        return dict(zip(("codes", "scales"), rtn.quantize_q8(w)))
    return dict(zip(("codes", "scales", "row"), rtn.quantize_table(w, e.name, importance)))
