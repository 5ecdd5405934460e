"""Which of its kernels OpenBLAS takes, the BLAS library in NumPy's wheels.

It asks the processor when it is loaded, and 0.3.31 answers an AMD Zen 5 with its AVX2 kernels: 132 GFLOP/s of float32
products a core instead of 250. OPENBLAS_CORETYPE overrules it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

from .cgroup import ROOT
from .probe import cpu_flags, cpu_vendor

_NEEDED = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
_VARIABLE = "OPENBLAS_CORETYPE"


def use_wide_kernels(root: Path = ROOT, environment: MutableMapping[str, str] = os.environ) -> bool:
    """Have OpenBLAS use AVX-512 on AMD processors that have it; whether that was done.

    Nothing is done once NumPy is loaded, or where the variable is set already. Bits of products change: for
    commands whose time goes into products, before anything else of theirs.
    """
    if "numpy" in sys.modules or _VARIABLE in environment:
        return False
    if cpu_vendor(root) != "AuthenticAMD" or not cpu_flags(root) >= _NEEDED:
        return False
    environment[_VARIABLE] = "SKYLAKEX"
    return True
