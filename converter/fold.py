"""Float-equivalent changes of a built program: where scales and rotations fold in exactly, and folding them.

A *site* is an activation that only matrices read. There y can be divided by s, column by column, where it is
made, and the matrices' columns multiplied by s where it is read: the function stays, the weights change. Three
kinds exist: the output of a norm, the values that attention averages, the `up` half of a gated MLP.

`Fold` changes vectors of the builder at once and matrices as they are read: it stands between the builder and
its checkpoint, so whatever reads `builder.checkpoint` (assembling, calibrating, quantising) sees folded rows, and
no more than one matrix is ever in memory. Arithmetic is float64, rounded to float32 once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from halfbyte.converter.builder import Builder, Matrix, Slot, Vector, _Pending
from halfbyte.converter.checkpoints.checkpoint import Checkpoint, Packed, check_rows
from halfbyte.formats.errors import UsageError

MATRIX, BIAS = 0, 1  # operands of LINEAR
NORMS = ("rmsnorm", "layernorm")


class Map(Protocol):
    """A linear map of one axis. `span` consecutive coordinates mix; maps of span 1 only scale."""

    @property
    def span(self) -> int:
        """How many consecutive coordinates mix."""
        ...

    def apply(self, x: np.ndarray, first: int) -> np.ndarray:
        """float64[..., n] -> the same shape; x holds coordinates first .. first + n (multiples of span)."""
        ...


@dataclass(frozen=True)
class Scale:
    """Coordinate j times factors[j]."""

    factors: np.ndarray
    span: int = 1

    def apply(self, x: np.ndarray, first: int) -> np.ndarray:
        """See `Map`."""
        return x * self.factors[first : first + x.shape[-1]]


@dataclass(frozen=True)
class Piece:
    """Rows first .. first + count of matrix `matrix`, which make columns offset .. of an activation."""

    matrix: int
    first: int
    offset: int
    count: int
    record: int


@dataclass(frozen=True)
class Site:
    """An activation that can be rescaled exactly.

    kind       'norm' | 'value' | 'up'
    layer      of the producer
    width      free scales, in the producer's columns
    producers  the norm's record, or the rows of matrices (several where q, k and v are stored apart)
    consumers  indices in `builder.tensors` of the matrices whose columns are multiplied
    heads      ('value') (kv heads, query heads that share one, columns a head); None elsewhere
    obstacle   '' or why nothing may be folded here
    """

    kind: str
    layer: int
    width: int
    producers: tuple[Piece, ...]
    consumers: tuple[int, ...]
    record: int
    heads: tuple[int, int, int] | None = None
    obstacle: str = ""

    def columns(self, s: np.ndarray) -> np.ndarray:
        """[width] scales -> the scales of the consumers' columns: a kv head's serve every query head of it."""
        if self.heads is None:
            return s
        kv, share, dim = self.heads
        return np.repeat(s.reshape(kv, 1, dim), share, axis=1).reshape(-1)

    def reduce(self, values: np.ndarray) -> np.ndarray:
        """[consumer columns] statistics -> [width]: the largest over the query heads that share a scale."""
        if self.heads is None:
            return values
        kv, share, dim = self.heads
        return values.reshape(kv, share, dim).max(axis=1).reshape(-1)


def _same(a: Slot, b: Slot) -> bool:
    return (a.root, a.offset, a.width) == (b.root, b.offset, b.width)


def _overlap(a: Slot, b: Slot) -> bool:
    return a.root == b.root and a.offset < b.offset + b.width and b.offset < a.offset + a.width


class _Program:
    """Who writes and who reads each activation of a builder's records."""

    def __init__(self, b: Builder):
        self.b, self.records = b, b._records

    def readers(self, slot: Slot, after: int) -> list[int]:
        """Records that read columns of `slot` between record `after` and the next one that overwrites it all."""
        found = []
        for i, r in enumerate(self.records[after + 1 :], after + 1):
            if any(_overlap(s, slot) for s in r.ins):
                found.append(i)
            if any(s.root == slot.root and s.offset <= slot.offset
                   and s.offset + s.width >= slot.offset + slot.width for s in r.out):  # fmt: skip
                break
        return found

    def writers(self, slot: Slot, before: int) -> list[int]:
        """Records before `before` that write any column of `slot`."""
        return [i for i, r in enumerate(self.records[:before]) if any(_overlap(s, slot) for s in r.out)]

    def pieces(self, slot: Slot, before: int) -> tuple[tuple[Piece, ...], str]:
        """The matrix rows that make `slot`, or why they do not make it alone."""
        out = []
        for i in self.writers(slot, before):
            r = self.records[i]
            if r.op != "linear":
                return (), f"record {i} ({r.op}) changes it on the way"
            y = r.out[0]
            first, last = max(y.offset, slot.offset), min(y.offset + y.width, slot.offset + slot.width)
            matrix = r.weights[MATRIX]
            assert matrix is not None
            out.append(Piece(matrix, first - y.offset, first - slot.offset, last - first, i))
            if self.uses(matrix) > 1:
                return (), f"matrix {self.b.tensors[matrix].name} has other uses"
        if sum(p.count for p in out) != slot.width:
            return (), "it is not made by matrices alone"
        return tuple(out), ""

    def uses(self, tensor: int) -> int:
        """How many operands name this tensor."""
        return sum(w == tensor for r in self.records for w in r.weights)

    def consumers(self, slot: Slot, after: int) -> tuple[tuple[int, ...], str]:
        """The matrices that read exactly `slot`, or why something else stands in the way."""
        out: list[int] = []
        for i in self.readers(slot, after):
            r = self.records[i]
            if r.op != "linear" or not _same(r.ins[0], slot):
                return (), f"record {i} ({r.op}) reads it too"
            matrix = r.weights[MATRIX]
            assert matrix is not None
            out.append(matrix)
        if not out:
            return (), "no matrix reads it"
        for m in out:
            if self.uses(m) > 1:
                return tuple(out), f"matrix {self.b.tensors[m].name} has other uses"
        return tuple(out), ""


def sites(b: Builder) -> list[Site]:
    """Every norm that feeds matrices, value projection and gated MLP of a program, in program order.

    A site with an `obstacle` is listed, so that nobody wonders where it went, but `Fold` refuses it: a matrix with
    a second use (the tied embedding), codes that arrived quantised, or an op between producer and consumer.
    """
    p = _Program(b)
    found = []
    for i, r in enumerate(p.records):
        if r.op in NORMS and not _same(r.out[0], r.ins[0]):
            consumers, why = p.consumers(r.out[0], i)
            if consumers:
                whole = not why and int(r.attrs["dim"]) != r.out[0].width
                why = "it norms each head by itself" if whole else why
                found.append(Site("norm", r.layer, r.out[0].width, (), consumers, i, None, why))
        elif r.op == "attend":
            put = next(q for q in p.records if q.op == "kv_put" and q.attrs["cache"] == r.attrs["cache"])
            v, (kv, _, dim, _) = put.ins[1], b.caches[int(r.attrs["cache"])]
            consumers, why = p.consumers(r.out[0], i)
            pieces, other = p.pieces(v, i)
            heads = (kv, r.out[0].width // (kv * dim), dim)
            found.append(Site("value", r.layer, v.width, pieces, consumers, i, heads, why or other))
        elif r.op == "glu":
            half = r.ins[0].width // 2
            consumers, why = p.consumers(r.out[0], i)
            pieces, other = p.pieces(r.ins[0].view(half, half), i)
            found.append(Site("up", r.layer, half, pieces, consumers, i, None, why or other))
    return [s if s.obstacle else replace(s, obstacle=_packed(b, s)) for s in found]


def _packed(b: Builder, site: Site) -> str:
    for i in (*(p.matrix for p in site.producers), *site.consumers):
        t = b.tensors[i]
        if isinstance(t, Matrix) and t.storage.packed:
            return f"matrix {t.name} arrived quantised"
    return ""


@dataclass
class _Changes:
    """Maps of one source tensor: of its columns, and of runs of its rows (first, count, map), in order."""

    columns: list[Map] = field(default_factory=list)
    rows: list[tuple[int, int, Map]] = field(default_factory=list)


class _Folded(Checkpoint):
    """A checkpoint with the changes made as rows are read. Changed tensors count as f32."""

    def __init__(self, inner: Checkpoint):
        self.inner = inner
        self.format, self.path, self.config = inner.format, inner.path, inner.config
        self.generation, self.chat_template = inner.generation, inner.chat_template
        self.tokenizer_source, self.ignored = inner.tokenizer_source, inner.ignored
        self.changes: dict[str, _Changes] = {}
        self.aliases: dict[str, str] = {}  # a second name for a tensor that two matrices read differently
        self._memo: tuple[str, int, int, np.ndarray] | None = None

    def changed(self, name: str) -> _Changes:
        """The changes of a tensor, to add to; what was remembered of earlier ones is forgotten."""
        self._memo = None
        return self.changes.setdefault(name, _Changes())

    def names(self) -> list[str]:
        """As stored."""
        return self.inner.names()

    def __contains__(self, name: object) -> bool:
        return name in self.aliases or name in self.inner

    def shape(self, name: str) -> tuple[int, ...]:
        """As stored: folding changes no shape."""
        return self.inner.shape(self.aliases.get(name, name))

    def dtype(self, name: str) -> str:
        """'f32' where something was folded in."""
        return "f32" if name in self.changes else self.inner.dtype(self.aliases.get(name, name))

    def sizes(self) -> list[tuple[str, int]]:
        """As stored."""
        return self.inner.sizes()

    def digest(self) -> str:
        """Of the source, unchanged."""
        return self.inner.digest()

    def close(self) -> None:
        """Close the source."""
        self.inner.close()

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray | Packed:
        """Rows with all changes made."""
        stored = self.aliases.get(name, name)
        changes = self.changes.get(name)
        if changes is None:
            return self.inner.read_rows(stored, start, stop)
        check_rows(name, self.shape(name), start, stop)
        a, z = start, stop
        for first, count, m in changes.rows:  # whole spans of every map that mixes rows
            if m.span > 1 and a < first + count and z > first:
                a = min(a, first + (max(a, first) - first) // m.span * m.span)
                z = max(z, first - (first - min(z, first + count)) // m.span * m.span)
        if (a, z) == (start, stop):
            return self._changed_rows(stored, changes, a, z)
        # Neighbouring blocks of rows usually need the same span: keep the last one.
        if self._memo is None or self._memo[0] != name or not self._memo[1] <= a <= z <= self._memo[2]:
            self._memo = (name, a, z, self._changed_rows(stored, changes, a, z))
        base = self._memo[1]
        return self._memo[3][start - base : stop - base].copy()

    def _changed_rows(self, stored: str, changes: _Changes, a: int, z: int) -> np.ndarray:
        rows = self.inner.read_rows(stored, a, z)
        assert isinstance(rows, np.ndarray)
        w = rows.astype(np.float64)
        for m in changes.columns:
            w = m.apply(w, 0)
        for first, count, m in changes.rows:
            lo, hi = max(a, first), min(z, first + count)
            if lo < hi:
                w[lo - a : hi - a] = m.apply(w[lo - a : hi - a].T, lo - first).T
        return w.astype(np.float32)


class Fold:
    """Changes to a builder's program that leave its function as it is, up to rounding.

    Several may be made, in any order, at the same site too: a rotation and then scales, say. The sites are found
    once, by the first look at the program.
    """

    def __init__(self, b: Builder):
        self.b = b
        self.sites = sites(b)
        if not isinstance(b.checkpoint, _Folded):
            b.checkpoint = _Folded(b.checkpoint)
        self._checkpoint = b.checkpoint

    def scale(self, site: Site, s: np.ndarray) -> None:
        """Divide what the site's producer makes by s[width] and multiply its consumers' columns by it.

        Raises UsageError for a site with an obstacle, or scales that are not finite and positive or too few.
        """
        if site.obstacle:
            raise UsageError(f"nothing can be folded into this {site.kind} site: {site.obstacle}")
        s = np.asarray(s, np.float64)
        if s.shape != (site.width,) or not (np.isfinite(s).all() and (s > 0).all()):
            raise UsageError(f"a {site.kind} site of width {site.width} takes as many positive finite scales")
        if site.kind == "norm":
            for operand in range(len(self.b._records[site.record].weights)):  # LAYERNORM's bias too
                self.map_vector(site.record, operand, Scale(1 / s))
        for piece in site.producers:
            self.map_rows(piece, Scale(1 / s[piece.offset : piece.offset + piece.count]))
        for m in dict.fromkeys(site.consumers):
            self.map_columns(m, Scale(site.columns(s)))

    def map_columns(self, matrix: int, m: Map) -> None:
        """Apply a map to the input side of a matrix: every row goes through it."""
        for name in self._matrix(matrix).sources:
            self._checkpoint.changed(name).columns.append(m)

    def map_rows(self, piece: Piece, m: Map) -> None:
        """Apply a map to the output side of some rows, and to the same entries of their bias."""
        base = 0
        for name in self._matrix(piece.matrix).sources:
            count = self._checkpoint.shape(name)[0]
            if base <= piece.first and piece.first + piece.count <= base + count:
                self._checkpoint.changed(name).rows.append((piece.first - base, piece.count, m))
                break
            base += count
        else:
            raise UsageError(f"rows of {self._matrix(piece.matrix).name} span two tensors of the checkpoint")
        self.map_vector(piece.record, BIAS, m, piece.first, piece.count)

    def map_vector(self, record: int, operand: int, m: Map, first: int = 0, count: int | None = None) -> None:
        """Apply a map to entries first .. first + count of a record's vector operand, if it has one."""
        weights = self.b._records[record].weights
        if operand >= len(weights) or weights[operand] is None:
            return
        vector = self.b.tensors[weights[operand]]  # type: ignore[index]
        assert isinstance(vector, Vector)
        values = vector.values.astype(np.float64)
        stop = len(values) if count is None else first + count
        values[first:stop] = m.apply(values[first:stop], 0)
        self.set_vector(record, operand, vector.name, values)

    def set_vector(self, record: int, operand: int, name: str, values: np.ndarray) -> None:
        """Give a record its own vector operand: equal vectors were one until now, changed ones differ."""
        r, vector = self.b._records[record], Vector(name, values.astype(np.float32))
        while len(r.weights) <= operand:
            r.weights.append(None)
        old = r.weights[operand]
        if old is not None and _Program(self.b).uses(old) == 1:
            self.b.tensors[old] = replace(vector, name=self.b.tensors[old].name)
            return
        if name in {t.name for t in self.b.tensors}:
            vector = replace(vector, name=f"{name}.{record}")
        r.weights[operand] = len(self.b.tensors)
        self.b.tensors.append(vector)

    def own_matrix(self, record: int, name: str) -> int:
        """Give a LINEAR its own copy of a matrix that others use too: `name` becomes its name in the file.

        Returns the new tensor's index; the file grows by the matrix. Without other uses nothing happens.
        """
        r = self.b._records[record]
        old = r.weights[MATRIX]
        assert old is not None
        if _Program(self.b).uses(old) == 1:
            return old
        t = self._matrix(old)
        sources = tuple(f"{s}@{name}" for s in t.sources)
        self._checkpoint.aliases.update(zip(sources, t.sources))
        r.weights[MATRIX] = len(self.b.tensors)
        self.b.tensors.append(replace(t, name=name, sources=sources))
        return len(self.b.tensors) - 1

    def insert(self, before: int, record: _Pending) -> None:
        """Put one more record into the program; sites found earlier number records without it."""
        self.b._records.insert(before, record)

    def _matrix(self, index: int) -> Matrix:
        t = self.b.tensors[index]
        assert isinstance(t, Matrix)
        return t
