"""The cases of every op: one function an op, found by the op's name, so an op without cases fails a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from programs import F32, MIN_IDS, Tiny, code_matrix, exact_activations, float_tensor

from halfbyte.formats.encodings import BY_NAME as BY_ENCODING
from halfbyte.formats.encodings import K256, MATRIX_ENCODINGS
from halfbyte.formats.ops import BY_NAME, FUNCTIONS, OPS, PARAMETRIC
from halfbyte.formats.program import PICKS


@dataclass(frozen=True)
class Case:
    """One tiny program. `covers` names the function or encoding under test.

    tolerance: 'exact' bit-identical, 'ulp' elementwise, 'integer' i8g32 sums, 'sum' f32 sums.
    """

    op: str
    name: str
    build: Callable[[Tiny], None]
    variant: str = "plain"
    covers: str = ""
    tolerance: str = "ulp"

    def __str__(self) -> str:
        return f"{self.op}-{self.name}-{self.variant}"

    def tiny(self) -> Tiny:
        """The built program; the seed is the case's own name."""
        tiny = Tiny(sum(map(ord, str(self))), self.variant)
        self.build(tiny)
        return tiny


Cases = Iterator[Case]
TOKEN_ONLY = ("embed", "rope", "kv_put", "attend", "pick")


def variants(
    op: str, name: str, build: Callable[[Tiny], None], covers: str = "", tolerance: str = "ulp"
) -> Cases:
    """Every placement of operands that the op allows."""
    places = ["plain", "view"]
    if BY_NAME[op].in_place:
        places.append("inplace")
    if op not in TOKEN_ONLY:
        places.append("picked")
    for place in places:
        yield Case(op, name, build, place, covers, tolerance)


# (group, scale type) of the encodings whose tensors choose them; every group shape and scale type occurs.
GROUPS = {
    "i8": [(0, "f32"), (32, "f16"), (4, "bf16"), (64, "f32"), (16, "k256")],
    "i4": [(32, "f16"), (128, "bf16"), (0, "f16"), (8, "f32"), (32, "k256")],
    "a8": [(32, "f16"), (0, "f32"), (16, "bf16"), (16, "k256")],
    "a4": [(32, "f16"), (64, "f32"), (8, "f16"), (0, "bf16"), (32, "k256")],
    "z8": [(128, "f16"), (0, "bf16"), (4, "f32")],
    "z4": [(128, "f16"), (32, "bf16"), (16, "f32"), (0, "f16")],
    "i2": [(64, "f16"), (0, "f32"), (4, "bf16"), (16, "k256")],
    "i3": [(128, "f16"), (8, "f32"), (32, "k256"), (0, "bf16")],
    "i5": [(32, "bf16"), (0, "f16"), (16, "k256"), (256, "f32")],
    "i6": [(256, "f16"), (4, "f32"), (16, "k256"), (0, "bf16")],
    "a2": [(32, "f16"), (64, "bf16"), (0, "f32"), (16, "k256")],
    "a5": [(8, "f16"), (128, "f32"), (32, "k256"), (0, "bf16")],
    "z2": [(64, "f16"), (0, "bf16"), (4, "f32")],
    "z3": [(32, "f16"), (128, "bf16"), (16, "f32"), (0, "f16")],
    "n4": [(32, "f16"), (16, "f32"), (32, "k256"), (0, "bf16")],
    "m4": [(32, "bf16"), (128, "f16"), (0, "f32"), (16, "k256")],
    "f8e4m3": [(0, "f32"), (128, "bf16"), (32, "f16"), (4, "f16")],
    "f8e5m2": [(0, "f16"), (64, "f32"), (8, "bf16")],
}
SHAPES = [(48, 64), (19, 44), (1, 33), (130, 160)]  # rows, cols: whole tiles, tails, one row, several panels
WIDE = [(19, 300), (33, 512)]  # where 256 columns share something
FLOATING = tuple(e.name for e in MATRIX_ENCODINGS if not e.is_integer)  # no integer dot products


def matrices() -> Iterator[tuple[str, int, str, int, int]]:
    """(encoding, group, scale type, rows, cols): every encoding, group and scale type; shapes in turn."""
    i = 0
    for e in MATRIX_ENCODINGS:
        for group, scale_type in GROUPS.get(e.name, [(0, "")] * 3):
            shapes = WIDE if scale_type == K256 or group == 256 else SHAPES
            for step in range(2 if e.name in GROUPS else 1):
                yield (e.name, group, scale_type, *shapes[(i + step) % len(shapes)])
            i += 1


def _matrix(
    tiny: Tiny, encoding: str, group: int, scale: str, rows: int, cols: int, exact: bool = False
) -> int:
    if BY_ENCODING[encoding].is_float:
        return tiny.tensor(float_tensor("matrix", tiny.values(rows, cols), encoding))
    return tiny.tensor(code_matrix("matrix", encoding, rows, cols, tiny.rng, group, scale, exact))


def embed() -> Cases:
    """Every encoding; the table is the tensor under test."""
    for encoding, group, scale, _, cols in matrices():

        def build(t: Tiny, encoding=encoding, group=group, scale=scale, cols=cols) -> None:
            table = _matrix(t, encoding, group, scale, max(MIN_IDS, cols) + 3, cols)
            t.test("embed", [t.output(cols)], [], (table,))

        yield from variants("embed", f"{encoding}.{group}.{scale}.{cols}", build, encoding, "exact")


def pick() -> Cases:
    """A gather of rows."""
    for width in (1, 64, 77):

        def build(t: Tiny, width=width) -> None:
            x = t.input(width)
            t.test("pick", [t.output(width, rows=PICKS)], [x])

        yield from variants("pick", str(width), build, tolerance="exact")


def rmsnorm() -> Cases:
    """Whole rows and runs (per-head norms), with and without weight."""
    for width, dim in ((64, 64), (96, 16), (77, 77), (1, 1), (66, 33)):
        for weighted in (True, False):

            def build(t: Tiny, width=width, dim=dim, weighted=weighted) -> None:
                x = t.input(width)
                w = t.vector(t.rng.normal(1, 0.3, dim)) if weighted else None
                t.test("rmsnorm", [t.output(width, x)], [x], (w,), eps=1e-5, dim=dim)

            yield from variants("rmsnorm", f"{width}.{dim}.{'w' if weighted else 'plain'}", build)


def layernorm() -> Cases:
    """Whole rows and runs; each of weight and bias present or not."""
    for width, dim, parts in ((64, 64, "wb"), (96, 16, "w"), (77, 77, "b"), (66, 33, "")):

        def build(t: Tiny, width=width, dim=dim, parts=parts) -> None:
            x = t.input(width)
            w = t.vector(t.rng.normal(1, 0.3, dim)) if "w" in parts else None
            b = t.vector(t.rng.normal(0, 0.3, dim)) if "b" in parts else None
            t.test("layernorm", [t.output(width, x)], [x], (w, b), eps=1e-6, dim=dim)

        yield from variants("layernorm", f"{width}.{dim}.{parts or 'plain'}", build)


def linear() -> Cases:
    """Every encoding with and without bias; and once more with data for which every sum is exact."""
    for i, (encoding, group, scale, rows, cols) in enumerate(matrices()):
        for exact in (False, True):
            if exact and encoding in FLOATING:
                continue

            def build(
                t: Tiny, encoding=encoding, group=group, scale=scale, rows=rows, cols=cols, exact=exact, i=i
            ) -> None:
                ids = max(MIN_IDS, rows)
                x = t.input(cols, exact_activations(t.rng, ids, cols) if exact else None)
                m = _matrix(t, encoding, group, scale, rows, cols, exact)
                b = t.vector(t.rng.normal(size=rows)) if i % 2 else None
                t.test("linear", [t.output(rows)], [x], (m, b))

            name = f"{encoding}.{group}.{scale}.{rows}x{cols}{'.exact' if exact else ''}"
            kinds = variants("linear", name, build, encoding, "exact" if exact else "integer")
            yield from (c for c in kinds if not exact or c.variant == "plain")


def add() -> Cases:
    """Two inputs, a scale of one and another."""
    for width, scale in ((64, 1.0), (77, -0.4)):

        def build(t: Tiny, width=width, scale=scale) -> None:
            a, b = t.input(width), t.input(width)
            t.test("add", [t.output(width, a)], [a, b], scale=scale)

        yield from variants("add", f"{width}.{scale}", build)


def mul() -> Cases:
    """Two inputs."""
    for width in (64, 77):

        def build(t: Tiny, width=width) -> None:
            a, b = t.input(width), t.input(width)
            t.test("mul", [t.output(width, a)], [a, b])

        yield from variants("mul", str(width), build)


def unary() -> Cases:
    """Every function, also far out on its tails."""
    for name, number in FUNCTIONS.items():
        for spread in (1.0, 30.0):

            def build(t: Tiny, number=number, spread=spread) -> None:
                x = t.input(77, t.values(128, 77) * F32(spread))
                t.test("unary", [t.output(77, x)], [x], function=number, p=2.5)

            yield from variants("unary", f"{name}.{spread:g}", build, name)


def glu() -> Cases:
    """Every function without a parameter."""
    for name, number in FUNCTIONS.items():
        if name in PARAMETRIC:
            continue

        def build(t: Tiny, number=number) -> None:
            x = t.input(2 * 77)
            t.test("glu", [t.output(77)], [x], function=number)

        yield from variants("glu", name, build, name)


def rope() -> Cases:
    """Whole and partial rotation, one and several heads, a magnitude scale."""
    for head, n, heads, mscale in ((16, 8, 4, 1.0), (24, 6, 2, 1.0), (80, 16, 1, 0.8), (10, 5, 3, 1.2)):

        def build(t: Tiny, head=head, n=n, heads=heads, mscale=mscale) -> None:
            x = t.input(head * heads)
            freq = t.vector(10000.0 ** -(np.arange(n) / n))
            t.test("rope", [t.output(head * heads, x)], [x], (freq,), head_dim=head, mscale=mscale)

        yield from variants("rope", f"{head}.{n}x{heads}", build)


# kv_heads, share (query heads a kv head), k_dim, v_dim, window, softcap
ATTENTION = [
    (2, 1, 16, 16, 0, 0.0),
    (2, 3, 16, 16, 0, 0.0),
    (1, 4, 32, 24, 0, 0.0),
    (3, 2, 20, 9, 5, 0.0),
    (1, 1, 64, 64, 1, 0.0),
    (2, 2, 16, 16, 0, 8.0),
    (1, 7, 40, 40, 12, 3.0),
    (2, 2, 128, 128, 0, 0.0),
]


def attend() -> Cases:
    """Grouped heads, unequal dims, windows, score caps."""
    for kv_heads, share, k_dim, v_dim, window, softcap in ATTENTION:

        def build(
            t: Tiny, kv_heads=kv_heads, share=share, k_dim=k_dim, v_dim=v_dim, window=window, softcap=softcap
        ) -> None:
            heads = kv_heads * share
            q, k, v = (
                t.input(n, ids=heads * v_dim) for n in (heads * k_dim, kv_heads * k_dim, kv_heads * v_dim)
            )
            t.caches.append((kv_heads, k_dim, v_dim, window))
            t.emit("kv_put", [], [k, v], cache=0)
            t.test("attend", [t.output(heads * v_dim)], [q], cache=0, scale=k_dim**-0.5, softcap=softcap)

        name = f"{kv_heads}x{share}.{k_dim}.{v_dim}.w{window}.c{softcap:g}"
        yield from variants("attend", name, build, tolerance="sum")


def kv_put() -> Cases:
    """Two caches, so that ignoring the number is found; values round, overflow and underflow f16."""
    for kv_heads, k_dim, v_dim in ((2, 16, 16), (3, 5, 9), (1, 32, 24)):

        def build(t: Tiny, kv_heads=kv_heads, k_dim=k_dim, v_dim=v_dim) -> None:
            for cache in range(2):
                size = F32(10.0) ** t.rng.integers(-8, 6, (MIN_IDS, 1)).astype(F32)
                k = t.input(kv_heads * k_dim, t.values(MIN_IDS, kv_heads * k_dim) * size)
                v = t.input(kv_heads * v_dim, t.values(MIN_IDS, kv_heads * v_dim) * size)
                t.caches.append((kv_heads, k_dim, v_dim, 0))
                t.test("kv_put", [], [k, v], cache=cache)
            t.finish(v)

        yield from variants("kv_put", f"{kv_heads}.{k_dim}.{v_dim}", build, tolerance="exact")


def gather() -> Cases:
    """Permutations, columns left out, columns repeated, one column."""
    for width, count in ((64, 64), (77, 40), (20, 131), (5, 1)):

        def build(t: Tiny, width=width, count=count) -> None:
            x = t.input(width, ids=max(MIN_IDS, count))
            index = t.rng.permutation(width)[:count] if count <= width else t.rng.integers(0, width, count)
            index[-1] = width - 1
            t.test("gather", [t.output(count)], [x], (t.index(index),))

        yield from variants("gather", f"{width}.{count}", build, tolerance="exact")


def hadamard() -> Cases:
    """Whole rows and runs, from one column to many."""
    for width, dim in ((64, 64), (96, 32), (384, 128), (1024, 1024), (36, 4), (34, 2), (7, 1)):

        def build(t: Tiny, width=width, dim=dim) -> None:
            x = t.input(width, ids=max(MIN_IDS, width))
            t.test("hadamard", [t.output(width, x)], [x], dim=dim)

        yield from variants("hadamard", f"{width}.{dim}", build)


CASES: dict[str, list[Case]] = {
    op.name: list(globals()[op.name]()) if op.name in globals() else [] for op in OPS
}
ALL = [case for cases in CASES.values() for case in cases]
