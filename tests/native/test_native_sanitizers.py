"""The C parity driver and the client under sanitizers (`make sanitize`), which take minutes to build."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from client import chatty_file, check_client
from targets import BUILD, Target
from test_native_arm import check, vectors  # noqa: F401


@pytest.mark.skipif(not os.environ.get("HALFBYTE_SANITIZE"), reason="takes minutes: run `make sanitize`")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_no_report(rig, vectors, sanitizers, tmp_path: Path) -> None:  # noqa: F811
    name = sanitizers.partition(",")[0]
    target = Target(
        name, {}, BUILD / "sanitize" / name, (f"-DHALFBYTE_SANITIZE={sanitizers}",), "libhalfbyte.so"
    )
    folder = target.built()
    symbols = subprocess.run(["nm", folder / "parity"], capture_output=True, text=True).stdout
    assert "__asan_init" in symbols or "__tsan_init" in symbols
    check([str(folder / "parity"), str(vectors)], rig.usable())
    check_client(target, chatty_file(tmp_path), tmp_path)
