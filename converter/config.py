"""Reading a model's `config.json` with errors that name the key."""

from __future__ import annotations

from typing import Any

from halfbyte.formats.errors import CheckpointError

_MISSING = object()


class Config:
    """A config with typed, bounded access. Keys are those of Hugging Face's config.json."""

    def __init__(self, values: dict[str, Any]):
        self.values = values

    def defaults(self, **values: Any) -> None:
        """Set what a model's configs leave out; keys that are present, even as null, stay."""
        for key, value in values.items():
            self.values.setdefault(key, value)

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: Any = _MISSING, minimum: int = 1) -> int:
        """A whole number of at least `minimum`. Raises CheckpointError otherwise."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 1 << 31:
            raise CheckpointError(f"config.json: {key} is {value!r}, expected a whole number >= {minimum}")
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A finite number. Raises CheckpointError otherwise."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
            raise CheckpointError(f"config.json: {key} is {value!r}, expected a number")
        return float(value)

    def choice(self, key: str, allowed: dict[str, str], default: Any = _MISSING) -> str:
        """`allowed[value]`. Raises CheckpointError naming what is supported."""
        value = self._required(key, default)
        if value not in allowed:
            raise CheckpointError(
                f"config.json: {key} {value!r} is not supported ({', '.join(sorted(allowed))})"
            )
        return allowed[value]

    def per_layer(self, key: str, layers: int) -> list[Any] | None:
        """A list with one entry a layer, or None where absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < layers:
            raise CheckpointError(f"config.json: {key} must list {layers} layers")
        return value

    def _required(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _MISSING:
                raise CheckpointError(f"config.json: {key} is missing")
            return default
        return value
