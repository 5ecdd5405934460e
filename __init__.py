"""halfbyte: convert trained checkpoints to one compact file and run it on small machines.

`import halfbyte` is lazy: each name below is imported from its home on first use, so that the
command line starts fast and an embedded application pays only for what it calls.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "load": "halfbyte.runtime.model",
    "Model": "halfbyte.runtime.model",
    "Session": "halfbyte.runtime.session",
    "convert": "halfbyte.converter",
    "train_qat": "halfbyte.converter.qat",
    "HalfbyteError": "halfbyte.formats.errors",
}
__all__ = ["HalfbyteError", "Model", "Session", "__version__", "convert", "load", "train_qat"]


def __getattr__(name: str):
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
