"""Keeps the tables of SPEC.md equal to the code. `python -m halfbyte.formats.spec` rewrites them.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; a test proves the file fresh.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from . import annotation, container, encodings, metadata, ops, program, tiles

PATH = Path(__file__).resolve().parent / "SPEC.md"
_BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_TYPES = {"u1": "u8", "u2": "u16", "u4": "u32", "u8": "u64"}

_FIELDS: dict[str, dict[str, str]] = {
    "header": {
        "magic": "the magic number",
        "major": "format version",
        "minor": "format version",
        "sections": "rows of the section table",
        "length": "bytes of the whole file",
        "zero": "must be zero",
        "digest": "SHA-256 of bytes 0..31 of the file followed by the whole section table",
    },
    "section_record": {
        "kind": "four ASCII characters from 0x21 to 0x7E",
        "flags": "bit 0: a reader must understand this section; other bits must be zero",
        "offset": "from the start of the file",
        "length": "bytes, without padding",
        "zero": "must be zero",
        "digest": "SHA-256 of the section's bytes; for DATA, of the concatenated digests of all tensors",
    },
    "tensor_record": {
        "name_offset": "of the name, from the start of the names",
        "name_length": "bytes of the name, 1 to 255",
        "encoding": "section 5",
        "tile": "0 rows, 1 p16",
        "rank": "1 with tile rows, 2 with tile p16",
        "shape": "rank dimensions, then zeros; a matrix is rows, cols (output, input)",
        "group": "columns that share a scale; 0 is a whole row",
        "scale_type": "section 5.2; 0 where the encoding has none to choose",
        "offset": "from the start of DATA",
        "length": "bytes",
        "zero": "must be zero",
        "digest": "SHA-256 of the tensor's bytes, padding between its planes included",
        "zero2": "must be zero",
    },
    "op_record": {
        "code": "the op, section 8",
        "layer": f"for display; {program.NO_LAYER:#x} outside any layer",
        "flags": "must be zero",
        "out": "slots written",
        "in": "slots read",
        "w": "tensors, by row of the tensor table",
        "attr": "attributes in the op's order; f32 as its bits; unused ones zero",
    },
    "slot_record": {
        "width": "columns",
        "base": "its own number, or the number of the base slot that it is a view of",
        "offset": "first column of the base; 0 for a base",
        "rows": "0 one row a token, 1 one row a picked token",
    },
    "cache_record": {
        "kv_heads": "heads of keys and values",
        "k_dim": "columns of one key",
        "v_dim": "columns of one value",
        "window": "positions that a row sees, itself included; 0 is all",
    },
}


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |\n" for line in lines)


def _layout(name: str, dtype: np.dtype) -> str:
    assert dtype.fields is not None and dtype.names is not None
    rows = []
    for field in dtype.names:
        base, offset = dtype.fields[field][:2]
        count = base.shape[0] if base.shape else 1
        kind = _TYPES.get(base.base.str[1:], f"{base.itemsize} bytes")
        rows.append((offset, f"{kind}[{count}]" if count > 1 else kind, field, _FIELDS[name][field]))
    return _table(("offset", "type", "field", "meaning"), rows)


def _level(e: encodings.Encoding) -> str:
    """L[c] in words."""
    if not e.has_codes:
        return ""
    if e.levels is None:
        return "c"
    if not e.is_integer:
        return "section 5.5"
    first, step = int(e.levels[0]), int(e.levels[1] - e.levels[0])
    if list(e.levels) != list(range(first, first + step * len(e.levels), step)):
        return "table of 5.3"
    difference = f"c - {-first // step}" if first else "c"
    return difference if step == 1 else f"{step} ({difference})"


def _since(minor: int) -> str:
    return f"{container.VERSION[0]}.{minor}"


def _encodings() -> str:
    rows = []
    for e in encodings.ENCODINGS:
        group = e.group or "any" if e.has_codes else ""
        code = f"{'i' if e.signed else 'u'}{e.bits}" if e.has_codes else ""
        scale = {"*": "5.2", "sub7": "5.3"}.get(e.scale, e.scale)
        rows.append((e.code, e.name, code, _level(e), group, scale, e.offset, _since(e.minor), e.summary))
    return _table(
        ("number", "name", "code c", "level L[c]", "group", "scale type", "offset", "since", "summary"), rows
    )


def _levels() -> str:
    """Level tables that are no arithmetic sequence, and the shifts."""
    rows = []
    for e in encodings.ENCODINGS:
        listed = _level(e) == "table of 5.3"
        if listed or e.shift:
            values = " ".join(str(v) for v in e.levels or ()) if listed else _level(e)
            rows.append((e.name, e.shift or "", values))
    return _table(("name", "shift", "levels, from code 0"), rows)


def _ops() -> str:
    rows = []
    for op in ops.OPS:
        attrs = ", ".join(f"{a.name} {'u32' if a.kind == 'function' else a.kind}" for a in op.attrs)
        operands = (", ".join(names) for names in (op.outputs, op.inputs, op.weights))
        place = "yes" if op.in_place else ""
        rows.append((op.code, op.name, *operands, attrs, place, _since(op.minor), op.formula))
    return _table(("code", "name", "out", "in", "w", "attr", "in place", "since", "formula"), rows)


def tables() -> dict[str, str]:
    """Name of a table in SPEC.md -> its Markdown."""
    limits = [
        ("sections", container.MAX_SECTIONS),
        ("one dimension of a tensor", container.MAX_DIMENSION),
        ("records of a program", program.MAX_RECORDS),
        ("slots", program.MAX_SLOTS),
        ("columns of one slot", program.MAX_WIDTH),
        ("columns of all base slots together", program.MAX_COLUMNS),
        ("caches", program.MAX_CACHES),
        ("bytes of an annotation", annotation.MAX_BYTES),
        ("kv_heads, k_dim, v_dim, head_dim", program.MAX_HEAD_DIM),
    ]
    kinds = [
        (
            kind,
            "required" if s.required else "optional",
            "" if s.annotation else "set",
            _since(s.minor),
            s.meaning,
        )
        for kind, s in container.SECTIONS.items()
    ]
    keys = [(k, t, "required" if r else "optional", m) for k, (t, r, m) in metadata.KEYS.items()]
    functions = [(n, k, "p" if k in ops.PARAMETRIC else "") for k, n in ops.FUNCTIONS.items()]
    return {
        "header": _layout("header", container.HEADER_DTYPE),
        "section_record": _layout("section_record", container.SECTION_DTYPE),
        "sections": _table(("kind", "presence", "bit 0", "since", "content"), kinds),
        "metadata_types": _table(("number", "type"), [(v, k) for k, v in metadata.TYPES.items()]),
        "tensor_record": _layout("tensor_record", container.TENSOR_DTYPE),
        "encodings": _encodings(),
        "levels": _levels(),
        "scale_types": _table(
            ("number", "scale type"), [(v, k or "none") for k, v in encodings.SCALE_TYPES.items()]
        ),
        "tiles": _table(("number", "name"), tiles.TILE_NAMES.items()),
        "op_record": _layout("op_record", program.OP_DTYPE),
        "slot_record": _layout("slot_record", program.SLOT_DTYPE),
        "cache_record": _layout("cache_record", program.CACHE_DTYPE),
        "ops": _ops(),
        "functions": _table(("number", "function", "parameter"), functions),
        "limits": _table(("number of", "at most"), limits),
        "metadata_keys": _table(("key", "type", "presence", "meaning"), keys),
    }


def refreshed(text: str) -> str:
    """The text of SPEC.md with every table as the code has it. Raises KeyError for an unknown table."""
    current = tables()
    found = [m.group(2) for m in _BLOCK.finditer(text)]
    missing = set(current) - set(found)
    if missing:
        raise KeyError(f"SPEC.md has no place for {', '.join(sorted(missing))}")
    return _BLOCK.sub(lambda m: m.group(1) + current[m.group(2)] + m.group(3), text)


def main() -> None:
    """Rewrite the tables of SPEC.md in the source tree."""
    PATH.write_text(refreshed(PATH.read_text()))
    print(f"wrote {PATH}", file=sys.stderr)


if __name__ == "__main__":
    main()
