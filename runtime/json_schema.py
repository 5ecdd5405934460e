"""JSON schemas in the keywords that the grammar library has, meaning the same.

What a keyword can be said by others is rewritten: `not`, `if`, dependencies, closed objects, names of properties.
A keyword that cannot stays as it is, and the library then refuses it by its name. Draft 2020-12, and draft 7 where
`$schema` says so (json-schema.org/draft/2020-12/json-schema-validation, draft-07/json-schema-validation).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from halfbyte.formats.errors import UsageError
from halfbyte.runtime.json_formats import LENGTHS, PATTERNS
from halfbyte.runtime.json_numbers import BOUNDS, bounds, check_bounds

TYPES = ("object", "array", "string", "number", "boolean", "null")
OLD = ("divisibleBy", "disallow", "extends")
"""Keywords of drafts before 6, which the library takes for annotations."""

ONE = ("additionalItems", "additionalProperties", "items", "contains", "not", "propertyNames", "if", "then", "else",
       "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
SEVERAL = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
"""Where schemas stand inside a schema: one, a list, an object of them."""

COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains",
          "maxContains")  # fmt: skip
FORMATS = ("date-time", "time", "date", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6",
           "uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "regex")  # fmt: skip
"""Formats of the standard that are kept, or refused by the library. All others are annotations, as it says."""

_MAX_ONE_OF = 16  # branches; each is copied that often
_MAX_SEEN = 100_000  # schemas
_MAX_UNIQUE = 5  # values of a set, which has 326 orders of some of them
_MAX_UNLIKE = 64  # characters of a text that is excluded


class _KeptError(Exception):
    """A keyword cannot be said by others."""


def rewritten(schema: Any, one_of: bool = False) -> Any:
    """The same schema, without the keywords that others can say; the argument is left as it is.

    one_of  also write `oneOf` as `anyOf` of what exactly one branch takes

    Raises UsageError for a keyword of an old draft, for a schema that nothing matches, and for one too large.
    """
    _refuse_old(schema)
    try:
        found = _Rewriter(schema, one_of).schema(schema)
    except RecursionError:
        raise UsageError("the JSON schema is nested too deeply") from None
    if found is False:
        raise UsageError("nothing matches the JSON schema")
    check_bounds(found)
    return {} if found is True else found


def _refuse_old(schema: Any) -> None:
    left = [schema]
    while left:
        here = left.pop()
        if not isinstance(here, dict):
            continue
        old = [key for key in OLD if key in here]
        old += [k for k in ("exclusiveMinimum", "exclusiveMaximum") if isinstance(here.get(k), bool)]
        if isinstance(here.get("required"), bool):
            old.append("required")
        if old:
            raise UsageError(
                f"the JSON schema has {old[0]!r} as an older draft has it; draft 7 and 2020-12 are possible"
            )
        left += [here[key] for key in ONE if key in here]
        left += [s for key in SEVERAL if isinstance(here.get(key), list) for s in here[key]]
        left += [s for key in NAMED if isinstance(here.get(key), dict) for s in here[key].values()]


class _Rewriter:
    def __init__(self, root: Any, one_of: bool):
        self._root, self._one_of = root, one_of
        draft = root.get("$schema") if isinstance(root, dict) else None
        self._old_ref = isinstance(draft, str) and any(f"draft-0{n}/" in draft for n in (4, 6, 7))
        self._open: list[str] = []  # references that are being followed
        self._seen = 0
        self._steps: tuple[Callable[[dict[str, Any]], None], ...] = (
            _counts, _format, bounds, self._unevaluated_properties, self._unevaluated_items, _contains,
            _property_names, self._dependencies, self._conditions, self._not, self._exactly_one, self._unique,
        )  # fmt: skip

    def schema(self, given: Any) -> Any:
        """A schema and all in it, rewritten."""
        if not isinstance(given, dict):
            return given
        self._count()
        if self._old_ref and "$ref" in given:  # draft 7: everything beside it is ignored
            kept = ("$ref", "$schema", "definitions", "$defs")
            given = {k: v for k, v in given.items() if k in kept}
        found = dict(given)
        for key in ONE:
            if isinstance(found.get(key), (dict, bool)):
                found[key] = self.schema(found[key])
        for key in SEVERAL:
            if isinstance(found.get(key), list):
                found[key] = [self.schema(s) for s in found[key]]
        for key in NAMED:
            if isinstance(found.get(key), dict):
                found[key] = {name: self.schema(s) for name, s in found[key].items()}
        for step in self._steps if not _SAID_BY_OTHERS.isdisjoint(found) else ():
            before, opened = dict(found), len(self._open)
            try:
                step(found)
            except (
                _KeptError,
                TypeError,
                ValueError,
                AttributeError,
            ):  # of a wrong type: the library says so
                found = before
                del self._open[opened:]
        both = found.get("allOf")
        return False if isinstance(both, list) and any(s is False for s in both) else found

    def _count(self) -> None:
        self._seen += 1
        if self._seen > _MAX_SEEN:  # as references may name a schema very often
            raise UsageError("the JSON schema is too large")

    # ---- keywords -----------------------------------------------------------------------------------

    def _unevaluated_properties(self, found: dict[str, Any]) -> None:
        """As additionalProperties, where it is known beforehand what is evaluated."""
        if "unevaluatedProperties" not in found:
            return
        rest = found.pop("unevaluatedProperties")
        if rest is True:
            found.setdefault("additionalProperties", True)  # for a schema around this one they are evaluated
        if "additionalProperties" in found:
            return
        known = list(self._evaluating(found))
        if any(k.get(key, False) is not False for k in known for key in _OPEN_OBJECT):
            return
        found["additionalProperties"] = rest
        for key in ("properties", "patternProperties"):
            names = dict.fromkeys((name for k in known for name in k.get(key) or {}), True)
            if names:
                found[key] = {**(found.get(key) or {}), **{n: found.get(key, {}).get(n, True) for n in names}}

    def _unevaluated_items(self, found: dict[str, Any]) -> None:
        """As items after all that is evaluated."""
        if "unevaluatedItems" not in found:
            return
        rest = found.pop("unevaluatedItems")
        if rest is True:
            found.setdefault("items", True)
            return
        known = [found, *self._evaluating(found)]
        if any("contains" in k or isinstance(k.get("items"), list) for k in known):
            raise _KeptError
        if any(key in k for k in known for key in ("items", "unevaluatedItems")):
            return
        length = max(len(k.get("prefixItems") or ()) for k in known)
        own = list(found.get("prefixItems") or ())
        found["prefixItems"] = own + [True] * (length - len(own))
        found["items"] = rest
        if not length:
            del found["prefixItems"]

    def _evaluating(self, schema: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """The schemas that always apply beside this one to the same value."""
        if any(key in schema for key in _SOMETIMES):
            raise _KeptError
        beside = list(schema.get("allOf") or ())
        if "$ref" in schema:
            beside.append(self.schema(self._resolved(schema["$ref"])))
        for other in beside:
            if isinstance(other, dict):
                yield other
                yield from self._evaluating(other)
        for name in [schema["$ref"]] if "$ref" in schema else []:
            self._open.remove(name)

    def _dependencies(self, found: dict[str, Any]) -> None:
        pairs: list[tuple[str, Any]] = []
        for key in ("dependentRequired", "dependentSchemas", "dependencies"):
            pairs += (found.pop(key, None) or {}).items()
        for name, wanted in pairs:
            if isinstance(wanted, list):
                wanted = {"required": wanted} if wanted else True
            present = _all([{"required": [name]}, wanted])
            if wanted is not True:
                _and(found, _any([{"properties": {name: False}}, present]))

    def _conditions(self, found: dict[str, Any]) -> None:
        then, other = found.pop("then", True), found.pop("else", True)
        if "if" not in found:  # without it the others say nothing
            return
        condition = found.pop("if")
        if then is not True or other is not True:
            otherwise = _all([self._negated(condition), other]) if condition is not True else False
            _and(found, _any([_all([condition, then]), otherwise]))

    def _not(self, found: dict[str, Any]) -> None:
        if "not" in found:
            _and(found, self._negated(found.pop("not")))

    def _exactly_one(self, found: dict[str, Any]) -> None:
        branches = found.get("oneOf")
        if not isinstance(branches, list) or (len(branches) > 1 and not self._one_of):
            return
        branches = [b for b in branches if b is not False]
        if len(branches) > _MAX_ONE_OF:
            raise _KeptError
        del found["oneOf"]
        negated = [self._negated(b) for b in branches] if len(branches) > 1 else [False]
        alone = [_all([b, *negated[:i], *negated[i + 1 :]]) for i, b in enumerate(branches)]
        _and(found, _any(alone))

    def _unique(self, found: dict[str, Any]) -> None:
        """Sets of a few values that are listed: they are listed themselves, in every order."""
        items = found.get("items")
        if found.get("uniqueItems") is not True or not isinstance(items, dict) or "prefixItems" in found:
            return
        if items.keys() == {"$ref"}:
            name = items["$ref"]
            items = self.schema(self._resolved(name))
            self._open.remove(name)
        values = items.get("enum")
        if not isinstance(values, list) or not items.keys() <= {"enum", "type", "title", "description"}:
            return
        distinct = {(type(v) is bool, v): v for v in values if v is None or isinstance(v, (str, int, float))}
        if (
            len(distinct) < len(values)
            or len(values) > _MAX_UNIQUE
            or items.get("type", "string") != "string"
        ):
            return
        if "type" in items and not all(isinstance(v, str) for v in values):
            return
        del found["uniqueItems"], found["items"]
        least, most = found.pop("minItems", 0), found.pop("maxItems", len(values))
        lengths = [n for n in range(len(values) + 1) if least <= n <= most]
        arrays = [list(p) for n in lengths for p in itertools.permutations(values, n)]
        others = {"type": [t for t in TYPES if t != "array"]}
        _and(found, _any([others, {"enum": arrays} if arrays else False]))

    # ---- the opposite -------------------------------------------------------------------------------

    def _negated(self, schema: Any) -> Any:
        """A schema of all values that this rewritten one does not take. Raises _KeptError where it cannot be said."""
        self._count()
        if not isinstance(schema, dict):
            return not schema
        return _any([part for key, value in schema.items() for part in self._denied(key, value, schema)])

    def _denied(self, key: str, value: Any, schema: dict[str, Any]) -> list[Any]:
        """Schemas, one of which takes a value that breaks this keyword."""
        if key in _OPPOSITES:
            return [_OPPOSITES[key](value)]
        if key in ("const", "enum"):
            return _others([value] if key == "const" else value)
        if key == "type":
            return _other_types([value] if isinstance(value, str) else value)
        if key == "required":
            return [{"type": "object", "properties": {name: False}} for name in value]
        if key == "properties":
            return [
                {"type": "object", "required": [name], "properties": {name: opposite}}
                for name, inner in value.items()
                if (opposite := self._negated(inner)) is not False
            ]
        if key == "allOf":
            return [self._negated(s) for s in value]
        if key == "anyOf":
            return [_all([self._negated(s) for s in value])]
        if key == "$ref":
            opposite = self._negated(self.schema(self._resolved(value)))
            self._open.remove(value)
            return [opposite]
        if value is True and key in ONE:
            return []
        if key in _ASSERTIONS:
            raise _KeptError
        return []

    def _resolved(self, reference: Any) -> Any:
        """What a reference within the document names; it counts as open until it is removed."""
        if not isinstance(reference, str) or not reference.startswith("#") or reference in self._open:
            raise _KeptError
        here = self._root
        for part in reference.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(here, dict) and "$id" in here and here is not self._root:
                raise _KeptError
            if isinstance(here, dict) and part in here:
                here = here[part]
            elif isinstance(here, list) and part.isdecimal() and int(part) < len(here):
                here = here[int(part)]
            else:
                raise _KeptError
        if "/" not in reference and reference != "#":
            raise _KeptError
        self._open.append(reference)
        return here


_SAID_BY_OTHERS = {*COUNTS, *BOUNDS, "format", "unevaluatedProperties", "unevaluatedItems", "contains",
                   "propertyNames", "not", "dependentRequired", "dependentSchemas", "dependencies", "if", "then",
                   "else", "oneOf", "uniqueItems"}  # fmt: skip
_OPEN_OBJECT = ("additionalProperties", "unevaluatedProperties")
_SOMETIMES = ("anyOf", "oneOf", "if", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef")
_OPPOSITES: dict[str, Callable[[Any], Any]] = {
    "minimum": lambda n: {"type": "number", "exclusiveMaximum": n},
    "maximum": lambda n: {"type": "number", "exclusiveMinimum": n},
    "exclusiveMinimum": lambda n: {"type": "number", "maximum": n},
    "exclusiveMaximum": lambda n: {"type": "number", "minimum": n},
    "minLength": lambda n: {"type": "string", "maxLength": n - 1} if n > 0 else False,
    "maxLength": lambda n: {"type": "string", "minLength": n + 1},
    "minItems": lambda n: {"type": "array", "maxItems": n - 1} if n > 0 else False,
    "maxItems": lambda n: {"type": "array", "minItems": n + 1},
    "minProperties": lambda n: {"type": "object", "maxProperties": n - 1} if n > 0 else False,
    "maxProperties": lambda n: {"type": "object", "minProperties": n + 1},
}
_ASSERTIONS = {*ONE, *SEVERAL, *COUNTS, "patternProperties", "dependentSchemas", "dependencies", "dependentRequired",
               "multipleOf", "pattern", "format", "uniqueItems", "$dynamicRef", "$recursiveRef", "$ref"}  # fmt: skip


def _any(branches: Sequence[Any]) -> Any:
    """anyOf, without what says nothing."""
    kept = [b for b in branches if b is not False]
    if any(b is True or b == {} for b in kept):
        return True
    return kept[0] if len(kept) == 1 else {"anyOf": kept} if kept else False


def _all(branches: Sequence[Any]) -> Any:
    """allOf, without what says nothing."""
    kept = [b for b in branches if b is not True and b != {}]
    if any(b is False for b in kept):
        return False
    return kept[0] if len(kept) == 1 else {"allOf": kept} if kept else True


def _and(found: dict[str, Any], more: Any) -> None:
    if more is not True:
        found["allOf"] = [*found.get("allOf", ()), more]


def _counts(found: dict[str, Any]) -> None:
    """2.0 is 2; and what asks for nothing goes."""
    for key in COUNTS:
        if isinstance(found.get(key), float) and found[key].is_integer():
            found[key] = int(found[key])
    few = isinstance(found.get("maxItems"), int) and found["maxItems"] < 2
    if found.get("uniqueItems") is False or (few and found.get("uniqueItems") is True):
        del found["uniqueItems"]


def _format(found: dict[str, Any]) -> None:
    name = found.get("format")
    if not isinstance(name, str):
        return
    if name in PATTERNS:
        del found["format"]
        longest = {"maxLength": LENGTHS[name]} if name in LENGTHS else {}
        _and(found, {"pattern": f"^(?:{PATTERNS[name]})$", **longest})
    elif name not in FORMATS:
        del found["format"]


def _contains(found: dict[str, Any]) -> None:
    """What contains says of arrays of anything is their length."""
    wanted = found.get("contains")
    least, most = found.pop("minContains", 1), found.pop("maxContains", None)
    if "contains" not in found:
        return
    if least == 0 and most is None:
        del found["contains"]
    elif wanted is True or wanted == {}:
        del found["contains"]
        _and(found, {"minItems": least} if most is None else {"minItems": least, "maxItems": most})
    else:
        raise _KeptError


def _property_names(found: dict[str, Any]) -> None:
    if "propertyNames" not in found:
        return
    names = found.pop("propertyNames")
    if isinstance(names, dict):
        names = {k: v for k, v in names.items() if (k, v) != ("type", "string")}
    if names is True or names == {}:
        return
    if names is False:
        _and(found, {"maxProperties": 0})
        return
    rest = found.get("additionalProperties", True)
    listed = [names["const"]] if names.keys() == {"const"} else names.get("enum")
    if isinstance(listed, list) and len(names) == 1 and "patternProperties" not in found:
        own = found.get("properties") or {}
        allowed = dict.fromkeys((n for n in listed if isinstance(n, str)), rest)
        found["properties"] = {**{n: s if n in allowed else False for n, s in own.items()},
                               **{n: s for n, s in allowed.items() if n not in own}}  # fmt: skip
        found["additionalProperties"] = False
        return
    if "properties" in found or "patternProperties" in found:
        raise _KeptError
    if names.keys() == {"pattern"}:
        found["patternProperties"] = {names["pattern"]: rest}
    elif names.keys() <= {"minLength", "maxLength"}:
        length = f"{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}"
        found["patternProperties"] = {f"^(?s:.){length}$": rest}
    else:
        raise _KeptError
    found["additionalProperties"] = False


def _other_types(types: Sequence[str]) -> list[Any]:
    if "integer" in types and "number" not in types:
        raise _KeptError
    others = [t for t in TYPES if t not in types]
    return [{"type": others}] if others else []


def _others(values: Sequence[Any]) -> list[Any]:
    """Schemas of all values but these."""
    if any(isinstance(v, (dict, list)) for v in values):
        raise _KeptError
    texts = {v for v in values if isinstance(v, str)}
    if any(len(t) > _MAX_UNLIKE for t in texts):
        raise _KeptError
    flags = {v for v in values if isinstance(v, bool)}
    numbers = sorted({v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)})
    named = {"string": texts, "boolean": flags, "number": numbers, "null": [v for v in values if v is None]}
    found: list[Any] = [{"type": [t for t in TYPES if not named.get(t)]}]
    if texts:
        found.append({"type": "string", "pattern": f"^{_unlike(texts)}$"})
    if len(flags) == 1:
        found.append({"const": not flags.pop()})
    ends = [-math.inf, *numbers, math.inf]
    for low, high in itertools.pairwise(ends) if numbers else ():
        bounds = {"exclusiveMinimum": low, "exclusiveMaximum": high}
        found.append({"type": "number", **{k: v for k, v in bounds.items() if math.isfinite(v)}})
    return found


def _unlike(texts: Iterable[str]) -> str:
    """A regular expression of every text that is none of these."""
    texts = set(texts)
    if not texts:
        return "(?s:.)*"
    firsts = sorted({t[0] for t in texts if t})
    ways = ["" for _ in range("" not in texts)]
    any_other = "".join(rf"\x{{{ord(c):x}}}" for c in firsts)
    ways.append(f"[^{any_other}](?s:.)*" if firsts else "(?s:.)(?s:.)*")
    ways += [rf"\x{{{ord(c):x}}}{_unlike(t[1:] for t in texts if t.startswith(c))}" for c in firsts]
    return f"(?:{'|'.join(ways)})"
