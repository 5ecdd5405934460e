"""The proof of a file, its section PROF: how close it is to the float model, and what it was made from and how.

Normative with SPEC.md section 13.1. Every number is rounded to DIGITS significant digits, so that the same inputs
give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import numpy as np

from . import annotation, container
from .errors import FormatError

KIND = "PROF"
DIGITS = 5
PER_DECADE, LOWEST, HIGHEST = 4, -8, 2  # bins of the histogram: from 10^LOWEST to 10^HIGHEST nats
BINS = PER_DECADE * (HIGHEST - LOWEST) + 2


def edges() -> np.ndarray:
    """float64[BINS - 1]: bin i holds KL of edges[i - 1] up to, not including, edges[i]; the outer two are open."""
    return 10.0 ** (np.arange(BINS - 1) / PER_DECADE + LOWEST)


def histogram(kld: np.ndarray) -> tuple[int, ...]:
    """How many of the divergences (nats) lie in each of the BINS bins."""
    return tuple(np.bincount(np.searchsorted(edges(), kld, side="right"), minlength=BINS).tolist())


def rounded(value: float) -> float:
    """To DIGITS significant digits."""
    return float(f"{value:.{DIGITS}g}")


@dataclass(frozen=True)
class MatrixError:
    """One matrix: bits per weight as stored, and |w - w_hat|^2 / |w|^2 against the float weights that were coded."""

    name: str
    encoding: str
    bits: float
    error: float


@dataclass(frozen=True)
class Closeness:
    """What the two models say on a text. kld is KL(float || file) at the logits after each token, in nats.

    text: its name; sha256: of its UTF-8 bytes, '' where it is no text; tokens: predicted ones; ctx: tokens a window;
    kv, float_kv: modes of the caches of the file and of the float model; kld_histogram: see `histogram`; ppl,
    float_ppl: perplexities, which may be too large for a number.
    """

    text: str
    sha256: str
    tokens: int
    ctx: int
    policy: str
    kv: str
    float_kv: str
    nll: float
    float_nll: float
    kld_mean: float
    kld_p99: float
    kld_max: float
    top1_agreement: float
    kld_histogram: tuple[int, ...] = ()
    ppl: float = math.inf
    float_ppl: float = math.inf


@dataclass(frozen=True)
class Proof:
    """All of it. closeness is None where it was not measured, and why_not then says why.

    tool, format: versions that wrote the file; source, recipe: facts in words, by name (`source["files"]` is a list of
    {name, bytes, sha256}); bits, error: over all matrices.
    """

    tool: str = ""
    format: str = ""
    source: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    bits: float = 0.0
    error: float = 0.0
    matrices: Sequence[MatrixError] = ()
    closeness: Closeness | None = None
    why_not: str = ""

    def encode(self) -> bytes:
        """The section's bytes. ValueError where a number is not finite."""
        out = {k: v for k, v in asdict(self).items() if v is not None and v != ""}
        if self.closeness is not None:
            out["closeness"] = {k: v for k, v in out["closeness"].items() if v != math.inf}
        return annotation.encode(_rounded(out))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return rounded(value)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def read(file: container.File) -> Proof | None:
    """The proof of a file, None when it has none. Raises FormatError when it is damaged or makes no sense."""
    value = annotation.read(file, KIND)
    if value is None:
        return None
    try:
        return decode(value)
    except FormatError as error:
        raise FormatError(f"{file.path}: section {KIND}: {error}") from None


def decode(value: Mapping[str, Any]) -> Proof:
    """A proof from its JSON object; unknown keys are ignored. Raises FormatError for a value of the wrong type."""
    known = _known(Proof, value)
    items = known.pop("matrices", [])
    known["matrices"] = tuple(_record(MatrixError, v, "matrices") for v in items)
    if "closeness" in known:
        found = _record(Closeness, known["closeness"], "closeness")
        counts = found.kld_histogram
        if len(counts) not in (0, BINS) or not all(type(n) is int and 0 <= n <= found.tokens for n in counts):
            raise FormatError(f"kld_histogram is not {BINS} counts")
        known["closeness"] = found
    return Proof(**known)


# The annotations of the classes above, as they are written there, and the JSON types that may stand for them.
_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "tuple[int, ...]": (list,),
    "Sequence[MatrixError]": (list,),
    "Mapping[str, Any]": (dict,),
    "Closeness | None": (dict,),
}
_RANGES = {
    "bits": (0, 64),
    "error": (0, math.inf),
    "top1_agreement": (0, 1),
    "tokens": (1, 1 << 62),
    "ctx": (2, 1 << 31),
}


def _known(cls: type, value: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for f in fields(cls):
        if f.name not in value:
            continue
        v: Any = value[f.name]
        types = _TYPES[str(f.type)]
        if not isinstance(v, types) or isinstance(v, bool):
            raise FormatError(f"{f.name} is of the wrong type")
        if float in types:
            v = _float(v, f.name)
        if f.name in _RANGES and not _RANGES[f.name][0] <= v <= _RANGES[f.name][1]:
            raise FormatError(f"{f.name} is out of range")
        out[f.name] = tuple(v) if str(f.type).startswith("tuple") else v
    return out


def _float(v: Any, name: str) -> float:
    try:
        return float(v)
    except OverflowError:  # a JSON integer may have any length
        raise FormatError(f"{name} is out of range") from None


def _record(cls: type, value: object, where: str) -> Any:
    if not isinstance(value, dict):
        raise FormatError(f"{where}: not an object")
    try:
        known = _known(cls, value)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    missing = [f.name for f in fields(cls) if f.name not in known and f.default is MISSING]
    if missing:
        raise FormatError(f"{where}: {missing[0]} is missing")
    return cls(**known)
