"""From a built program and an open checkpoint to the bytes of a `.hb` file, a block of rows at a time.

Memory stays bounded by a few blocks, whatever the size of the checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np

from halfbyte.converter.builder import Builder, Matrix, Vector
from halfbyte.converter.checkpoints.checkpoint import Packed
from halfbyte.converter.recipe import Storage
from halfbyte.converter.unfinished import Note, Unfinished, identity
from halfbyte.converter.weights import Weights, check_finite
from halfbyte.formats import encodings, tiles
from halfbyte.formats.container import SECTION_ALIGNMENT, SECTIONS
from halfbyte.formats.errors import CheckpointError
from halfbyte.formats.metadata import Value
from halfbyte.formats.writer import TensorSpec, Writer

Planes = dict[str, np.ndarray]  # codes [rows, cols], scales [rows, groups], row [rows], ... by plane

BLOCK_WEIGHTS = 1 << 22  # weights held at once: 16 MiB as float32


class Sink:
    """What takes the planes of matrices: sink(index of the tensor, first row, planes), in blocks that cover a matrix.

    `whole` are the tensors that an earlier run finished: what is written to them again is dropped.
    """

    def __init__(self, b: Builder, writer: Writer, unfinished: Unfinished | None):
        self.b, self.writer, self.unfinished = b, writer, unfinished
        self.whole: set[int] = set()
        self._rows: dict[int, int] = {}
        if unfinished is not None:
            for i, digest in unfinished.tensors().items():
                if i < len(b.tensors) and writer.digest(i).hex() == digest:
                    self.whole.add(i)

    def __call__(self, index: int, row: int, planes: Planes) -> None:
        if index in self.whole:
            return
        t = self.b.tensors[index]
        assert isinstance(t, Matrix)
        for plane, data in _packed(planes, encodings.BY_NAME[t.storage.encoding].bits).items():
            self.writer.write(index, plane, row // tiles.PANEL, data)
        self._rows[index] = self._rows.get(index, 0) + len(next(iter(planes.values())))
        if self.unfinished is not None and self._rows[index] == t.shape[0]:
            self.unfinished.add(index, t.name, self.writer.digest(index))

    def stored(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """float32[stop - start, cols]: rows of a matrix that is whole; `start` is a multiple of 16."""
        return self.writer.rows(index, start, self.b.tensors[index].shape[0] if stop is None else stop)


def assemble(
    b: Builder,
    path: Path,
    meta: dict[str, Value],
    tokenizer: bytes,
    template: str,
    progress: Callable[[str, int], None],
    weights: Weights | None = None,
    quantize: Callable[[Sink], set[int]] | None = None,
    *,
    unfinished: Unfinished | None = None,
    note: Note | None = None,
    block: int = BLOCK_WEIGHTS,
    prove: Callable[[Path], bytes] | None = None,
    extras: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write the file. `progress(tensor name, weights done)` is called after every block.

    weights: where float rows come from, by default the builder's checkpoint. quantize(sink): quantises some
    matrices by another method than rounding to nearest, hands their planes to the sink and returns their indices.
    unfinished: where the file lies until it is complete, with the tensors that are whole already; `note` is told how
    many. block: weights to round at once. prove(path): the section PROF of the file, which is complete under that path
    but for it. extras: further sections behind DATA.

    Raises CheckpointError for weights that are not finite, HalfbyteError when the disk is full; in
    either case nothing remains under `path`.
    """
    aside = unfinished.file if unfinished else None
    annotations = (*extras, "PROF") if prove else tuple(extras)
    with _writer(b, path, meta, tokenizer, template, aside, annotations) as writer:
        for kind, data in extras.items():
            writer.annotate(kind, data)
        for i, t in enumerate(b.tensors):
            if isinstance(t, Vector):
                writer.write(i, "values", 0, t.values)
        if unfinished is not None:
            unfinished.lay_out(_layout(b, writer, meta, tokenizer, template))
        sink = Sink(b, writer, unfinished)
        if sink.whole and note:
            matrices = sum(isinstance(t, Matrix) for t in b.tensors)
            note(f"continuing: {len(sink.whole)} of {matrices} matrices are done")

        def write_and_report(index: int, row: int, planes: Planes) -> None:
            sink(index, row, planes)
            progress(b.tensors[index].name, next(iter(planes.values())).size)

        weights = weights or Weights(b)
        done = quantize(sink) if quantize else set()
        for i, t in enumerate(b.tensors):
            if not isinstance(t, Matrix) or i in done:
                continue
            if i in sink.whole:
                progress(t.name, t.shape[0] * t.shape[1])
            else:
                encode(t, weights, partial(write_and_report, i), block=block)
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
    aside: Path | None = None,
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
        partial=aside,
        annotations=annotations,
    )


def _layout(b: Builder, writer: Writer, meta: dict[str, Value], tokenizer: bytes, template: str) -> str:
    """Identity of everything in a file but its weights."""
    parts = [hashlib.sha256(a.tobytes()).hexdigest() for a in b.finish()]
    tensors = [(t.name, t.encoding, t.shape, t.group, t.scale_type) for t in writer.tensors]
    return identity(parts, tensors, writer.placed, meta, hashlib.sha256(tokenizer).hexdigest(), template)


def length(
    b: Builder,
    meta: dict[str, Value],
    tokenizer: bytes,
    template: str,
    proof: int = 0,
    extras: Mapping[str, bytes] = MappingProxyType({}),
) -> int:
    """Bytes of the file that `assemble` would write, with a proof of so many bytes."""
    sections = {kind: len(data) for kind, data in extras.items()} | ({"PROF": proof} if proof else {})
    end = _writer(b, Path("unwritten"), meta, tokenizer, template, None, tuple(sections)).length
    for kind in SECTIONS:
        if kind in sections:
            end = tiles.align(end, SECTION_ALIGNMENT) + sections[kind]
    return end


def encode(
    t: Matrix,
    weights: Weights,
    each: Callable[[int, Planes], None],
    importance: np.ndarray | None = None,
    block: int = BLOCK_WEIGHTS,
) -> None:
    """Call each(first row, planes) for blocks that cover a matrix: codes as they arrived, or rounded to nearest.

    block: weights of one, about. importance float64[cols] weighs the columns where the encoding searches for scales.
    """
    rows, cols = t.shape
    whole = max(tiles.PANEL, t.storage.span)  # rows that are never apart
    step = max(whole, block // cols // whole * whole)
    top = (
        _amax(t, weights, step)
        if encodings.BY_NAME[t.storage.encoding].kind == "float8" and not t.storage.packed
        else None
    )
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if t.storage.packed:
            each(start, _stacked([p for p in weights.stored(t, start, stop) if isinstance(p, Packed)], t))
        else:
            w = weights.rows(t, start, stop)
            each(start, _rounded(w, t, importance) if top is None else _rounded_float8(w, t, top[start:stop]))


def _amax(t: Matrix, weights: Weights, step: int) -> np.ndarray:
    """What decides every scale of a matrix of 8-bit floats, float32[rows, groups]: a pass over its weights."""
    from halfbyte.converter.quantizers import float8

    s, rows = t.storage, t.shape[0]
    parts = [
        float8.amax(weights.rows(t, a, min(a + step, rows)), s.group, s.span) for a in range(0, rows, step)
    ]
    top = np.concatenate(parts)
    return top if s.span else np.broadcast_to(top.max(axis=0), top.shape)


def _rounded_float8(w: np.ndarray, t: Matrix, top: np.ndarray) -> Planes:
    from halfbyte.converter.quantizers import float8

    return dict(zip(("codes", "scales"), float8.quantize(w, t.storage.encoding, t.storage.group, top)))


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
