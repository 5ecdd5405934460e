"""One file a model type: `converter/models/<model_type>.py` with `build(b) -> Slot`. The file name is the registry."""

from __future__ import annotations

import importlib
import pkgutil

from halfbyte.converter.builder import Builder, Slot
from halfbyte.formats.errors import CheckpointError

# Other names that published configs use for the same model.
ALIASES = {"gemma3_text": "gemma3"}


def supported() -> list[str]:
    """All model types that can be converted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def module_name(model_type: object) -> str:
    """The module of a model type. Raises CheckpointError naming what is supported."""
    name = ALIASES.get(str(model_type), str(model_type))
    if name not in supported():
        raise CheckpointError(f"model type {model_type!r} is not supported ({', '.join(supported())})")
    return name


def build(b: Builder) -> Slot:
    """Emit the program of the checkpoint's model type. Raises CheckpointError."""
    return importlib.import_module(f"{__name__}.{module_name(b.config.get('model_type'))}").build(b)
