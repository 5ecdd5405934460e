"""Embeddings: what a model makes of a text just before its logits, pooled over positions and of length 1.

A program ends in the matrix that makes the logits; the vectors that meet it are the normed states of the last layer.
Where weights were rotated they are rotated too, which changes no angle between two embeddings of one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from halfbyte.formats.errors import HalfbyteError, UsageError
from halfbyte.runtime.backends.backend import Step
from halfbyte.runtime.model import CHUNK, Model

POOLINGS = ("mean", "last")


def embed(
    model: Model,
    texts: Sequence[Sequence[int]],
    pooling: str = "mean",
    between: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """float32[len(texts), width]: the embeddings of sequences of token ids, each of L2 norm 1.

    pooling  'mean' over all positions but that of BOS, whose state is the same for every text and much longer than the
             others; 'last' takes the last position
    between  called before every step; what it raises ends the work

    An embedding does not depend on the other texts. Raises UsageError for an empty text, one that is longer than the
    context, or ids out of range.
    """
    if pooling not in POOLINGS:
        raise UsageError(f"unknown pooling {pooling!r}; there are {', '.join(POOLINGS)}")
    for ids in texts:
        if not 0 < len(ids) <= model.context_length:
            raise UsageError(f"a text has {len(ids)} tokens; 1 to {model.context_length} are possible")
    found = np.zeros((len(texts), model.width), np.float32)
    for group in _groups(texts):
        if len(group) == 1:
            _embed_one(model, texts[group[0]], pooling, found[group[0]], between)
        else:
            _embed_together(model, [texts[i] for i in group], pooling, [found[i] for i in group], between)
    norms = np.linalg.norm(found.astype(np.float64), axis=1, keepdims=True)
    if not np.isfinite(norms).all():
        raise HalfbyteError("the model's output is not finite; run halfbyte check on the file")
    return (found / np.where(norms > 0, norms, 1)).astype(np.float32)


def _groups(texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of texts that fit one step together; a long text is alone."""
    group: list[int] = []
    rows = 0
    for i, ids in enumerate(texts):
        if group and rows + len(ids) > CHUNK:
            yield group
            group, rows = [], 0
        group.append(i)
        rows += len(ids)
    if group:
        yield group


def _embed_together(
    model: Model, texts: list[Sequence[int]], pooling: str, out: list[np.ndarray], between: Callable[[], None]
) -> None:
    lengths = [len(ids) for ids in texts]
    kvs = [model.new_kv() for _ in texts]
    for kv, n in zip(kvs, lengths):
        kv.reserve(n, 0)
    between()
    rows = np.arange(sum(lengths), dtype=np.int32)
    ids = np.concatenate([np.asarray(t, np.int32) for t in texts])
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    sessions = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)
    states = model.states(Step(ids, positions, sessions, rows, kvs))
    at = 0
    for text, n, row in zip(texts, lengths, out):
        row[:] = _sum(model, text, states[at : at + n], 0, pooling)
        at += n


def _embed_one(
    model: Model, text: Sequence[int], pooling: str, out: np.ndarray, between: Callable[[], None]
) -> None:
    kv = model.new_kv()
    for at in range(0, len(text), CHUNK):
        between()
        ids = np.asarray(text[at : at + CHUNK], np.int32)
        n = len(ids)
        kv.reserve(at + n, at)
        rows = np.arange(n, dtype=np.int32)
        states = model.states(Step(ids, rows + np.int32(at), np.zeros(n, np.int32), rows, [kv]))
        part = _sum(model, text, states, at, pooling)
        out[:] = part if pooling == "last" else out + part


def _sum(model: Model, text: Sequence[int], states: np.ndarray, at: int, pooling: str) -> np.ndarray:
    """What states of positions from `at` on add to an embedding that is not yet of length 1."""
    if pooling == "last":
        return states[-1]
    bos = at == 0 and len(text) > 1 and model.has_tokenizer and text[0] == model.tokenizer.bos_id
    return states[int(bos) :].sum(axis=0, dtype=np.float64).astype(np.float32)
