"""From a built program and an open checkpoint to the bytes of a `.hb` file, a block of rows at a time.

Memory stays bounded by a few blocks, whatever the size of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from halfbyte.converter.builder import Builder, Matrix, Vector
from halfbyte.converter.checkpoints.checkpoint import Checkpoint, Packed
from halfbyte.formats import encodings, tiles
from halfbyte.formats.errors import CheckpointError
from halfbyte.formats.metadata import Value
from halfbyte.formats.writer import TensorSpec, Writer

BLOCK_WEIGHTS = 1 << 22  # weights held at once: 16 MiB as float32


def assemble(
    b: Builder,
    path: Path,
    meta: dict[str, Value],
    tokenizer: bytes,
    template: str,
    progress: Callable[[str, int], None],
) -> None:
    """Write the file. `progress(tensor name, weights done)` is called after every block.

    Raises CheckpointError for weights that are not finite, HalfbyteError when the disk is full; in
    either case nothing remains under `path`.
    """
    records, slots, caches = b.finish()
    specs = [
        TensorSpec(t.name, "u32" if t.values.dtype == np.uint32 else "f32", t.shape)
        if isinstance(t, Vector)
        else TensorSpec(t.name, t.storage.encoding, t.shape, t.storage.group, t.storage.scale_type)
        for t in b.tensors
    ]
    with Writer(
        path,
        meta=meta,
        slots=slots,
        caches=caches,
        program=records,
        tensors=specs,
        tokenizer=tokenizer,
        template=template,
    ) as writer:
        for i, t in enumerate(b.tensors):
            if isinstance(t, Vector):
                writer.write(i, "values", 0, t.values)
            else:
                _write_matrix(writer, i, t, b.checkpoint, progress)


def _write_matrix(
    writer: Writer, index: int, t: Matrix, checkpoint: Checkpoint, progress: Callable[[str, int], None]
) -> None:
    rows, cols = t.shape
    step = max(tiles.PANEL, BLOCK_WEIGHTS // cols // tiles.PANEL * tiles.PANEL)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        block = _rows(checkpoint, t, start, stop)
        for plane, data in _encode(block, t).items():
            writer.write(index, plane, start // tiles.PANEL, data)
        progress(t.name, (stop - start) * cols)


def _rows(checkpoint: Checkpoint, t: Matrix, start: int, stop: int) -> list[np.ndarray | Packed]:
    """Rows start..stop of the stacked sources."""
    parts: list[np.ndarray | Packed] = []
    base = 0
    for name in t.sources:
        n = checkpoint.shape(name)[0]
        a, z = max(start - base, 0), min(stop - base, n)
        if a < z:
            parts.append(checkpoint.read_rows(name, a, z))
        base += n
    return parts


def _encode(parts: list[np.ndarray | Packed], t: Matrix) -> dict[str, np.ndarray]:
    """Packed planes of a block of rows."""
    e = encodings.BY_NAME[t.storage.encoding]
    if t.storage.packed:
        packed = [p.planes() for p in parts if isinstance(p, Packed)]
        out: dict[str, np.ndarray] = {}
        for plane in packed[0]:
            stacked = np.concatenate([p[plane] for p in packed])
            if plane == "codes":
                if not e.is_integer:  # 8-bit floats have codes for NaN and infinity
                    _check_finite(np.asarray(e.levels, np.float32)[stacked], t)
                out |= tiles.pack_code_planes(stacked, e.bits)
            else:
                _check_finite(stacked, t)
                is_bfloat = stacked.dtype.name == "bfloat16"
                out[plane] = tiles.pack_groups(stacked.view(np.uint16) if is_bfloat else stacked)
        return out
    w = np.concatenate([p.dequantize() if isinstance(p, Packed) else p.astype(np.float32) for p in parts])
    _check_finite(w, t)
    if e.is_float:
        stored = encodings.float_to_bits(w, e.name)
        if e.name == "f16" and not np.isfinite(stored).all():
            raise CheckpointError(
                f"tensor {t.name}: a weight of {np.abs(w).max():g} does not fit f16; use bf16 or f32"
            )
        return {"values": tiles.pack_groups(stored)}
    from halfbyte.converter.quantizers import rtn

    if e.name == "q8":
        codes, scales = rtn.quantize_q8(w)
        return {"codes": tiles.pack_codes(codes, 8), "scales": tiles.pack_groups(scales)}
    codes, sub, row = rtn.quantize_table(w, e.name)
    planes = tiles.pack_code_planes(codes, e.bits)
    return {**planes, "scales": tiles.pack_groups(sub), "row": tiles.pack_groups(row[:, None])}


def _check_finite(values: np.ndarray, t: Matrix) -> None:
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"tensor {' + '.join(t.sources)} holds values that are not finite (NaN or infinity)"
        )
