"""Which kv mode a file is run with: what was measured on it (annotation KVMD) decides.

KVMD = {"text": {"name", "sha256", "tokens"}, "ctx": [short, long], "modes": {name: {"kld": [at each ctx]}}}: mean
KL divergence in nats per token against a cache of f32, written by `halfbyte kv`.
"""

from __future__ import annotations

from typing import Any

from . import annotation, kv_modes
from .container import File
from .tiles import P16

THRESHOLD = 0.01  # nats per token
UNMEASURED = "k8v8"
FLOAT = "f16"
_LENGTH = 4096  # positions at which modes are compared by size


def nbytes(file: File, mode: str, length: int) -> int:
    """Bytes of keys and values of `length` positions in a mode, all pages whole, windows not considered."""
    modes, pages = kv_modes.by_cache(mode, len(file.caches)), -(-length // kv_modes.PAGE)
    total = 0
    for m, c in zip(modes, file.caches):
        heads, k_dim, v_dim = (int(c[f]) for f in ("kv_heads", "k_dim", "v_dim"))
        total += heads * sum(m.head_bytes(i, k_dim, v_dim) for i in (0, 1)[: min(pages, 2)])
        total += heads * max(0, pages - 2) * m.head_bytes(1, k_dim, v_dim)
    return total


def measured(file: File) -> dict[str, float]:
    """The worst KL of every measured mode. Raises FormatError for an annotation of another shape."""
    found = annotation.read(file, "KVMD")
    try:
        return {} if found is None else {k: max(map(float, v["kld"])) for k, v in found["modes"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise annotation.FormatError(f"{file.path}: section KVMD does not say what it should") from None


def automatic(file: File, threshold: float = THRESHOLD) -> str:
    """The smallest mode that was measured to be below the threshold; k8v8 where nothing was measured.

    Never one that takes more than f16, which narrow heads may, nor a rounded cache beside f32 weights.
    """
    if {t.encoding for t in file.tensors if t.tile == P16} == {"f32"}:
        return "f32"
    known = measured(file)
    passing = [name for name, kld in known.items() if kld <= threshold] if known else [UNMEASURED]
    size = {name: nbytes(file, name, _LENGTH) for name in (*passing, FLOAT)}
    return min(size, key=lambda name: size[name])


def warning(file: File, mode: str, threshold: float = THRESHOLD) -> str | None:
    """What is wrong with a mode that was measured and fails."""
    kld = measured(file).get(mode)
    if kld is None or kld <= threshold:
        return None
    return f"kv mode {mode} was measured to change this model by {kld:.4g} nats per token; the limit is {threshold:g}"


def annotate(
    text: str, sha256: str, tokens: int, ctx: list[int], kld: dict[str, list[float]]
) -> dict[str, Any]:
    """The annotation."""
    modes = {name: {"kld": [float(f"{v:.5g}") for v in values]} for name, values in kld.items()}
    return {"text": {"name": text, "sha256": sha256, "tokens": tokens}, "ctx": ctx, "modes": modes}
