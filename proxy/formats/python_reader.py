"""Keyword arguments of a Python call in a model's output, read as they come and written as a JSON object.

Literals only: strings, numbers, True, False, None (and JSON's words for them), lists and dicts. Nothing is evaluated;
what is no such literal fails. `take` is that of `json_reader`. Knows no markers and no schemas.
"""

from __future__ import annotations

import json
import math
from enum import Enum, auto

from baton.proxy.formats.json_reader import MAX_SCALAR_CHARS, SPACE, CallSink, Progress, StringReader

_ESCAPES = {
    **{"\\": "\\", "'": "'", '"': '"', "\n": "", "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"},
    **{"v": "\v", "0": "\0"},
}
_HEX = {"x": 2, "u": 4, "U": 8}
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_MARKS = frozenset("'\"\\")
_ENCODER = json.JSONEncoder(ensure_ascii=False)
_CLOSES = {"(": ")", "[": "]", "{": "}"}


def json_inside(text: str) -> str:
    """`text` as it stands between the quotes of a JSON string."""
    return _ENCODER.encode(text)[1:-1]


class _Place(Enum):
    KEY = auto()
    """The name of an argument, or the key of a dict."""
    EQUALS = auto()
    VALUE = auto()
    COMMA = auto()


class PythonReader:
    """From behind the opening parenthesis to the closing one."""

    def __init__(self, sink: CallSink) -> None:
        self._sink = sink
        self._open = ["("]
        """Brackets that are open."""
        self._counts = [0]
        """Of each of them, how many values it has."""
        self._place = _Place.KEY
        self._word = ""
        self._string: StringReader | None = None

    @property
    def opaque(self) -> bool:
        return self._string is not None

    def passes(self, text: str) -> bool:
        """`text` is all inside of a string, and the same in JSON."""
        return self._string is not None and self._string.is_plain and text.isprintable() and _MARKS.isdisjoint(text)

    def take(self, text: str, start: int, end: int) -> tuple[int, Progress]:
        place, progress = start, Progress.MORE
        while place < end and progress is Progress.MORE:
            if self._string is not None:
                place = self._take_string(self._string, text, place, end)
                continue
            char = text[place]
            if char.isalnum() or char in "_.+-":
                self._word += char
                if len(self._word) > MAX_SCALAR_CHARS or self._place not in (_Place.KEY, _Place.VALUE):
                    return place, Progress.FAILED
                place += 1
            elif self._word and not self._finish_word():
                return place, Progress.FAILED
            elif char in SPACE:
                place += 1
            else:
                place, progress = self._take_mark(char, place)
        return place, progress

    def _take_string(self, string: StringReader, text: str, start: int, end: int) -> int:
        decoded, stop = string.take(text, start, end)
        if not string.done:
            self._sink.arguments(json_inside(decoded))
            return stop
        self._sink.arguments(json_inside(decoded) + '"')
        self._string = None
        self._after_value()
        return stop

    def _take_mark(self, char: str, start: int) -> tuple[int, Progress]:
        bracket = self._open[-1]
        if self._place is _Place.EQUALS and char == ("=" if bracket == "(" else ":"):
            self._sink.arguments(": ")
            self._place = _Place.VALUE
        elif self._place is _Place.COMMA and char == ",":
            self._place = _Place.VALUE if bracket == "[" else _Place.KEY
        elif char == _CLOSES[bracket] and self._may_close(bracket):
            return start + 1, self._close(bracket)
        elif self._place is _Place.VALUE or (self._place is _Place.KEY and bracket == "{" and char in "'\""):
            return self._begin_value(char, start)
        else:
            return start, Progress.FAILED
        return start + 1, Progress.MORE

    def _begin_value(self, char: str, start: int) -> tuple[int, Progress]:
        if char not in "'\"[{":
            return start, Progress.FAILED
        self._separate()
        if char in "[{":
            self._open.append(char)
            self._counts.append(0)
            self._place = _Place.VALUE if char == "[" else _Place.KEY
            self._sink.arguments(char)
        else:
            self._string = StringReader(char, _ESCAPES, _HEX)
            self._sink.arguments('"')
        return start + 1, Progress.MORE

    def _finish_word(self) -> bool:
        """Whether the word that ended is allowed here."""
        word, self._word = self._word, ""
        if self._place is _Place.KEY and self._open[-1] == "(":
            written: str | None = _ENCODER.encode(word) if word.isidentifier() else None
        else:
            written = _literal(word)
            if written is not None and self._place is _Place.KEY:
                written = f'"{written}"'
        if written is None:
            return False
        self._separate()
        self._sink.arguments(written)
        self._after_value()
        return True

    def _separate(self) -> None:
        """Before a value of a list, or a key; a trailing comma of Python's thus never comes out."""
        if self._place is _Place.KEY or self._open[-1] == "[":
            first = "{" if self._open[-1] == "(" else ""
            self._sink.arguments(", " if self._counts[-1] else first)
            self._counts[-1] += 1

    def _after_value(self) -> None:
        self._place = _Place.EQUALS if self._place is _Place.KEY else _Place.COMMA

    def _may_close(self, bracket: str) -> bool:
        return self._place in (_Place.COMMA, _Place.VALUE if bracket == "[" else _Place.KEY)

    def _close(self, bracket: str) -> Progress:
        self._open.pop()
        count = self._counts.pop()
        if bracket == "(":
            self._sink.arguments("}" if count else "")
            return Progress.DONE
        self._sink.arguments(_CLOSES[bracket])
        self._place = _Place.COMMA
        return Progress.MORE


def _literal(word: str) -> str | None:
    """A number or constant of Python as JSON."""
    if word in _WORDS:
        return _WORDS[word]
    if not word.isascii() or not any(char.isdigit() for char in word) or not (word[0].isdigit() or word[0] in "+-."):
        return None
    try:
        if isinstance(json.loads(word), int | float):
            return word  # however large: as in formats whose arguments are JSON
    except ValueError:
        pass
    try:
        return str(int(word, 0))
    except ValueError:
        pass
    try:
        value = float(word)
    except ValueError:
        return None
    return json.dumps(value) if math.isfinite(value) else None
