"""Rotations folded into the weights: outlier channels spread over all channels, the function unchanged.

R1 turns the residual stream, R2 the values of each head (SpinQuant, arXiv 2405.16406; QuaRot, arXiv 2404.00456);
both cost nothing at run time. `online` adds the one that cannot be folded away: a Hadamard transform of the input of
each MLP's down projection (QuaRot's R4) as an op of the program, its inverse folded into the matrix.

Rotations help where many columns share one scale: activations quantised a token at a time, weights of few bits in
long groups. Beside scales of 32 columns they gain little (benchmarks/LOG.md).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from halfbyte.converter.builder import Vector, _Pending
from halfbyte.converter.fold import MATRIX, Fold, Piece, Scale
from halfbyte.converter.quantizers._hadamard import Rotation
from halfbyte.formats.errors import UsageError

__all__ = ["Rotation", "heads", "online", "residual"]


def residual(fold: Fold, seed: int = 0) -> Rotation:
    """R1: rotate the residual stream. Norm weights move into the matrices that follow, whose columns turn with
    the embedding's columns and the rows of the matrices that write to the stream.

    A tied output embedding is stored apart from then on (their columns differ by the last norm's weight), so the
    file grows by one embedding table. Raises UsageError, before anything is changed, where a norm sits between a matrix
    and the stream (Gemma, OLMo 2) or takes means (LAYERNORM): no rotation passes those.
    """
    b = fold.b
    stream: set[int] = set()  # roots that hold the stream
    embeds, norms, writers = [], [], []
    for i, r in enumerate(b._records):
        if r.op == "embed":
            stream.add(r.out[0].root)
            embeds.append(i)
        elif r.op == "add" and r.ins[0].root in stream:
            found = [j for j, w in enumerate(b._records[:i]) if any(o.root == r.ins[1].root for o in w.out)]
            if any(b._records[j].op != "linear" for j in found):
                raise UsageError(
                    f"the residual stream cannot be rotated: record {i} adds what is no matrix's output"
                )
            writers += found
        elif r.ins and r.ins[0].root in stream and (r.op == "pick" or _is_scale(r)):
            stream.add(r.out[0].root)
        elif r.op == "rmsnorm" and r.ins[0].root in stream:
            norms.append(i)
        elif any(s.root in stream for s in r.ins):
            raise UsageError(f"the residual stream cannot be rotated: record {i} ({r.op}) reads it as it is")
    sites = {s.record: s for s in fold.sites if s.kind == "norm"}
    tied = "has other uses"
    for i in norms:
        if i not in sites or (sites[i].obstacle and tied not in sites[i].obstacle):
            raise UsageError(
                f"the residual stream cannot be rotated: record {i} (rmsnorm) feeds more than matrices"
            )
    width = b._records[embeds[0]].out[0].width
    turn = Rotation.random(width, seed)
    for i in norms:
        site, weight = sites[i], b.tensors[b._records[i].weights[0]]  # type: ignore[index]
        assert isinstance(weight, Vector)
        if site.obstacle:
            site = replace(site, consumers=tuple(_untied(fold, m) for m in site.consumers), obstacle="")
        gamma = weight.values.astype(np.float64)
        for m in dict.fromkeys(site.consumers):
            fold.map_columns(m, Scale(gamma))
            fold.map_columns(m, turn)
        fold.set_vector(i, 0, weight.name, np.ones(width))
    for i in embeds:
        fold.map_columns(b._records[i].weights[0], turn)  # type: ignore[arg-type]
    for i in dict.fromkeys(writers):
        r = b._records[i]
        matrix = r.weights[MATRIX]
        assert matrix is not None
        fold.map_rows(Piece(matrix, 0, 0, r.out[0].width, i), turn)
    return turn


def heads(fold: Fold, seed: int = 0) -> int:
    """R2: rotate the values of each head where `fold` found that values meet matrices only. Returns the sites."""
    done = 0
    for n, site in enumerate(s for s in fold.sites if s.kind == "value" and not s.obstacle):
        assert site.heads is not None
        kv, share, dim = site.heads
        one = Rotation.random(dim, seed + n)
        rows = Rotation(np.tile(one.signs, kv), one.order, one.power)
        for piece in site.producers:
            fold.map_rows(piece, replace(rows, signs=rows.signs[piece.offset : piece.offset + piece.count]))
        columns = replace(rows, signs=np.tile(one.signs, kv * share))
        for m in site.consumers:
            fold.map_columns(m, columns)
        done += 1
    return done


def online(fold: Fold) -> int:
    """R4: a HADAMARD op before each down projection, its transpose (which is itself) folded into the columns.

    Blocks are the largest power of two that divides the width: the op knows no others. Returns the ops added.
    Call it last: it moves the records that sites are numbered by.
    """
    b, done = fold.b, 0
    for site in [s for s in fold.sites if s.kind == "up" and not s.obstacle]:
        block = site.width & -site.width
        for m in site.consumers:
            fold.map_columns(m, Rotation(np.ones(site.width), 1, block))
        y = b._records[site.record + done].out[0]
        op = _Pending("hadamard", site.layer, [y], [y], [], {"dim": block})
        fold.insert(site.record + done + 1, op)
        done += 1
    return done


def _is_scale(record: _Pending) -> bool:
    from halfbyte.formats.ops import FUNCTIONS

    return record.op == "unary" and record.attrs["function"] == FUNCTIONS["scale"]


def _untied(fold: Fold, matrix: int) -> int:
    """The matrix as the output embedding alone uses it."""
    for i, r in enumerate(fold.b._records):
        if r.op == "linear" and r.weights[MATRIX] == matrix:
            return fold.own_matrix(i, "lm_head")
    return matrix
