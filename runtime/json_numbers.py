"""Bounds of numbers, where the grammar library (llguidance 1.9) reads them otherwise than JSON Schema does."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from halfbyte.formats.errors import UsageError

BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


_MAX_SEEN = 300_000


def bounds(found: dict[str, Any]) -> None:
    """With a maximum of 0.25 the library writes no 0.2, as it wants two digits there: such values are listed beside."""
    given = {key: found[key] for key in BOUNDS if _number(found.get(key))}
    types = found.get("type", "number")
    if not given or "multipleOf" in found or "number" not in ([types] if isinstance(types, str) else types):
        return
    short = {value for end in given.values() for value in _shortened(end)}
    listed = sorted(value for value in short if _within(value, given))
    if not listed:
        return
    for key in given:
        del found[key]
    found["allOf"] = [*found.get("allOf", ()), {"anyOf": [given, {"enum": listed}]}]


def check_bounds(schema: Any) -> None:
    """Raises UsageError where a whole number is excluded and the other end lies less than one away: the library takes
    the excluded number then. Ends that meet by allOf, anyOf or $ref count as well."""
    every = list(_schemas(schema))
    if not any(isinstance(s.get(key), float) for s in every for key in BOUNDS):
        return
    seen = 0
    for start in every:
        ends: dict[str, set[Any]] = {key: set() for key in BOUNDS}
        for part in _same_value(start, schema):
            seen += 1
            if seen > _MAX_SEEN:  # as references may name a schema very often
                raise UsageError("the JSON schema is too large")
            for key in BOUNDS:
                if _number(part.get(key)):
                    ends[key].add(part[key])
        highest, lowest = (
            ends["maximum"] | ends["exclusiveMaximum"],
            ends["minimum"] | ends["exclusiveMinimum"],
        )
        for key, others, sign in (("exclusiveMinimum", highest, 1), ("exclusiveMaximum", lowest, -1)):
            for end in ends[key]:
                if float(end).is_integer() and any(0 < sign * (other - end) < 1 for other in others):
                    raise UsageError(f"the JSON schema has {key} {end:g} and another end less than 1 away, "
                                     "which is not implemented")  # fmt: skip


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _within(value: float, given: dict[str, Any]) -> bool:
    return (
        given.get("minimum", value) <= value <= given.get("maximum", value)
        and ("exclusiveMinimum" not in given or given["exclusiveMinimum"] < value)
        and ("exclusiveMaximum" not in given or value < given["exclusiveMaximum"])
    )


def _shortened(end: float) -> Iterator[float]:
    """A bound, and what is left of it when digits are cut off."""
    exact = Decimal(repr(end))
    digits = -int(exact.as_tuple().exponent)
    if isinstance(end, int) or end.is_integer() or digits > 17:
        return
    yield end
    for kept in range(1, digits):
        yield float(int(exact.scaleb(kept)) / Decimal(10) ** kept)


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    left = [schema]
    while left:
        here = left.pop()
        if isinstance(here, dict):
            yield here
            left += here.values()
        elif isinstance(here, list):
            left += here


def _same_value(start: dict[str, Any], root: Any) -> Iterator[dict[str, Any]]:
    """A schema and those that speak of the same value."""
    left, followed = [start], set[str]()
    while left:
        here = left.pop()
        if not isinstance(here, dict):
            continue
        yield here
        for key in ("allOf", "anyOf", "oneOf"):
            left += here[key] if isinstance(here.get(key), list) else []
        name = here.get("$ref")
        if isinstance(name, str) and name.startswith("#") and name not in followed:
            followed.add(name)
            target = root
            for part in name.split("/")[1:]:
                part = part.replace("~1", "/").replace("~0", "~")
                target = target.get(part) if isinstance(target, dict) else None
            left.append(target)
