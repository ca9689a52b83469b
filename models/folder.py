"""Typed reading of the JSON files of a model folder; every fault is a SettingsError with the file and the key.

Knows no model: which keys there are and what they mean is config.py's part.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeAlias, TypeGuard

from baton.node.errors import SettingsError
from baton.node.model_folder import MAX_CONFIG_BYTES, read_object
from baton.node.telemetry import excerpt

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MAX_LENGTH = 1 << 24
"""Tokens of the longest sequence, as in Register; no other size of a model comes near."""
LEAST_NUMBER, MOST_NUMBER = 1e-30, 1e30
"""Far outside what any model has; products and quotients of two of them are finite."""


class JsonObject:
    """One JSON object of a file, read field by field. `where` names it in errors."""

    def __init__(self, where: str, fields: dict[str, Json]) -> None:
        self.where = where
        self.fields = fields

    @classmethod
    def from_file(cls, path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> JsonObject:
        """The object in `path`; SettingsError when it is missing, not JSON, not an object or far too large."""
        try:
            return cls(str(path), read_object(path, max_bytes))
        except FileNotFoundError as error:
            raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self.fields.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_LENGTH) -> int:
        """A whole number of `least` to `most`; without a default the key must be there."""
        if default is not None and not self.has(key):
            return default
        value = self._required(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "a whole number")
        if value < least:
            raise self.wrong(key, f"at least {least}")
        if value > most:
            raise self.wrong(key, f"at most {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero; without a default the key must be there."""
        if default is not None and not self.has(key):
            return default
        value = self._required(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number")
        if not value > 0 or value == math.inf:
            raise self.wrong(key, "a finite number above zero")
        if not _is_usable(value):
            raise self.wrong(key, f"between {LEAST_NUMBER:g} and {MOST_NUMBER:g}")
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers above zero; the key must be there."""
        value = self._required(key)
        numbers = value if isinstance(value, list) else []
        found = tuple(float(item) for item in numbers if _is_usable(item))
        if not found or len(found) != len(numbers):
            raise self.wrong(key, "a list of finite numbers above zero")
        return found

    def flag(self, key: str, default: bool) -> bool:
        if not self.has(key):
            return default
        value = self.fields[key]
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        if default is not None and not self.has(key):
            return default
        value = self._required(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; the key must be there."""
        value = self._required(key)
        if not isinstance(value, list):
            raise self.wrong(key, "a list of strings")
        found = tuple(item for item in value if isinstance(item, str))
        if len(found) != len(value):
            raise self.wrong(key, "a list of strings")
        return found

    def child(self, key: str) -> JsonObject | None:
        """The object under `key`, or None when it is absent or null."""
        value = self.fields.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return JsonObject(f"{self.where}: {key}", value)

    def wrong(self, key: str, expected: str) -> SettingsError:
        return SettingsError(f"{self.where}: {key!r} must be {expected}, is {excerpt(self.fields.get(key), 80)}")

    def _required(self, key: str) -> Json:
        if not self.has(key):
            raise SettingsError(f"{self.where}: {key!r} is missing")
        return self.fields[key]


def _is_usable(value: Json) -> TypeGuard[int | float]:
    """Comparing whole numbers of any size with floats is exact, converting them may overflow; NaN compares as false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and LEAST_NUMBER <= value <= MOST_NUMBER
