"""Parameters that a model writes as raw text between tags, written as a JSON object, by the types of the tool's schema.

A value whose schema allows strings only goes on as it comes. Others wait for their end: what is JSON of an allowed type
stays as it is, everything else is a string. Knows no tags.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from baton.proxy.formats.json_reader import CallSink, Progress, ValueScanner
from baton.proxy.formats.python_reader import json_inside
from baton.proxy.formats.schemas import resolved, type_name, types_of

MAX_WAITING_CHARS = 1 << 18
"""A longer value that is not declared as a string becomes one."""


class ParameterWriter:
    """The arguments of one call."""

    def __init__(self, sink: CallSink, schema: Mapping[str, Any], *, bare: bool = False) -> None:
        """`schema`: of the function's parameters; `bare`: values have no line breaks of their tags around them."""
        self._bare = bare
        self._sink = sink
        self._schema = resolved(schema, schema)
        properties = self._schema.get("properties")
        self._properties: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        self._num_keys = 0
        self._types: frozenset[str] = frozenset()
        self._streams = False
        """The value is a string, whatever comes."""
        self._at_start = False
        self._waiting: list[str] = []
        self._num_waiting = 0
        self._scanner: ValueScanner | None = None
        """Of a value that waits, as long as it may be JSON."""
        self._is_blank = True
        """The value has had nothing else so far."""

    @property
    def in_json_string(self) -> bool:
        """The value may be JSON, and is inside of one of its strings, which have no line breaks."""
        return self._scanner is not None and self._scanner.in_string

    def begin(self, key: str) -> None:
        self._types = types_of(self._properties.get(key), self._schema)
        self._at_start = True
        opening = ", " if self._num_keys else "{"
        self._num_keys += 1
        self._sink.arguments(f"{opening}{json.dumps(key, ensure_ascii=False)}: ")
        self._streams = self._types == {"string"}
        self._scanner = None if self._streams else ValueScanner()
        self._is_blank = True
        if self._streams:
            self._sink.arguments('"')

    def text(self, text: str) -> None:
        """More of the value; one line break at its start belongs to the tag, unless values are bare."""
        if self._at_start and not self._bare:
            self._at_start = False
            text = text[1:] if text[0] == "\n" else text
        if self._streams:
            self._sink.arguments(json_inside(text))
            return
        self._scan(text)
        self._waiting.append(text)
        self._num_waiting += len(text)
        if self._num_waiting > MAX_WAITING_CHARS:
            self._streams = True
            self._sink.arguments('"' + json_inside(self._taken()))

    def _scan(self, text: str) -> None:
        text = text.lstrip() if self._is_blank else text
        self._is_blank = self._is_blank and not text
        place = 0
        while self._scanner is not None and place < len(text):
            place, progress = self._scanner.take(text, place, len(text))
            if progress is not Progress.MORE:
                self._scanner = None

    def end(self) -> None:
        """The value is complete."""
        if self._streams:
            self._sink.arguments('"')
        else:
            self._sink.arguments(_json_of(self._taken(), self._types))

    def close(self) -> None:
        """There are no more parameters."""
        if self._num_keys:
            self._sink.arguments("}")

    def _taken(self) -> str:
        text = "".join(self._waiting)
        self._waiting.clear()
        self._num_waiting = 0
        return text


def _json_of(text: str, types: frozenset[str]) -> str:
    word = text.strip()
    if "boolean" in types and word.lower() in ("true", "false"):
        return word.lower()
    if "null" in types and word in ("null", "None"):
        return "null"
    try:
        value = json.loads(word, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    kind = type_name(value)
    if "string" in types and kind not in types and not (kind == "integer" and "number" in types):
        return json.dumps(text, ensure_ascii=False)
    return word


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")
