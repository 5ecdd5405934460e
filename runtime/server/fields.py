"""Fields of a request's JSON, each with its type and range checked; what is wrong is said in OpenAI's shape."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.formats.errors import HalfbyteError
from halfbyte.runtime.sampler import Sampling

MAX_STOPS, MAX_STOP_LENGTH, MAX_BIASES, MAX_N, MAX_TOP = 16, 512, 1024, 16, 20
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(HalfbyteError):
    """An answer with an error status."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def dump(value: Any) -> bytes:
    """JSON of an answer; a lone surrogate from a client's text becomes its escape."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def parse(data: bytes) -> Fields:
    """A request's body. Raises ApiError for anything but an object of finite numbers."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError:
        raise ApiError("the body is not UTF-8 text") from None
    except RecursionError:
        raise ApiError("the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(value, dict):
        raise ApiError("the body must be a JSON object")
    return Fields(value)


class Fields:
    """An object of the request; `where` is its path. Null and absent are the same."""

    def __init__(self, values: Mapping[str, Any], where: str = ""):
        self.values, self._where = values, where

    def path(self, name: str) -> str:
        """How an error names a field."""
        return f"{self._where}.{name}" if self._where else name

    def wrong(self, name: str, what: str) -> ApiError:
        """An error about a field."""
        return ApiError(f"'{self.path(name)}' {what}", self.path(name))

    def has(self, name: str) -> bool:
        """Whether a field is given."""
        return self.values.get(name) is not None

    def real(self, name: str, default: float, low: float, high: float) -> float:
        """A number from low to high."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(name, "must be a number")
        if not low <= value <= high:  # before a conversion that a huge integer would not survive
            raise self.wrong(name, f"must lie between {low:g} and {high:g}")
        if not math.isfinite(value):
            raise self.wrong(name, "must be finite")
        return float(value)

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number from low to high."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "must be a whole number")
        if not low <= value <= high:
            raise self.wrong(name, f"must lie between {low} and {high}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string; required where there is no default."""
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise self.wrong(name, "is missing")
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "must be a string")
        return value

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        """One of a few words."""
        value = self.text(name, default)
        if value not in choices:
            raise self.wrong(name, f"must be one of {', '.join(choices)}")
        return value

    def object(self, name: str) -> Fields | None:
        """An object, or None where absent."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "must be an object")
        return Fields(value, self.path(name))

    def array(self, name: str) -> list[Any]:
        """A list; empty where absent."""
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(name, "must be a list")
        return value

    def objects(self, name: str) -> list[Fields]:
        """A list of objects; empty where absent."""
        found = []
        for i, value in enumerate(self.array(name)):
            if not isinstance(value, dict):
                raise self.wrong(f"{name}[{i}]", "must be an object")
            found.append(Fields(value, self.path(f"{name}[{i}]")))
        return found

    def unsupported(self, *names: str) -> None:
        """Refuse fields that would change the answer and are not implemented."""
        for name in names:
            if self.values.get(name):
                raise self.wrong(name, "is not supported by this server")


def sampling(fields: Fields) -> Sampling:
    """How to draw: OpenAI's fields and their defaults, and top_k, min_p, repetition_penalty beside them."""
    seed = fields.whole("seed", secrets.randbits(64), -(2**63), 2**64 - 1) % 2**64
    return Sampling(
        temperature=fields.real("temperature", 1.0, 0.0, 2.0),
        top_p=fields.real("top_p", 1.0, 0.0, 1.0),
        top_k=fields.whole("top_k", 0, 0, 2**31 - 1),
        min_p=fields.real("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=fields.real("repetition_penalty", 1.0, 0.1, 10.0),
        presence_penalty=fields.real("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=fields.real("frequency_penalty", 0.0, -2.0, 2.0),
        seed=seed,
        logit_bias=_biases(fields),
    )


def _biases(fields: Fields) -> dict[int, float] | None:
    given = fields.object("logit_bias")
    if given is None or not given.values:
        return None
    if len(given.values) > MAX_BIASES:
        raise fields.wrong("logit_bias", f"may name {MAX_BIASES} tokens at most")
    biases = {}
    for key in given.values:
        if not (key.isascii() and key.isdecimal() and len(key) <= 9):
            raise fields.wrong("logit_bias", f"must have token ids as keys, not {key[:20]!r}")
        bias = given.real(key, 0.0, -100.0, 100.0)
        biases[int(key)] = -math.inf if bias == -100.0 else bias
    return biases


def stops(fields: Fields) -> tuple[str, ...]:
    """Stop strings: one, or a list."""
    value = fields.values.get("stop")
    found = [value] if isinstance(value, str) else fields.array("stop")
    if len(found) > MAX_STOPS:
        raise fields.wrong("stop", f"may have {MAX_STOPS} strings at most")
    for text in found:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise fields.wrong("stop", f"must be strings of 1 to {MAX_STOP_LENGTH} characters")
    return tuple(found)
