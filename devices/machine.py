"""A machine as `fit` sees it: this one, probed and measured, or a profile of another.

A profile is a flat TOML file of the keys in `KEYS`, all present; `profiles/` has common boards, phones and laptops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.formats.errors import UsageError

from .bandwidth import Speed, speed
from .probe import probe

PROFILES = Path(__file__).parent / "profiles"
_MAX_BYTES = 1 << 16  # of a profile

# key: (type, meaning). All are required and no others are allowed.
KEYS: dict[str, tuple[type, str]] = {
    "name": (str, "the product"),
    "cpu": (str, "chip and cores"),
    "cores": (int, "all cores"),
    "isa": (str, "instruction sets as Linux names them, separated by blanks"),
    "memory_gb": (float, "GB fitted (2^30 bytes)"),
    "reserved_gb": (float, "GB (2^30 bytes) that the system and other programs keep"),
    "bandwidth_gb_per_s": (float, "nominal memory bandwidth, 10^9 bytes/s: transfers/s x bus bytes"),
    "achievable": (float, "share of it that the cores read in practice"),
    "int8_gmac_per_s": (float, "10^9 int8 multiply-adds/s of all cores by the best dot instruction"),
    "f32_gmac_per_s": (float, "10^9 float32 multiply-adds/s of all cores"),
    "source": (str, "where the numbers come from"),
}


@dataclass(frozen=True)
class Machine:
    """memory: bytes a model may take; bandwidth: bytes/s read; peaks: multiply-adds/s; measured or nominal."""

    name: str
    cpu: str
    cores: int
    memory: int
    bandwidth: float
    int8_peak: float
    f32_peak: float
    measured: bool
    source: str


def this_machine(fresh: bool = False, found: Speed | None = None) -> Machine:
    """The machine this runs on. Measures when there is no cached measurement, or when `fresh`."""
    found = found or speed(fresh)
    facts = probe()
    limits = [n for n in (facts["memory_available"], facts["memory_limit"]) if n]
    return Machine(
        name="this machine",
        cpu=facts["cpu"],
        cores=facts["cores"],
        memory=min(limits) if limits else 0,
        bandwidth=found.read_gb_per_s * 1e9,
        int8_peak=found.int8_gmac_per_s * 1e9,
        f32_peak=found.f32_gmac_per_s * 1e9,
        measured=True,
        source=f"measured with {found.threads} threads ({found.instruction})"
        + (", too low: other programs were running" if found.busy else ""),
    )


def profile_names() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(p.stem for p in PROFILES.glob("*.toml"))


def load_profile(name: str) -> Machine:
    """The profile of that name, or of that path (with a slash or the suffix .toml).

    Raises UsageError when it does not exist or is not a complete profile.
    """
    is_path = "/" in name or "\\" in name or name.endswith(".toml")
    if not is_path and name not in profile_names():
        raise UsageError(f"no profile {name!r}; there are {', '.join(profile_names())}, or give a .toml file")
    path = Path(name) if is_path else PROFILES / f"{name}.toml"
    try:
        if not path.is_file():
            raise UsageError(f"{path}: not a file; profiles are {', '.join(profile_names())}")
        with path.open("rb") as f:
            data = f.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"longer than {_MAX_BYTES} bytes")
        return _machine(parse(data.decode()))
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise UsageError(f"{path}: not a profile: {error}") from None


def parse(text: str) -> dict[str, Any]:
    """TOML as a dict. Python 3.10 has no TOML reader: there, flat `key = value` lines only. Raises ValueError."""
    try:
        import tomllib
    except ImportError:
        return parse_flat(text)
    return tomllib.loads(text)


def parse_flat(text: str) -> dict[str, Any]:
    """The part of TOML that profiles use: comments, and keys with a plain string, whole number or float."""
    out: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), 1):
        key, equals, value = (part.strip() for part in line.partition("="))
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not equals or not key.replace("_", "").isalnum() or key in out:
            raise ValueError(f"line {number}: not 'key = value', or given twice")
        if value[:1] == '"':
            inner, quote, rest = value[1:].partition('"')
            if not quote or "\\" in inner or (rest.strip() and not rest.strip().startswith("#")):
                raise ValueError(f"line {number}: not a plain string")
            out[key] = inner
            continue
        digits = value.partition("#")[0].strip()
        try:
            out[key] = int(digits) if digits.isdecimal() else float(digits)
        except ValueError:
            raise ValueError(f"line {number}: {digits!r} is neither a string nor a number") from None
    return out


def _machine(found: dict[str, Any]) -> Machine:
    for key in sorted(KEYS.keys() - found.keys()):
        raise ValueError(f"{key} ({KEYS[key][1]}) is missing")
    for key in sorted(found.keys() - KEYS.keys()):
        raise ValueError(f"{key!r} is no key of a profile")
    for key, (kind, meaning) in KEYS.items():
        value = found[key]
        if kind is str:
            if not isinstance(value, str) or not value or not value.isprintable():
                raise ValueError(f"{key} ({meaning}) must be a line of text")
        elif (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not isinstance(value, (int, kind))
        ):
            raise ValueError(f"{key} ({meaning}) must be a {'whole ' if kind is int else ''}number")
        elif not (0 < value < 1e9 and math.isfinite(value)):
            raise ValueError(f"{key} ({meaning}) must be a positive number, not {value}")
    if found["achievable"] > 1 or found["reserved_gb"] >= found["memory_gb"]:
        raise ValueError("achievable is at most 1, and reserved_gb is less than memory_gb")
    return Machine(
        name=found["name"],
        cpu=found["cpu"],
        cores=found["cores"],
        memory=int((found["memory_gb"] - found["reserved_gb"]) * (1 << 30)),
        bandwidth=found["bandwidth_gb_per_s"] * found["achievable"] * 1e9,
        int8_peak=found["int8_gmac_per_s"] * 1e9,
        f32_peak=found["f32_gmac_per_s"] * 1e9,
        measured=False,
        source=found["source"],
    )
