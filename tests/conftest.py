"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

from halfbyte.runtime.backends import BACKENDS

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights and vectors; the test is skipped, saying so, where it is absent."""
    folder = Path(os.environ.get("HALFBYTE_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder} (set HALFBYTE_DATA)")
    return folder


@pytest.fixture(params=sorted(set(BACKENDS) - {"cuda"}))  # that one has tests of its own
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; native is skipped, saying so, where no library was built."""
    if request.param == "native":
        from halfbyte.runtime.backends.native import library_path

        if library_path() is None:
            pytest.skip("no native library: run `make native` (needs a C compiler)")
    return request.param
