"""Backends: `reference` (the law), `jit` (Numba), `native` (C), `cuda` (PyTorch). One module and class each."""

from __future__ import annotations

import importlib

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.backends.backend import Backend

# In order of preference: the first that is available on this machine is the default; cuda is for those who ask.
BACKENDS: dict[str, str] = {"native": "Native", "jit": "Jit", "reference": "Reference", "cuda": "Cuda"}


def backend_class(name: str | None = None) -> type[Backend]:
    """The backend of that name, or the best available one. Raises UsageError for an unknown name."""
    if name is None:
        from halfbyte.runtime.backends.native import library_path

        name = "native" if library_path() else "jit"
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    try:
        module = importlib.import_module(f"halfbyte.runtime.backends.{name}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UsageError("the cuda backend needs PyTorch: pip install 'halfbyte[cuda]'") from None
    return getattr(module, BACKENDS[name])
