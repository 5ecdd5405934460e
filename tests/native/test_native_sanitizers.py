"""The C parity driver under sanitizers: `make sanitize`. Building takes minutes, so other runs skip it."""

from __future__ import annotations

import os
import subprocess

import pytest
from targets import ROOT, build
from test_native_arm import check, vectors  # noqa: F401


@pytest.mark.skipif(not os.environ.get("HALFBYTE_SANITIZE"), reason="takes minutes: run `make sanitize`")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_no_report(rig, vectors, sanitizers) -> None:  # noqa: F811
    folder = build(
        ROOT / "build" / "sanitize" / sanitizers.partition(",")[0], f"-DHALFBYTE_SANITIZE={sanitizers}"
    )
    symbols = subprocess.run(["nm", folder / "parity"], capture_output=True, text=True).stdout
    assert "__asan_init" in symbols or "__tsan_init" in symbols
    check([str(folder / "parity"), str(vectors)], rig.usable())
