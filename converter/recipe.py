"""Recipes: which encoding each matrix gets.

`keep` stores codes that arrived quantised as they are and floats in their own type; the others name
the encoding of every matrix, except that integer codes already at most as wide are kept rather than
rounded a second time. Some give the matrix that makes the logits more (`head`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from halfbyte.formats.encodings import BY_NAME, parameters_are_valid
from halfbyte.formats.errors import UsageError
from halfbyte.formats.tiles import COLUMN_PAD, align

RECIPES = {
    "f32": "IEEE single precision",
    "f16": "IEEE half precision",
    "bf16": "bfloat16",
    "q8": "int8, groups of 32: 8.5 bits",
    "q6": "6-bit levels, groups of 32: 6.25 bits",
    "q5": "5-bit non-linear levels, groups of 32: 5.25 bits",
    "q4+": "q4, and at least 6 bits for the matrix that makes the logits",
    "q4": "4-bit non-linear levels, groups of 32: 4.25 bits; 5.25 for the matrix that makes the logits",
    "q4-": "the same without the exception: 4.25 bits for all",
    "q3+": "q3, likewise",
    "q3": "3-bit non-linear levels, groups of 32: 3.25 bits",
    "q2": "2-bit non-linear levels, groups of 32: 2.25 bits",
    "f8": "8-bit floats E4M3, a scale a row",
    "f8-block": "the same with a scale for 128 by 128 weights",
    "f8-tensor": "the same with one scale a matrix",
    "f8e5m2": "8-bit floats E5M2, a scale a row",
    "keep": "codes and floats as they arrived",
}

# Nothing after the matrix that makes the logits can make up for its errors, and as a tied embedding it is where most
# of the error comes from. One bit more for it removes about as much of it as two (benchmarks/LOG.md); llama.cpp's
# types give it Q6_K.
HEADS = {"q4": "q5"}  # by recipe; a - leaves them out
HEAD = "q6"  # with a +

METHODS = {
    "auto": "gptq for a model that brings a tokenizer, else rtn",
    "rtn": "round to nearest with searched scales; weighted by the inputs with a calibration text",
    "awq": "columns of large inputs scaled up, groups clipped, then rounded to nearest",
    "autoround": "rounding learned by SignSGD on the error of each matrix's outputs",
    "gptq": "errors fed forward and made up for, on a calibration text or text of the model's own",
}


@dataclass(frozen=True)
class Storage:
    """How one matrix is stored. `packed` is True when its codes are copied rather than computed.

    span: rows that share the scales of a group, 0 for all; the file repeats them.
    """

    encoding: str
    group: int = 0
    scale_type: str = ""
    packed: bool = False
    span: int = 1

    def of_width(self, cols: int) -> Storage:
        """The same for a matrix of so many columns: groups that are wider become the whole row."""
        return replace(self, group=0) if self.group > align(cols, COLUMN_PAD) else self


# Recipes that say more than the name of an encoding.
STORAGES = {
    "f8": Storage("f8e4m3", 0, "f32"),
    "f8-block": Storage("f8e4m3", 128, "f32", span=128),
    "f8-tensor": Storage("f8e4m3", 0, "f32", span=0),
    "f8e5m2": Storage("f8e5m2", 0, "f32"),
}


@dataclass(frozen=True)
class Recipe:
    """A named rule from a source dtype to a storage."""

    name: str

    def storage(self, dtype: str, group: int = 0, scale_type: str = "") -> Storage:
        """Storage of a matrix held as `dtype` ('f32', 'bf16', 'q8', 'i4', ...; group and scale type if packed)."""
        source = BY_NAME.get("f32" if dtype == "f64" else dtype)
        assert source is not None, dtype
        wanted = STORAGES.get(self.name) or Storage(self.name)
        if source.is_float:
            return Storage(source.name) if self.name == "keep" else wanted
        kept = Storage(source.name, group, scale_type, packed=True)
        if self.name == "keep":
            return kept
        target = BY_NAME[wanted.encoding]
        narrow = source.is_integer and not target.is_float and source.bits <= target.bits
        return kept if narrow and parameters_are_valid(source, group, scale_type) else wanted


def base(name: str) -> str:
    """A recipe's name without the sign that says what the output matrix gets."""
    return name.removesuffix("-") if name.removesuffix("-") in HEADS else name.removesuffix("+")


def head(name: str, storage: Storage) -> Storage:
    """The storage of the output matrix under the recipe of that name, which gives other matrices `storage`."""
    wanted = HEAD if name.endswith("+") else HEADS.get(name)
    if wanted is None or storage.packed:
        return storage
    e = BY_NAME[storage.encoding]
    return Storage(wanted) if e.has_codes and not e.is_float and e.bits < BY_NAME[wanted].bits else storage


def recipe(name: str) -> Recipe:
    """The recipe of that name. Raises UsageError for an unknown one."""
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}")
    return Recipe(base(name))


def check_method(name: str) -> str:
    """The name of a method. Raises UsageError for an unknown one."""
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    return name
