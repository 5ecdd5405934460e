"""Model files talk to this: it turns ops on named checkpoint tensors into a program and a tensor list.

Nothing is read from the checkpoint here except small vectors; matrices are only described, and
`assemble` streams them. Slots are handed out without limit while building and shared afterwards, by
lifetime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from halfbyte.converter.checkpoints.checkpoint import Checkpoint, Packed
from halfbyte.converter.config import Config
from halfbyte.converter.recipe import Recipe, Storage
from halfbyte.converter.rope import Rope
from halfbyte.formats import program
from halfbyte.formats.encodings import BY_NAME, parameters_are_valid
from halfbyte.formats.errors import CheckpointError
from halfbyte.formats.ops import FUNCTIONS


@dataclass(frozen=True)
class Slot:
    """An activation value while building: columns offset .. offset + width of a root."""

    root: int
    offset: int
    width: int
    rows: int = program.TOKENS

    def view(self, offset: int, width: int) -> Slot:
        """Some columns of this slot."""
        assert offset >= 0 and offset + width <= self.width
        return Slot(self.root, self.offset + offset, width, self.rows)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of the file: checkpoint matrices stacked by rows."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, int]
    storage: Storage


@dataclass(frozen=True)
class Vector:
    """A small tensor of the file: float32, or uint32 column numbers."""

    name: str
    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """[n]"""
        return self.values.shape


@dataclass
class _Pending:
    op: str
    layer: int
    out: list[Slot]
    ins: list[Slot]
    weights: list[int | None]
    attrs: dict[str, float | int] = field(default_factory=dict)


class Builder:
    """Collects a program. Every method that computes something returns its output slot."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, context: int | None = None):
        self.checkpoint, self.recipe, self.context = checkpoint, recipe, context
        values = dict(checkpoint.config)
        if context is not None:
            values["halfbyte_context"] = context
        self.config = Config(values)
        self.layer = program.NO_LAYER
        self.layers = self.config.integer("num_hidden_layers")
        self.hidden = self.config.integer("hidden_size")
        self.vocab = self.config.integer("vocab_size")
        self.context_limit = context or self.config.integer("max_position_embeddings", 2048)
        self.tensors: list[Matrix | Vector] = []
        self.caches: list[tuple[int, int, int, int]] = []
        self.used: set[str] = set()
        self._index: dict[object, int] = {}
        self._roots: list[tuple[int, int]] = []  # (width, row kind)
        self._records: list[_Pending] = []
        self._storages: dict[str, Storage] = {}
        self._orders: dict[str, bytes | None] = {}

    # ---- values ---------------------------------------------------------------------------------

    def slot(self, width: int, rows: int = program.TOKENS) -> Slot:
        """A fresh activation of `width` columns."""
        self._roots.append((width, rows))
        return Slot(len(self._roots) - 1, 0, width, rows)

    def _emit(
        self,
        op: str,
        out: Sequence[Slot],
        ins: Sequence[Slot],
        weights: Sequence[int | None] = (),
        **attrs: float | int,
    ) -> None:
        self._records.append(_Pending(op, self.layer, list(out), list(ins), list(weights), attrs))

    # ---- tensors --------------------------------------------------------------------------------

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.checkpoint:
            raise CheckpointError(f"tensor {name} is missing from the checkpoint")
        return tuple(self.checkpoint.shape(name))

    def _storage(self, name: str) -> Storage:
        self._shape(name)
        if name not in self._storages:
            dtype, group, scale_type = self.checkpoint.dtype(name), 0, ""
            if dtype not in ("f32", "f16", "bf16", "f64"):
                first = self.checkpoint.read_rows(name, 0, 1)
                assert isinstance(first, Packed)
                group, scale_type = first.group, first.scale_type
                valid = parameters_are_valid(BY_NAME[dtype], group, scale_type)
                if not valid and self.recipe.name == "keep":
                    raise CheckpointError(
                        f"tensor {name} has groups of {group} columns, which {dtype} cannot have;"
                        " choose --recipe q8"
                    )
            self._storages[name] = self.recipe.storage(dtype, group, scale_type)
        return self._storages[name]

    def _input_order(self, name: str) -> bytes | None:
        """Input columns in the order in which a matrix is stored, as uint32; None if as they are."""
        if name not in self._orders:
            order = self.checkpoint.input_order(name)
            self._orders[name] = None if order is None else order.astype(np.uint32).tobytes()
        return self._orders[name]

    def _layout(self, name: str) -> tuple[Storage, bytes | None]:
        """Matrices alike in this can be one matrix."""
        return self._storage(name), self._input_order(name)

    def _matrix(self, sources: Sequence[str], rows: int | None, cols: int, label: str) -> int:
        total = 0
        for name in sources:
            shape = self._shape(name)
            if len(shape) != 2 or shape[1] != cols:
                raise CheckpointError(f"tensor {name} is {list(shape)}, expected [*, {cols}]")
            total += shape[0]
        if rows is not None and total != rows:
            raise CheckpointError(f"tensor {' + '.join(sources)} has {total} rows, expected {rows}")
        key = tuple(sources)
        if key not in self._index:
            self._index[key] = len(self.tensors)
            self.tensors.append(Matrix(label, key, (total, cols), self._storage(sources[0]).of_width(cols)))
            self.used.update(sources)
        return self._index[key]

    def vector(self, label: str, values: np.ndarray) -> int:
        """A float32 (or uint32) vector of the file; equal ones are stored once."""
        if values.dtype != np.uint32:
            values = np.ascontiguousarray(values, np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(f"tensor {label} holds values that are not finite")
        key = (values.dtype.str, values.tobytes())
        if key not in self._index:
            self._index[key] = len(self.tensors)
            self.tensors.append(Vector(label, values))
        return self._index[key]

    def read_vector(self, name: str, n: int) -> np.ndarray:
        """A small tensor of the checkpoint as float32[n]."""
        shape = self._shape(name)
        if shape != (n,):
            raise CheckpointError(f"tensor {name} is {list(shape)}, expected [{n}]")
        self.used.add(name)
        values = self.checkpoint.read(name)
        assert isinstance(values, np.ndarray)
        return values.astype(np.float32)

    # ---- ops ------------------------------------------------------------------------------------

    def embed(self, name: str = "model.embed_tokens.weight") -> Slot:
        """Rows of the embedding table."""
        y = self.slot(self.hidden)
        self._emit("embed", [y], [], [self._matrix([name], self.vocab, self.hidden, "embed")])
        return y

    def pick(self, x: Slot) -> Slot:
        """The rows whose logits are wanted."""
        y = self.slot(x.width, program.PICKS)
        self._emit("pick", [y], [x])
        return y

    def rmsnorm(self, x: Slot, name: str, eps: float, *, dim: int | None = None, plus_one: bool = False,
                in_place: bool = False) -> Slot:  # fmt: skip
        """RMS norm of runs of `dim` columns (default: all); plus_one folds Gemma's (1 + w) into the weight."""
        dim = dim or x.width
        w = self.read_vector(name, dim)
        y = x if in_place else self.slot(x.width, x.rows)
        index = self.vector(self.label(name), w + np.float32(1) if plus_one else w)
        self._emit("rmsnorm", [y], [x], [index], eps=eps, dim=dim)
        return y

    def linear(
        self, x: Slot, names: Sequence[str], rows: Sequence[int], label: str, bias: bool = False
    ) -> Slot:
        """x times the matrices `names` stacked by rows, of `rows[i]` rows each; merged where they are stored alike.

        bias adds `<prefix>.bias` for each `<prefix>.weight`. Where columns are stored in an order of their own,
        x is gathered into it first, once for all matrices that share it.
        """
        y = self.slot(sum(rows), x.rows)
        gathered: dict[bytes | None, Slot] = {None: x}
        i = offset = 0
        while i < len(names):
            j = i + 1
            storage, order = self._layout(names[i])
            while j < len(names) and self._layout(names[j]) == (storage, order):
                j += 1
            part, width = names[i:j], sum(rows[i:j])
            own = label if len(part) == len(names) else self.label(part[0])
            m = self._matrix(part, width, x.width, own)
            if order not in gathered:
                gathered[order] = self.gather(x, np.frombuffer(order or b"", np.uint32), own + ".order")
            b = None
            if bias:
                values = [
                    self.read_vector(n.removesuffix("weight") + "bias", r) for n, r in zip(part, rows[i:j])
                ]
                b = self.vector(own + ".bias", np.concatenate(values))
            self._emit("linear", [y.view(offset, width)], [gathered[order]], [m, b])
            i, offset = j, offset + width
        return y

    def gather(self, x: Slot, columns: np.ndarray, label: str) -> Slot:
        """Columns `columns` (uint32) of x, in that order."""
        y = self.slot(len(columns), x.rows)
        self._emit("gather", [y], [x], [self.vector(label, columns)])
        return y

    def add(self, a: Slot, b: Slot, scale: float = 1.0) -> Slot:
        """a + scale * b, in place of a."""
        self._emit("add", [a], [a, b], scale=scale)
        return a

    def unary(self, x: Slot, function: str, p: float = 0.0) -> Slot:
        """function(x; p), in place."""
        self._emit("unary", [x], [x], function=FUNCTIONS[function], p=p)
        return x

    def glu(self, x: Slot, function: str) -> Slot:
        """[gate | up] -> function(gate) * up"""
        y = self.slot(x.width // 2, x.rows)
        self._emit("glu", [y], [x], function=FUNCTIONS[function])
        return y

    def rope(self, x: Slot, table: Rope, head_dim: int) -> Slot:
        """Rotate every head of x in place."""
        tables = sum(t.name.startswith("rope") for t in self.tensors)
        w = self.vector(f"rope.{tables}", table.inv_freq)
        self._emit("rope", [x], [x], [w], head_dim=head_dim, mscale=table.mscale)
        if table.context is not None:
            self.context_limit = min(self.context_limit, table.context)
        return x

    def attend(self, q: Slot, k: Slot, v: Slot, *, kv_heads: int, scale: float, window: int = 0,
               softcap: float = 0.0) -> Slot:  # fmt: skip
        """Store k and v, then attend with q. Heads follow from the widths."""
        cache = len(self.caches)
        self.caches.append((kv_heads, k.width // kv_heads, v.width // kv_heads, window))
        self._emit("kv_put", [], [k, v], cache=cache)
        y = self.slot(q.width // (k.width // kv_heads) * (v.width // kv_heads))
        self._emit("attend", [y], [q], cache=cache, scale=scale, softcap=softcap)
        return y

    def label(self, name: str) -> str:
        """The file's name of a checkpoint tensor."""
        return name.removeprefix("model.").removesuffix(".weight")

    def each_layer(self) -> Iterator[tuple[int, str]]:
        """(layer number, tensor name prefix) of each layer; ops emitted meanwhile carry the number."""
        for i in range(self.layers):
            self.layer = i
            yield i, f"model.layers.{i}"
        self.layer = program.NO_LAYER

    # ---- the result -----------------------------------------------------------------------------

    def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(records, slots, caches) with slots shared by lifetime."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for i, r in enumerate(self._records):
            for s in (*r.out, *r.ins):
                first.setdefault(s.root, i)
                last[s.root] = i
        physical: dict[int, int] = {}
        bases: list[tuple[int, int]] = []
        busy: dict[int, int] = {}  # base -> the record after which it is free
        for root in sorted(first, key=first.__getitem__):
            kind = self._roots[root]
            free = [b for b, end in busy.items() if end < first[root] and bases[b] == kind]
            base = free[0] if free else len(bases)
            if not free:
                bases.append(kind)
            busy[base], physical[root] = last[root], base
        slots = [(w, i, 0, rows) for i, (w, rows) in enumerate(bases)]
        views: dict[tuple[int, int, int], int] = {}

        def number(s: Slot) -> int:
            base = physical[s.root]
            if s.offset == 0 and s.width == bases[base][0]:
                return base
            key = (base, s.offset, s.width)
            if key not in views:
                views[key] = len(slots)
                slots.append((s.width, base, s.offset, s.rows))
            return views[key]

        records = [
            program.record(
                r.op, r.layer, [number(s) for s in r.out], [number(s) for s in r.ins], r.weights, **r.attrs
            )
            for r in self._records
        ]
        return (
            np.array(records, program.OP_DTYPE),
            np.array(slots, program.SLOT_DTYPE),
            np.array(self.caches, program.CACHE_DTYPE),
        )
