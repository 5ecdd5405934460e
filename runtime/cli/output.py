"""Files that commands write beside what they print."""

from __future__ import annotations

import os
from pathlib import Path

from halfbyte.formats.errors import UsageError


def write_text(out: Path, text: str, model: Path) -> None:
    """Write aside and rename. Raises UsageError where that fails, or where it would replace the model."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        if out.exists() and out.samefile(model):
            raise UsageError(f"{out} is the model itself; give another name")
        aside.write_text(text, encoding="utf-8")
        aside.replace(out)
    except (OSError, ValueError) as error:
        raise UsageError(f"{out}: cannot write: {getattr(error, 'strerror', None) or error}") from None
    finally:
        aside.unlink(missing_ok=True)
