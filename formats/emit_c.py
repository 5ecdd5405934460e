"""Writes native/include/halfbyte_ops.h: the tables of this folder as C. `python -m halfbyte.formats.emit_c`.

The header is committed so that a C program needs no Python, and a test proves it fresh.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from . import annotation, container, encodings, kv_modes, metadata, ops, program, tiles

_C_TYPES = {"<u2": "uint16_t", "<u4": "uint32_t", "<u8": "uint64_t"}


def _struct(name: str, dtype: np.dtype, comment: str) -> str:
    assert dtype.fields is not None and dtype.names is not None
    lines = [f"/* {comment} */", f"typedef struct {name} {{"]
    for field in dtype.names:
        base = dtype.fields[field][0]
        count = "" if base.shape == () else f"[{base.shape[0]}]"
        scalar = base.base.str
        if scalar in _C_TYPES:
            lines.append(f"    {_C_TYPES[scalar]} {field}{count};")
        else:
            lines.append(f"    uint8_t {field}[{base.itemsize}];")
    return "\n".join([*lines, f"}} {name};", ""])


def _enum(prefix: str, rows: list[tuple[str, int, str]]) -> str:
    body = "\n".join(f"    {prefix}{name.upper()} = {value}, /* {doc} */" for name, value, doc in rows)
    return f"enum {{\n{body}\n}};\n"


def _braces(values: Iterable[object]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"


# Numbers of the words that describe an encoding; see `encodings.Encoding`.
KINDS = ("float", "codes", "float8", "index")
SCALINGS = ("", "f16", "sub7", "*")
OFFSETS = ("", "min", "zero")
MAX_LEVELS = 64


def _encoding(e: encodings.Encoding) -> str:
    """A row of HB_ENCODING_TABLE, in the order of struct hb_encoding."""
    low, high = tiles.CODE_BITS[e.bits] if e.has_codes else (0, 0)
    levels = [int(v) for v in e.levels] if e.levels and e.is_integer else []
    assert len(levels) <= MAX_LEVELS
    row = (e.code, e.bits, KINDS.index(e.kind), low, high, int(e.signed), e.group or 0,
           SCALINGS.index(e.scale), OFFSETS.index(e.offset), e.shift, len(levels))  # fmt: skip
    return _braces([*row, _braces(levels or [0])])


def _encodings() -> str:
    """The encoding table as C: one macro a line, so that cffi can skip them."""
    lines = [f"#define HB_MAX_LEVELS {MAX_LEVELS}"]
    for e in encodings.ENCODINGS:
        if e.kind == "float8":
            half = np.asarray(e.levels, np.float16).view(np.uint16)
            lines.append(f"#define HB_{e.name.upper()}_F16 {_braces(hex(v) for v in half)}")
        elif e.levels:
            lines.append(f"#define HB_{e.name.upper()}_LEVELS {_braces(e.levels)}")
        if e.row_scale:
            lines.append(f"#define HB_{e.name.upper()}_SHIFT {e.shift}")
    lines.append(f"#define HB_ENCODING_TABLE {_braces(map(_encoding, encodings.ENCODINGS))}")
    return "\n".join(lines) + "\n"


def _side(s: kv_modes.Side) -> str:
    """A row of HB_SIDE_TABLE, in the order of struct hb_side."""
    rule = ("", "amax", "rms").index(s.rule)
    factor = f"{np.float32(s.factor)!s}f" if s.factor else "0.0f"
    rest = f"{np.float32(s.rest)!s}f" if s.rest else "0.0f"
    return _braces([s.bits, rule, len(s.levels), factor, rest, _braces(s.levels or [0])])


# How an attribute is checked.
ATTR_KINDS = ("u32", "f32", "function")

RULES_STRUCT = """\
/* What a program and a file must be, for readers: rows of HB_OP_TABLE (operands that must be there, those that may,
   a bit each from the first; kinds of attributes: 0 u32, 1 f32, 2 function), HB_SECTION_TABLE, HB_KEY_TABLE (the
   type that a known metadata key must have) and HB_MODE_TABLE (keys, values: HB_SIDE_*). */
typedef struct hb_op_rule {
    const char *name;
    uint16_t code;
    uint8_t outs;
    uint8_t ins;
    uint8_t weights;
    uint8_t optional_weights;
    uint8_t attr_count;
    uint8_t attr_kinds[4];
    uint8_t in_place;
} hb_op_rule;

typedef struct hb_section_rule {
    char kind[5];
    uint8_t required;
} hb_section_rule;

typedef struct hb_key_rule {
    const char *key;
    uint8_t type;
    uint8_t required;
} hb_key_rule;

typedef struct hb_mode_rule {
    const char *name;
    uint8_t k;
    uint8_t v;
} hb_mode_rule;
"""


def _quoted(text: str) -> str:
    return f'"{text}"'


def _op_rule(op: ops.Op) -> str:
    def mask(names: tuple[str, ...], optional: bool) -> int:
        return sum(1 << i for i, name in enumerate(names) if optional or not name.endswith("?"))

    assert not any(name.endswith("?") for name in (*op.outputs, *op.inputs))
    kinds = [ATTR_KINDS.index(a.kind) for a in op.attrs]
    row = (_quoted(op.name), op.code, len(op.outputs), len(op.inputs), mask(op.weights, False),
           mask(op.weights, True), len(op.attrs), _braces(kinds or [0]), int(op.in_place))  # fmt: skip
    return _braces(row)


def _rules() -> str:
    """The tables that a reader checks a file against, as C: one macro a line."""
    sections = [_braces([_quoted(k), int(s.required)]) for k, s in container.SECTIONS.items()]
    keys = [
        _braces([_quoted(k), metadata.TYPES[kind], int(required)])
        for k, (kind, required, _) in metadata.KEYS.items()
    ]
    sides = {s.name: s.number for s in kv_modes.SIDES}
    modes = [_braces([_quoted(name), sides[k], sides[v]]) for name, (k, v) in kv_modes.MODES.items()]
    tables = {
        "OP": list(map(_op_rule, ops.OPS)), "SECTION": sections, "KEY": keys, "MODE": modes,
        "SIDE_NAME": [_quoted(s.name) for s in kv_modes.SIDES],
    }  # fmt: skip
    limits = {
        "MAX_SECTIONS": container.MAX_SECTIONS, "MAX_DIMENSION": container.MAX_DIMENSION,
        "MAX_WIDTH": program.MAX_WIDTH, "MAX_HEAD_DIM": program.MAX_HEAD_DIM, "MAX_RECORDS": program.MAX_RECORDS,
        "MAX_SLOTS": program.MAX_SLOTS, "MAX_CACHES": program.MAX_CACHES, "MAX_COLUMNS": program.MAX_COLUMNS,
        "MAX_ANNOTATION": annotation.MAX_BYTES, "DATA_ALIGNMENT": container.DATA_ALIGNMENT,
    }  # fmt: skip
    lines = [f"#define HB_{name}_TABLE {_braces(rows)}" for name, rows in tables.items()]
    lines += [f"#define HB_{name} {value}" for name, value in limits.items()]
    lines.append(f"#define HB_MAGIC {_braces(hex(b) for b in container.MAGIC)}")
    return "\n".join(lines) + "\n"


SIDE_STRUCT = """\
/* How keys or values are stored: a row of HB_SIDE_TABLE, by number HB_SIDE_*. rule 0 is floats; otherwise codes of
   `bits` bits, scaled by `factor` times the largest magnitude (1) or the root mean square (2). Without levels the
   code is the level. Where `rest` is not 0, keys have the signs of what the levels leave too: codes of HB_SIDE_T1 with
   that factor. */
typedef struct hb_side {
    uint8_t bits;
    uint8_t rule;
    uint8_t level_count;
    float factor;
    float rest;
    int8_t levels[16];
} hb_side;
"""


def _sides() -> str:
    """The table of stored forms of keys and values as C."""
    return (
        f"#define HB_PAGE_POSITIONS {kv_modes.PAGE}\n#define HB_E5M3_BIAS {kv_modes.E5M3_BIAS}\n"
        f"#define HB_QUERY_STEPS {kv_modes.QUERY_STEPS}\n"
        f"#define HB_SIGN_SEED {kv_modes.SIGN_SEED:#x}ull\n#define HB_REST_SEED {kv_modes.REST_SEED:#x}ull\n"
        f"#define HB_SIDE_COUNT {len(kv_modes.SIDES)}\n#define HB_SIDE_TABLE {_braces(map(_side, kv_modes.SIDES))}\n"
    )


ENCODING_STRUCT = """\
/* A row of HB_ENCODING_TABLE (`static const hb_encoding table[] = HB_ENCODING_TABLE;`). Codes have low_bits in plane
   `codes` and high_bits in plane `high`; without levels the code is the level. HB_<name>_F16 are the values of 8-bit
   floats, as binary16. */
typedef struct hb_encoding {
    uint16_t number;
    uint8_t bits;
    uint8_t kind;
    uint8_t low_bits;
    uint8_t high_bits;
    uint8_t is_signed;
    uint8_t group;
    uint8_t scaling;
    uint8_t offset;
    uint8_t shift;
    uint8_t level_count;
    int8_t levels[64];
} hb_encoding;
"""


def header() -> str:
    """The whole text of halfbyte_ops.h."""
    attrs = [
        (f"{op.name}_{a.name}", i, f"{a.kind} attribute of {op.name}")
        for op in ops.OPS
        for i, a in enumerate(op.attrs)
    ]
    parts = [
        "/* Generated by halfbyte.formats.emit_c from the tables in formats/. Do not edit. */\n"
        "#ifndef HALFBYTE_OPS_H\n#define HALFBYTE_OPS_H\n\n#include <stdint.h>\n",
        f"#define HB_FORMAT_MAJOR {container.VERSION[0]}\n#define HB_FORMAT_MINOR {container.VERSION[1]}\n"
        f"#define HB_NONE {program.NONE:#x}u\n#define HB_PANEL {tiles.PANEL}\n"
        f"#define HB_COLUMN_PAD {tiles.COLUMN_PAD}\n"
        f"#define HB_ALIGNMENT {tiles.ALIGNMENT}\n"
        f"#define HB_SUPER {encodings.SUPER}\n",
        _enum("HB_OP_", [(op.name, op.code, op.formula) for op in ops.OPS]),
        _enum("HB_ATTR_", attrs),
        _enum("HB_FN_", [(k, v, k) for k, v in ops.FUNCTIONS.items()]),
        _enum("HB_ENC_", [(e.name, e.code, e.summary) for e in encodings.ENCODINGS]),
        _enum("HB_KIND_", [(k, i, "of an encoding") for i, k in enumerate(KINDS)]),
        _enum(
            "HB_SCALING_",
            [
                ("none", 0, "plain numbers"),
                ("f16", 1, "a binary16 a group"),
                ("sub7", 2, "a 7-bit sub-scale and shift bit a group, an E6M2 byte a row"),
                ("any", 3, "the tensor's scale type"),
            ],
        ),
        _enum("HB_OFFSET_", [(k or "none", i, "of an encoding") for i, k in enumerate(OFFSETS)]),
        _enum(
            "HB_SCALE_TYPE_",
            [(k or "none", v, "of a tensor record") for k, v in encodings.SCALE_TYPES.items()],
        ),
        ENCODING_STRUCT,
        _encodings(),
        _enum("HB_SIDE_", [(s.name, s.number, f"{s.bits + s.stages - 1} bits") for s in kv_modes.SIDES]),
        SIDE_STRUCT,
        _sides(),
        _enum("HB_TILE_", [(n, k, n) for k, n in tiles.TILE_NAMES.items()]),
        _enum(
            "HB_ROWS_",
            [("tokens", program.TOKENS, "one row a token"), ("picks", program.PICKS, "one row a pick")],
        ),
        _struct("hb_op", program.OP_DTYPE, "A program record, 64 bytes."),
        _struct("hb_slot", program.SLOT_DTYPE, "An activation buffer, or a view of columns of one."),
        _struct("hb_cache", program.CACHE_DTYPE, "Keys and values of a layer; window 0 is unbounded."),
        _struct("hb_header", container.HEADER_DTYPE, "The first 64 bytes of a file."),
        _struct("hb_section", container.SECTION_DTYPE, "A row of the section table."),
        _struct(
            "hb_tensor",
            container.TENSOR_DTYPE,
            "A row of the tensor table; offset is from the start of DATA.",
        ),
        _enum("HB_META_", [(k, v, "type of a metadata value") for k, v in metadata.TYPES.items()]),
        RULES_STRUCT,
        _rules(),
        "#endif\n",
    ]
    return "\n".join(parts)


def main() -> None:
    """Write the header into the source tree."""
    path = Path(__file__).resolve().parent.parent / "native" / "include" / "halfbyte_ops.h"
    path.write_text(header())
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
