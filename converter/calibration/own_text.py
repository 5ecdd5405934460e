"""What a float model writes itself.

What a model was trained on is unknown, but it can tell: for a narrow model its own text is worth far more than
anyone's mix.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

LENGTH = 512  # tokens of a document, at most


def own_text(path: Path, tokens: int, seed: int, streams: int) -> str:
    """The text of `own_documents` with a blank line between them, as texts are joined that are calibrated on."""
    from halfbyte.runtime.model import load

    read = load(path, policy="f32").tokenizer.decode
    texts = (read(ids).strip() for ids in own_documents(path, tokens, seed, streams))
    return "\n\n".join(filter(None, texts))


def own_documents(path: Path, tokens: int, seed: int, streams: int) -> list[list[int]]:
    """Documents that the model of a float file samples at temperature 1, without BOS and end token.

    tokens: of them all; streams: documents written at once. Each starts from nothing but BOS, as those did that the
    model was trained on. None for a tokenizer without BOS and end token.
    """
    from halfbyte.runtime.backends.backend import Step
    from halfbyte.runtime.model import load

    model = load(path, policy="f32", kv="f32")
    start = model.tokenizer.bos_id
    start = next(iter(model.eos_ids), None) if start is None else start
    if start is None:
        return []
    ends = {start, *model.eos_ids}
    length, steps = min(LENGTH, model.context_length), -(-tokens // streams)
    random = np.random.default_rng(seed)
    rows = np.arange(streams, dtype=np.int32)
    written, kvs = [[start] for _ in rows], [model.new_kv() for _ in rows]
    documents = []
    for step in range(steps):
        positions = np.array([len(s) - 1 for s in written], np.int32)
        for kv, position in zip(kvs, positions.tolist()):
            kv.reserve(position + 1, position)
        ids = np.array([s[-1] for s in written], np.int32)
        logits = model.run(Step(ids, positions, rows, rows, kvs))
        for i, token in enumerate((logits + random.gumbel(size=logits.shape)).argmax(axis=1).tolist()):
            written[i] += [] if token in ends else [token]
            if token in ends or len(written[i]) == length or step == steps - 1:
                documents.append(written[i][1:])
                written[i], kvs[i] = [start], model.new_kv()
    return documents
