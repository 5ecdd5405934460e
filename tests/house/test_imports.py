"""Who may import whom, read from the syntax trees; and what a light import must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOMS = ("formats", "devices", "runtime", "converter")
# Modules of the converter that may run a model.
FRONT_DOOR_FROM = ("calibrate", "evaluate", "own_text", "rerun")

# What each room may import of ours, besides itself.
ALLOWED = {
    "formats": (),
    "devices": ("formats",),
    "runtime": ("formats", "devices"),
    "converter": ("formats",),
}

# Within runtime: who stands above whom. A module imports only modules of its own rank or below when it is loaded (a
# model makes sessions, so inside functions it may look up); a backend never looks up.
RANKS = {
    "cli": 4,
    "server": 4,
    "generate": 3,
    "chat": 3,
    "evaluate": 3,
    "bench": 3,
    "session": 2,
    "model": 1,
    "backends": 0,
}


def sources(*rooms: str) -> list[Path]:
    """Python files of rooms, and the front door."""
    return sorted(
        p for room in rooms for p in (REPOSITORY / room).rglob("*.py") if "__pycache__" not in p.parts
    )


def module_name(path: Path) -> str:
    """halfbyte.X.Y of a file."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(("halfbyte", *(p for p in parts if p != "__init__")))


def loaded(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: not functions, not `if TYPE_CHECKING`."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        yield node
        lazy = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            lazy = True
        pending += [] if lazy else list(ast.iter_child_nodes(node))


def imported(path: Path, text: str | None = None, lazy: bool = True) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of everything a file imports, names of `from` imports included."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    tree = ast.parse(path.read_text() if text is None else text)
    for node in ast.walk(tree) if lazy else loaded(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*base, *(node.module.split(".") if node.module else [])])
            yield from ((node.lineno, f"{home}.{alias.name}") for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
        ):
            yield from ((node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant))


def complaint(path: Path, name: str) -> str | None:
    """Why this file may not import that name, or None."""
    parts, own = name.split("."), module_name(path).split(".")
    room = own[1] if len(own) > 1 else ""
    if parts[0] in ROOMS:
        return f"imports {name}, not halfbyte.{name}"
    if parts[0] != "halfbyte" or room not in ALLOWED:
        return None
    target = parts[1] if len(parts) > 1 else ""
    if target == "__version__" and room != "formats":
        return None
    if room == "converter" and own[-1] in FRONT_DOOR_FROM and target == "runtime":
        return None
    if target in ROOMS:
        return None if target == room or target in ALLOWED[room] else f"{room} imports {name}"
    if room == "converter" and own[-1] in FRONT_DOOR_FROM:
        return None
    if room == "runtime" and (
        own[2:3] == ["cli"] or name == "halfbyte"
    ):  # only cli may call halfbyte.convert
        return None
    return f"{room} imports the front door: {name}"


def rank_complaints(path: Path, text: str | None = None) -> list[str]:
    """Imports of a module of runtime that look up."""
    own = module_name(path).split(".")
    if own[1:2] != ["runtime"] or len(own) < 3 or own[2] not in RANKS:
        return []
    mine = RANKS[own[2]]
    found = []
    for n, name in imported(path, text, lazy=mine == RANKS["backends"]):
        other = name.split(".")
        if other[:2] == ["halfbyte", "runtime"] and RANKS.get([*other, ""][2], mine) > mine:
            found.append(f"line {n}: {own[2]} imports {name}")
    return found


def complaints(path: Path, text: str | None = None) -> list[str]:
    """Everything wrong with the imports of a file."""
    found = [f"line {n}: {why}" for n, name in imported(path, text) if (why := complaint(path, name))]
    tree = ast.parse(path.read_text() if text is None else text)
    if module_name(path).startswith("halfbyte.runtime.") and not module_name(path).startswith(
        "halfbyte.runtime.cli"
    ):
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "convert"]
        found += [
            f"line {n.lineno}: halfbyte.convert" for n in calls if getattr(n.value, "id", "") == "halfbyte"
        ]
    return found + rank_complaints(path, text)


@pytest.mark.parametrize("path", sources(*ROOMS), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports(path: Path) -> None:
    """Rooms import only what they may, and always as halfbyte.X."""
    assert complaints(path) == []


def test_other_python_uses_the_package_name() -> None:
    """Tests and benchmarks too: `import formats` would load a second copy."""
    for folder in ("tests", "benchmarks"):
        for path in sources(folder):
            wrong = [name for _, name in imported(path) if name.split(".")[0] in ROOMS]
            assert not wrong, f"{path}: {wrong}"


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("formats/ops.py", "from halfbyte.runtime import kv"),
        ("formats/ops.py", "import formats.tiles"),
        ("formats/ops.py", "from halfbyte import __version__"),
        ("devices/probe.py", "from ..runtime import model"),
        ("runtime/model.py", "from halfbyte import converter"),
        ("runtime/cli/convert.py", "from ...converter import rope"),
        ("runtime/cli/convert.py", "def f():\n    import halfbyte.converter.rope"),
        ("runtime/model.py", "import importlib\nimportlib.import_module('halfbyte.converter')"),
        ("runtime/backends/jit.py", "from halfbyte.runtime.session import Session"),
        ("runtime/backends/jit.py", "from .. import model"),
        ("runtime/model.py", "from .session import Session"),
        ("runtime/session.py", "from halfbyte.runtime.cli import main"),
        ("runtime/backends/jit.py", "def f():\n    from halfbyte.runtime.session import Session"),
        ("runtime/model.py", "from halfbyte import load"),
        ("runtime/model.py", "import halfbyte\nhalfbyte.convert()"),
        ("converter/rope.py", "import halfbyte.runtime.model"),
        ("converter/rope.py", "from .. import load"),
        ("converter/quantizers/rtn.py", "from ...devices import probe"),
    ],
)
def test_the_rules_have_teeth(file: str, line: str) -> None:
    """Each forbidden import is seen, however it is spelt."""
    path = REPOSITORY / file
    assert complaints(path, line)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("converter/calibrate.py", "import halfbyte"),
        ("converter/__init__.py", "from halfbyte import __version__"),
        ("runtime/session.py", "from .model import Model"),
        ("runtime/model.py", "def session():\n    from halfbyte.runtime.session import Session"),
        ("runtime/cli/run.py", "from halfbyte.runtime.session import Session"),
    ],
)
def test_what_is_allowed_stays_allowed(file: str, line: str) -> None:
    """The rules do not forbid more than they say."""
    path = REPOSITORY / file
    assert not complaints(path, line)


HEAVY = (
    "numba",
    "llvmlite",
    "torch",
    "tokenizers",
    "jinja2",
    "transformers",
    "ml_dtypes",
    "safetensors",
    "cffi",
    "starlette",
    "uvicorn",
    "llguidance",
)


@pytest.mark.parametrize(
    "what", ["halfbyte", "halfbyte.formats.container", "halfbyte.converter", "halfbyte.runtime.cli"]
)
def test_light_imports(what: str) -> None:
    """Importing the front door, the format or the command line loads nothing heavy."""
    script = f"import sys, {what}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_formats_needs_only_numpy() -> None:
    """The law imports the standard library and NumPy."""
    allowed = set(sys.stdlib_module_names) | {"numpy", "halfbyte"}
    for path in sources("formats"):
        foreign = [name for _, name in imported(path) if name.split(".")[0] not in allowed]
        assert not foreign, f"{path}: {foreign}"
