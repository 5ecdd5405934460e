"""What is not even a file."""

import os
from pathlib import Path

import pytest

from halfbyte.formats.container import File
from halfbyte.formats.errors import FormatError


def test_folders_pipes_and_nothing_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (".", "pipe"):
        with pytest.raises(FormatError, match="not a regular file"):
            File(tmp_path / name)
    with pytest.raises(FormatError, match="No such file"):
        File(tmp_path / "absent")
