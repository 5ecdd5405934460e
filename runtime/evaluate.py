"""Quality of a file on text: nll and perplexity, and KL divergence against another file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.model import Model
from halfbyte.runtime.tokenizer import Tokenizer

ROWS = 32  # rows whose logits are held at once: memory stays O(vocabulary)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32[T, V] -> float64[T, V]."""
    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def windows(tokenizer: Tokenizer, text: str, ctx: int) -> list[list[int]]:
    """The text in non-overlapping windows of at most `ctx` tokens, each with the start token if one is added."""
    ids = tokenizer.encode(text, bos=False, special=False)
    start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    step = max(1, ctx - len(start))
    return [start + ids[i : i + step] for i in range(0, len(ids), step) if len(start + ids[i : i + step]) > 1]


def evaluate(
    model: Model,
    text: str,
    *,
    ctx: int = 512,
    against: Model | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Every token after the first of each window is predicted from the window's earlier ones.

    Returns what `measure` does, less the divergence of every token. Raises UsageError for text that is too short, a
    window longer than a context, or models with different tokenizers.
    """
    for m in (model, against):
        if m is not None and not 2 <= ctx <= m.context_length:
            raise UsageError(
                f"--ctx must lie between 2 and the model's context of {m.context_length}, not {ctx}"
            )
    parts = windows(model.tokenizer, text, ctx)
    if not parts:
        raise UsageError("the text is too short: it needs at least two tokens")
    if against is not None and (
        against.vocab_size != model.vocab_size
        or windows(against.tokenizer, text[:4096], ctx) != windows(model.tokenizer, text[:4096], ctx)
    ):
        raise UsageError("the two files use different tokenizers, so their logits cannot be compared")
    found = measure(model, parts, against=against, progress=progress)
    found.pop("kld", None)
    return found


def measure(
    model: Model,
    parts: Sequence[Sequence[int]],
    *,
    against: Model | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The predictions of every token after the first of each sequence.

    Returns tokens, nll_per_token (nats), ppl and, with `against`, its against_nll_per_token and against_ppl,
    kld (float64[tokens], KL(against || model) in nats), its kld_mean, kld_p99 and kld_max, and top1_agreement.
    Memory is some rows of logits, and 8 bytes a token.
    """
    total, nll, same = sum(len(p) - 1 for p in parts), [0.0, 0.0], 0
    kld = np.empty(total if against is not None else 0)
    done = 0
    for part in parts:
        streams = [_logits(m, part) for m in (model, against) if m is not None]
        for targets, *rows in zip(_chunks(part[1:]), *streams):
            logs = [log_softmax(r) for r in rows]
            for i, log in enumerate(logs):
                nll[i] -= float(log[np.arange(len(targets)), targets].sum())
            if against is not None:
                ours, theirs = logs
                kld[done : done + len(targets)] = (np.exp(theirs) * (theirs - ours)).sum(axis=1)
                same += int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
            done += len(targets)
            if progress:
                progress(done, total)
    out: dict[str, Any] = {
        "tokens": total,
        "nll_per_token": nll[0] / total,
        "ppl": float(np.exp(nll[0] / total)),
    }
    if against is not None:
        out |= {
            "against_nll_per_token": nll[1] / total,
            "against_ppl": float(np.exp(nll[1] / total)),
            "kld": kld,
            "kld_mean": float(kld.mean()),
            "kld_p99": float(np.quantile(kld, 0.99)),
            "kld_max": float(kld.max()),
            "top1_agreement": same / total,
        }
    return out


def _chunks(ids: Sequence[int]) -> Iterator[np.ndarray]:
    for i in range(0, len(ids), ROWS):
        yield np.asarray(ids[i : i + ROWS])


def _logits(model: Model, part: Sequence[int], kv: str | None = None) -> Iterator[np.ndarray]:
    session = model.session(kv)
    for chunk in _chunks(part[:-1]):
        yield session.feed_all(chunk.tolist())


def cut(parts: list[list[int]], tokens: int) -> list[list[int]]:
    """The first windows, of `tokens` tokens together. Raises UsageError where there are not two."""
    out: list[list[int]] = []
    for part in parts:
        room = tokens - sum(map(len, out))
        if room >= 2:
            out.append(part[:room])
    if not out:
        raise UsageError("the text is too short: it needs at least two tokens")
    return out


def kv_divergence(
    model: Model,
    parts: Sequence[Sequence[int]],
    modes: Sequence[str],
    progress: Callable[[int], None] | None = None,
) -> dict[str, tuple[float, float]]:
    """What kv modes change on windows of token ids: by mode the mean KL against a cache of f32, and the mean nll.

    In nats per token. Memory is O(vocabulary) and the caches of all modes. progress: called with tokens done.
    """
    sums, done = {m: np.zeros(2) for m in modes}, 0
    for part in parts:
        streams = [_logits(model, part, m) for m in ("f32", *modes)]
        for targets, theirs, *rows in zip(_chunks(part[1:]), *streams):
            law = log_softmax(theirs)
            for m, logits in zip(modes, rows):
                ours = log_softmax(logits)
                nll = -ours[np.arange(len(targets)), targets].sum()
                sums[m] += (np.exp(law) * (law - ours)).sum(), nll
            done += len(targets)
            if progress:
                progress(done)
    return {m: (float(kld / done), float(nll / done)) for m, (kld, nll) in sums.items()}
