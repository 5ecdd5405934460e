"""The house rules that a reader of the code relies on: sizes, names, one spelling an op, nothing generated stale."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import halfbyte
from halfbyte.formats import emit_c, ops, spec
from halfbyte.runtime.backends.reference import Reference

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("formats", "devices", "runtime", "converter", "native", "benchmarks", "tests")
SUFFIXES = (".py", ".c", ".h", ".inc", ".cmake")
SKIPPED = {"__pycache__", "build", ".venv"}


def files(*folders: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Source files of folders."""
    return sorted(
        p
        for folder in folders
        for p in (REPOSITORY / folder).rglob("*")
        if p.suffix in suffixes and p.is_file() and not SKIPPED & set(p.relative_to(REPOSITORY).parts)
    )


def test_no_file_is_long() -> None:
    """At most 500 lines; the reference under 400."""
    everything = [*files(*FOLDERS), REPOSITORY / "__init__.py"]
    assert len(everything) > 30
    lengths = {str(p.relative_to(REPOSITORY)): len(p.read_text().splitlines()) for p in everything}
    assert {k: n for k, n in lengths.items() if n > 500} == {}
    assert lengths["runtime/backends/reference.py"] < 400


def test_no_module_without_a_subject() -> None:
    """Nothing is called utils, helpers, common or misc."""
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [
        p for p in files(*FOLDERS) if p.stem in vague or vague & set(p.relative_to(REPOSITORY).parts)
    ] == []


def test_the_op_table_stays_small() -> None:
    """Growing past MAX_OPS takes a decision; codes are unique and dense from 1, so none was reused."""
    assert len(ops.OPS) <= ops.MAX_OPS <= 24
    assert [op.code for op in ops.OPS] == list(range(1, len(ops.OPS) + 1))
    assert len({op.name for op in ops.OPS}) == len(ops.OPS)


def test_one_reference_function_an_op() -> None:
    """In the order of the table, and no public function more than the ops and what a backend is."""
    source = ast.parse((REPOSITORY / "runtime" / "backends" / "reference.py").read_text())
    (cls,) = (n for n in source.body if isinstance(n, ast.ClassDef) and n.name == Reference.__name__)
    methods = [n.name for n in cls.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
    assert [m for m in methods if m not in ("bind", "run_range")] == [op.name for op in ops.OPS]


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_one_word_everywhere(op: ops.Op) -> None:
    """`grep -ri rmsnorm` is the map: reference, C header, specification and test cases use the table's word."""
    for path in (
        "runtime/backends/reference.py",
        "native/include/halfbyte_ops.h",
        "formats/SPEC.md",
        "tests/ops/cases.py",
    ):
        assert re.search(rf"\b(HB_OP_)?{op.name}\b", (REPOSITORY / path).read_text(), re.IGNORECASE), path


def test_the_c_header_is_fresh() -> None:
    """Else: python -m halfbyte.formats.emit_c."""
    assert (REPOSITORY / "native" / "include" / "halfbyte_ops.h").read_text() == emit_c.header()


def test_the_tables_of_the_specification_are_fresh() -> None:
    """Else: python -m halfbyte.formats.spec."""
    text = spec.PATH.read_text()
    assert spec.refreshed(text) == text
    with pytest.raises(KeyError):
        spec.refreshed(text.replace("<!-- table ops -->", ""))


def test_references_to_the_specification_exist() -> None:
    """`SPEC.md section 5.3` in a source file names a heading."""
    headings = set(re.findall(r"^##+ ([\d.]*\d)", spec.PATH.read_text(), re.MULTILINE))
    named = r"SPEC\.md(?:\s+sections?)?\s+(\d+(?:\.\d+)?)((?:(?:,| and)\s+\d+(?:\.\d+)?)*)"
    seen = 0
    for path in files(*FOLDERS):
        for first, rest in re.findall(named, path.read_text()):
            for number in [first, *re.findall(r"\d+(?:\.\d+)?", rest)]:
                seen += 1
                assert number in headings, f"{path}: SPEC.md has no section {number}"
    assert seen > 8


def documented(tree: ast.Module) -> list[str]:
    """Public functions, methods and classes of a module without docstring."""
    missing = [] if ast.get_docstring(tree) or not tree.body else ["module"]

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for n in body:
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not n.name.startswith(
                "_"
            ):
                if not ast.get_docstring(n):
                    missing.append(prefix + n.name)
                if isinstance(n, ast.ClassDef):
                    walk(n.body, f"{prefix}{n.name}.")

    walk(tree.body, "")
    return missing


@pytest.mark.parametrize("path", files("formats", suffixes=(".py",)), ids=lambda p: p.name)
def test_the_law_is_documented(path: Path) -> None:
    """Every public function and class in formats has a docstring."""
    assert documented(ast.parse(path.read_text())) == []


def test_one_version() -> None:
    """pyproject.toml and the package agree."""
    text = (REPOSITORY / "pyproject.toml").read_text()
    found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    assert found and found.group(1) == halfbyte.__version__
