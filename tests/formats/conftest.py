"""Makes `programs` (of tests/ops) and the modules of this folder importable by its tests."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent / "ops"):
    sys.path.insert(0, str(folder))
