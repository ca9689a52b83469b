"""Typed reading of the JSON files of a model folder; every fault is a SettingsError with the file and the key.

Knows no model: which keys there are and what they mean is config.py's part.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TypeAlias

from baton.node.errors import SettingsError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MAX_JSON_BYTES = 64 << 20  # the index of a model with a hundred shards is a few MB


class JsonObject:
    """One JSON object of a file, read field by field. `where` names it in errors."""

    def __init__(self, where: str, fields: dict[str, Json]) -> None:
        self.where = where
        self.fields = fields

    @classmethod
    def from_file(cls, path: Path) -> JsonObject:
        """The object in `path`; SettingsError when it is missing, not JSON, not an object or far too large."""
        try:
            if path.stat().st_size > MAX_JSON_BYTES:
                raise SettingsError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
            value = json.loads(path.read_bytes())
        except OSError as error:
            raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise SettingsError(f"{path}: must hold a JSON object")
        return cls(str(path), value)

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self.fields.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least `least`; without a default the key must be there."""
        if default is not None and not self.has(key):
            return default
        value = self._required(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "a whole number")
        if value < least:
            raise self.wrong(key, f"at least {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero; without a default the key must be there."""
        if default is not None and not self.has(key):
            return default
        value = self._required(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number")
        if not math.isfinite(value) or value <= 0:
            raise self.wrong(key, "a finite number above zero")
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers above zero; the key must be there."""
        value = self._required(key)
        numbers = value if isinstance(value, list) else []
        found = tuple(float(item) for item in numbers if isinstance(item, int | float) and not isinstance(item, bool))
        if not found or len(found) != len(numbers) or not all(math.isfinite(item) and item > 0 for item in found):
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
        return SettingsError(f"{self.where}: {key!r} must be {expected}, is {str(self.fields.get(key))[:80]}")

    def _required(self, key: str) -> Json:
        if not self.has(key):
            raise SettingsError(f"{self.where}: {key!r} is missing")
        return self.fields[key]
