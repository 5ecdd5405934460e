"""Quantisation methods: one file a method, and the file name is the method's name.

All work on plain arrays or on the matrices of a builder, never on tiles or files. `rtn` needs no data: `quantize_q8`,
`quantize_table` and `quantize_affine`; `gptq` and `autoround` round under a Hessian of `converter.calibrate`; `awq`,
`smoothquant`, `rotation` and `bias` change the model around what is rounded. Names that begin with an underscore are
parts of methods, not methods.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from halfbyte.formats.errors import UsageError


def methods() -> tuple[str, ...]:
    """Names of all methods, sorted. Imports none of them."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def load(method: str) -> ModuleType:
    """The module of `method`; raises UsageError for a name that `methods()` does not list."""
    if method not in methods():
        raise UsageError(f"unknown quantisation method {method!r}; choose one of: {', '.join(methods())}")
    return importlib.import_module(f"{__name__}.{method}")
