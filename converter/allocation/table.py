"""A plan: which encoding every matrix of a file gets, as a table, as TOML to save and edit, and on a builder.

In the TOML, `[encodings]` maps names of matrices, as `halfbyte info` and the table show them, to encodings. Patterns
with * ? [] are allowed: a full name beats any pattern, and of patterns that fit the last one decides. `method` is what
`--method` would say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar, NamedTuple

from halfbyte.converter.builder import Builder, Matrix
from halfbyte.converter.recipe import RECIPES, STORAGES, Storage, base, check_method, head
from halfbyte.formats import tiles
from halfbyte.formats.encodings import BY_NAME
from halfbyte.formats.errors import UsageError
from halfbyte.formats.ops import BY_NAME as BY_OP

ENCODINGS = tuple(n for n in RECIPES if base(n) == n and n not in STORAGES)
KEEP = "keep"  # codes that arrived quantised stay as they are


class Measured(NamedTuple):
    """What one encoding does to one matrix: KL of the model with only it quantised (nats a token), and its error.

    error: |w - w_hat|^2 / |w|^2, so that kld / error is the sensitivity of arXiv 2411.17525.
    """

    kld: float
    error: float


def bytes_of(t: Matrix, storage: Storage | None = None) -> int:
    """Bytes of a matrix in the file, in its own storage or another one."""
    s = storage or t.storage
    e = BY_NAME[s.encoding]
    group = e.group or min(s.group, tiles.align(t.shape[1], tiles.COLUMN_PAD)) if e.has_codes else 0
    return tiles.nbytes(s.encoding, *t.shape, group, "f16" if e.scale == "f16" else s.scale_type)


def matrices(b: Builder) -> list[Matrix]:
    """The matrices of a builder, in the order of the file."""
    return [t for t in b.tensors if isinstance(t, Matrix)]


def store(b: Builder, storages: Mapping[str, Storage]) -> None:
    """Give matrices, by name, other storages."""
    for i, t in enumerate(b.tensors):
        if isinstance(t, Matrix) and t.name in storages:
            b.tensors[i] = replace(t, storage=storages[t.name])


def output(b: Builder) -> Matrix:
    """The matrix that makes the logits."""
    records, _, _ = b.finish()
    linear = BY_OP["linear"].code
    t = b.tensors[int(records[records["code"] == linear][-1]["w"][0])]
    assert isinstance(t, Matrix)
    return t


def lift_head(b: Builder, recipe: str) -> None:
    """Give the matrix that makes the logits what a recipe has for it."""
    t = output(b)
    store(b, {t.name: head(recipe, t.storage)})


@dataclass(frozen=True)
class Table:
    """The storages that the matrices of a builder have, and what was measured of them, if anything was."""

    HEADER: ClassVar = ("matrix", "shape", "encoding", "bits", "sensitivity", "KL", "share %")

    matrices: tuple[Matrix, ...]
    method: str
    measured: Mapping[str, Measured]

    @classmethod
    def of(cls, b: Builder, method: str, measured: Mapping[str, Mapping[str, Measured]]) -> Table:
        """measured: by name and encoding."""
        found = {
            t.name: measured[t.name][t.storage.encoding]
            for t in matrices(b)
            if t.storage.encoding in measured.get(t.name, ())
        }
        return cls(tuple(matrices(b)), method, found)

    def facts(self) -> dict[str, tuple[str, Measured | None]]:
        """Encoding and measurement of every matrix by name, as JSON holds them; see `remembered`."""
        return {t.name: (_name(t), self.measured.get(t.name)) for t in self.matrices}

    @classmethod
    def remembered(
        cls, b: Builder, method: str, facts: Mapping[str, tuple[str, Sequence[float] | None]]
    ) -> Table:
        """The table of which `facts` are; the builder's matrices get its storages."""
        store(b, {name: Storage(encoding) for name, (encoding, _) in facts.items() if encoding != KEEP})
        return cls(
            tuple(matrices(b)), method, {n: Measured(*m) for n, (_, m) in facts.items() if m is not None}
        )

    @property
    def bits(self) -> float:
        """Bits per weight over all matrices."""
        return 8 * sum(map(bytes_of, self.matrices)) / sum(t.shape[0] * t.shape[1] for t in self.matrices)

    def rows(self) -> list[tuple[str, ...]]:
        """One row a matrix, as text, under HEADER."""
        total = sum(m.kld for m in self.measured.values())
        rows = []
        for t in self.matrices:
            bits = 8 * bytes_of(t) / (t.shape[0] * t.shape[1])
            row: tuple[str, ...] = (t.name, "x".join(map(str, t.shape)), _name(t), f"{bits:.2f}")
            m = self.measured.get(t.name)
            if m is not None:
                share = 100 * m.kld / total if total else 0.0
                row += (f"{m.kld / m.error if m.error else 0.0:.3g}", f"{m.kld:.6f}", f"{share:.1f}")
            rows.append(row + ("",) * (len(self.HEADER) - len(row)))
        return rows

    def text(self) -> str:
        """The plan as TOML. The same table always gives the same text."""
        rows = self.rows()
        keys = [f'"{r[0]}" = "{r[2]}"' for r in rows]
        facts = [(r[1], *r[3:]) for r in rows]
        titles = ("shape", *self.HEADER[3:])
        wide = [max(map(len, column)) for column in zip(titles, *facts)]
        left = max([*map(len, keys), len("[encodings]")])

        def line(key: str, cells: tuple[str, ...]) -> str:
            return f"{key:<{left}}  # {'  '.join(c.rjust(n) for c, n in zip(cells, wide))}".rstrip()

        return "\n".join(
            (
                f"# {self.bits:.3f} bits per weight. Edit the encodings and give the file to `convert --plan`. Names",
                '# may be patterns ("*.down_proj" = "q6"): full names win, then later patterns.',
                f'method = "{self.method}"',
                "",
                line("[encodings]", titles),
                *map(line, keys, facts),
                "",
            )
        )

    def save(self, path: Path) -> None:
        """Write the plan aside and rename it. Raises UsageError where that fails."""
        aside = path.with_name(f".{path.name}.part")
        try:
            aside.write_text(self.text(), encoding="utf-8")
            aside.replace(path)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror or error}") from None


def _name(t: Matrix) -> str:
    return KEEP if t.storage.packed else t.storage.encoding


def read(path: Path, b: Builder) -> tuple[str, dict[str, Storage]]:
    """(method, storage of every matrix by name) of a plan file for the model of a builder.

    Raises UsageError, in one line, for a file that is no plan, unknown names and encodings, and matrices it leaves out.
    """
    try:
        import tomllib
    except ImportError:
        raise UsageError("reading a plan needs Python 3.11 or newer") from None
    try:
        values = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # TOML and UTF-8
        raise UsageError(f"{path} is not a plan: {error}") from None
    named = values.pop("encodings", None)
    method = values.pop("method", "auto")
    if not isinstance(named, dict) or not isinstance(method, str):
        raise UsageError(f"{path} is not a plan: it needs a table [encodings], and method is a name")
    if values:
        raise UsageError(f"{path}: unknown key {next(iter(values))!r}; a plan has method and [encodings]")
    try:
        check_method(method)
        return method, _resolve(named, b)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _resolve(named: dict[str, object], b: Builder) -> dict[str, Storage]:
    everything = {t.name: t for t in matrices(b)}
    chosen: dict[str, str] = {}
    for key, encoding in sorted(named.items(), key=lambda item: item[0] in everything):  # full names last
        fits = [key] if key in everything else [n for n in everything if fnmatchcase(n, key)]
        if not fits:
            raise UsageError(f"{key!r} is not a matrix of this model; `halfbyte explain` lists them")
        if not isinstance(encoding, str) or encoding not in ENCODINGS:
            raise UsageError(f"unknown encoding {encoding!r} of {key!r}; there are {', '.join(ENCODINGS)}")
        chosen |= dict.fromkeys(fits, encoding)
    missing = [n for n in everything if n not in chosen]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UsageError(f'no encoding for {missing[0]}{more}; add it, or a pattern such as "*" = "q4" first')
    for name, encoding in chosen.items():
        if encoding == KEEP and not everything[name].storage.packed:
            raise UsageError(
                f"{name} did not arrive quantised, so there is nothing to keep; choose q8 or less"
            )
    return {n: everything[n].storage if e == KEEP else Storage(e) for n, e in chosen.items()}
