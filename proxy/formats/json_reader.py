"""JSON in a model's output, read as it comes: where values end, and which of them are a call's name and arguments.

Arguments go on exactly as the model wrote them, white space included; nothing is completed or repaired. Depth and
strings are followed, the rest of JSON's grammar is not checked. Every reader here has `take(text, start, end)`: it
reads on in `text[start:end]`, as far as it likes, and returns where it stopped, always behind `start` unless it has
finished, failed, or changed what it expects. Knows no markers: `opaque` says that markers would be text here.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import Protocol

SPACE = " \t\r\n"
MAX_SCALAR_CHARS = 512
JSON_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
JSON_HEX = {"u": 4}
_MARKS = frozenset('"{}[]')
"""What changes where in a value one is."""


class Progress(Enum):
    MORE = auto()
    DONE = auto()
    FAILED = auto()
    """The next character is not allowed here, or what was read is no call."""


class CallSink(Protocol):
    """What becomes of a call's parts."""

    def begin(self, name: str) -> bool: ...

    def arguments(self, text: str) -> None: ...


class StringReader:
    """The inside of a quoted string, decoded, to the quote that ends it."""

    def __init__(
        self, quote: str = '"', escapes: Mapping[str, str] = JSON_ESCAPES, hex_escapes: Mapping[str, int] = JSON_HEX
    ) -> None:
        """`hex_escapes`: how many hexadecimal digits follow a letter. Unknown escapes stay as they are."""
        self.done = False
        self._quote = quote
        self._escapes = escapes
        self._hex_escapes = hex_escapes
        self._escape = ""
        """Of an escape that is not complete, backslash included."""
        self._high = ""
        """The first half of a surrogate pair."""

    @property
    def is_plain(self) -> bool:
        """No escape is open."""
        return not self._escape and not self._high

    def take(self, text: str, start: int, end: int) -> tuple[str, int]:
        """The decoded text of one run of characters, and where it stopped."""
        if self._escape:
            return self._continue_escape(text[start]), start + 1
        char = text[start]
        if char == self._quote:
            self.done = True
            return self._lone(), start + 1
        if char == "\\":
            self._escape = char
            return "", start + 1
        quote, slash = text.find(self._quote, start, end), text.find("\\", start, end)
        stop = min(end if quote < 0 else quote, end if slash < 0 else slash)
        return self._lone() + text[start:stop], stop

    def _continue_escape(self, char: str) -> str:
        self._escape += char
        kind = self._escape[1]
        num_digits = self._hex_escapes.get(kind, 0)
        if not num_digits:
            known, self._escape = self._escapes.get(kind, self._escape), ""
            return self._lone() + known
        digits = self._escape[2:]
        if digits and char not in "0123456789abcdefABCDEF":
            return self._broken_escape(char)
        if len(digits) < num_digits:
            return ""
        self._escape = ""
        return self._code_point(int(digits, 16))

    def _broken_escape(self, char: str) -> str:
        """`char` is no hexadecimal digit: the escape is text, and `char` is read anew."""
        text, self._escape = self._lone() + self._escape[:-1], ""
        return text + self.take(char, 0, 1)[0]

    def _code_point(self, value: int) -> str:
        if 0xD800 <= value < 0xDC00:
            lone, self._high = self._lone(), chr(value)
            return lone
        if 0xDC00 <= value < 0xE000 and self._high:
            pair = 0x10000 + ((ord(self._high) - 0xD800) << 10) + (value - 0xDC00)
            self._high = ""
            return chr(pair)
        char = "\ufffd" if 0xDC00 <= value < 0xE000 or value > 0x10FFFF else chr(value)
        return self._lone() + char

    def _lone(self) -> str:
        lone, self._high = "\ufffd" if self._high else "", ""
        return lone


class ValueScanner:
    """Any JSON value from its first character to its last; the end of a number or word is the character behind it."""

    def __init__(self) -> None:
        self.in_string = False
        self.word = ""
        """The value, where it is a number, true, false or null."""
        self._depth = 0
        self.escaped = False

    def passes(self, text: str) -> bool:
        """`text` goes on as it is, and changes nothing here."""
        if self.in_string:
            return not self.escaped and '"' not in text and "\\" not in text
        return self._depth > 0 and _MARKS.isdisjoint(text)

    def take(self, text: str, start: int, end: int) -> tuple[int, Progress]:
        place = start
        while place < end:
            if self.in_string:
                place = self._take_string(text, place, end)
                if not self.in_string and not self._depth:
                    return place, Progress.DONE
                continue
            char = text[place]
            if char in '"{[':
                if self.word:
                    return place, Progress.FAILED
                self.in_string = char == '"'
                self._depth += char != '"'
            elif self._depth:
                self._depth -= char in "]}"
                if not self._depth:
                    return place + 1, Progress.DONE
            elif char.isascii() and (char.isalnum() or char in "+-."):
                if len(self.word) == MAX_SCALAR_CHARS:
                    return place, Progress.FAILED
                self.word += char
            else:
                return place, Progress.DONE if self.word else Progress.FAILED
            place += 1
        return end, Progress.MORE

    def _take_string(self, text: str, start: int, end: int) -> int:
        """Up to what may be its end, or an escape."""
        if self.escaped:
            self.escaped = False
            return start + 1
        quote, slash = text.find('"', start, end), text.find("\\", start, end)
        if slash >= 0 and (slash < quote or quote < 0):
            self.escaped = True
            return slash + 1
        if quote < 0:
            return end
        self.in_string = False
        return quote + 1


class ArgumentsReader:
    """The JSON value of a call's arguments. null is no arguments; a string is the JSON text of them, unquoted once."""

    def __init__(self, sink: CallSink) -> None:
        self._sink = sink
        self._scanner: ValueScanner | None = None
        self._string: StringReader | None = None

    @property
    def opaque(self) -> bool:
        return self._string is not None or (self._scanner is not None and self._scanner.in_string)

    def passes(self, text: str) -> bool:
        return self._scanner is not None and self._scanner.passes(text)

    def take(self, text: str, start: int, end: int) -> tuple[int, Progress]:
        if self._string is not None:
            decoded, stop = self._string.take(text, start, end)
            self._sink.arguments(decoded)
            return stop, Progress.DONE if self._string.done else Progress.MORE
        if self._scanner is not None:
            return self._scan(self._scanner, text, start, end)
        if text[start] in SPACE:
            return start + 1, Progress.MORE
        if text[start] == '"':
            self._string = StringReader()
            return start + 1, Progress.MORE
        self._scanner = ValueScanner()
        return start, Progress.MORE

    def _scan(self, scanner: ValueScanner, text: str, start: int, end: int) -> tuple[int, Progress]:
        stop, progress = scanner.take(text, start, end)
        if not scanner.word:
            self._sink.arguments(text[start:stop])
        elif progress is Progress.DONE and scanner.word != "null":
            self._sink.arguments(scanner.word)
        return stop, progress


class _Expects(Enum):
    OBJECT = auto()
    FIRST_KEY = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    COMMA = auto()


class CallReader:
    """A JSON object `{"name": ..., "arguments": ...}`, with its fields in any order.

    `parameters` is another name of `arguments`. The first of each counts. Arguments before the name wait for it.
    """

    def __init__(self, sink: CallSink, *, strict: bool = False) -> None:
        """`strict`: only an object that has arguments, and no unknown field before they begin, is a call."""
        self._sink = sink
        self._strict = strict
        self._expects = _Expects.OBJECT
        self._key = ""
        self._name: str | None = None
        self._begun = False
        self._has_arguments = False
        self._waiting: list[str] = []
        """Arguments that came before the name."""
        self._text = ""
        """Of the key or name that is being read."""
        self._string: StringReader | None = None
        self._arguments: ArgumentsReader | None = None
        self._other: ValueScanner | None = None

    @property
    def opaque(self) -> bool:
        if self._arguments is not None:
            return self._arguments.opaque
        return self._string is not None or (self._other is not None and self._other.in_string)

    def passes(self, text: str) -> bool:
        return self._arguments is not None and self._arguments.passes(text)

    def begin(self, name: str) -> bool:
        raise AssertionError(f"the reader of arguments began a call of {name!r}")

    def arguments(self, text: str) -> None:
        """From the reader of the arguments."""
        if self._begun:
            self._sink.arguments(text)
        else:
            self._waiting.append(text)

    def take(self, text: str, start: int, end: int) -> tuple[int, Progress]:
        if self._string is not None:
            return self._take_string(self._string, text, start, end)
        if self._arguments is not None or self._other is not None:
            return self._take_value(text, start, end)
        char = text[start]
        if char in SPACE:
            return start + 1, Progress.MORE
        return self._take_mark(char, start)

    def _take_string(self, string: StringReader, text: str, start: int, end: int) -> tuple[int, Progress]:
        decoded, stop = string.take(text, start, end)
        self._text += decoded
        if len(self._text) > MAX_SCALAR_CHARS:
            self._text = self._text[: MAX_SCALAR_CHARS + 1]  # too long for any name, and for any known field
        if not string.done:
            return stop, Progress.MORE
        self._string = None
        if self._expects is not _Expects.VALUE:
            self._key, self._expects = self._text, _Expects.COLON
            return stop, Progress.MORE
        self._name, self._expects = self._text, _Expects.COMMA
        return stop, self._begin_if_ready()

    def _take_value(self, text: str, start: int, end: int) -> tuple[int, Progress]:
        reader = self._arguments or self._other
        assert reader is not None
        stop, progress = reader.take(text, start, end)
        if progress is Progress.DONE:
            self._arguments = self._other = None
            self._expects = _Expects.COMMA
            return stop, Progress.MORE
        return stop, progress

    def _take_mark(self, char: str, start: int) -> tuple[int, Progress]:
        expects = self._expects
        if expects is _Expects.VALUE:
            return self._begin_value(char, start)
        if expects is _Expects.OBJECT and char == "{":
            self._expects = _Expects.FIRST_KEY
        elif expects in (_Expects.FIRST_KEY, _Expects.KEY) and char == '"':
            self._text, self._string = "", StringReader()
        elif expects is _Expects.COLON and char == ":":
            self._expects = _Expects.VALUE
        elif expects is _Expects.COMMA and char == ",":
            self._expects = _Expects.KEY
        elif expects is _Expects.COMMA and char == "}" and self._begun:
            return start + 1, Progress.DONE
        else:
            return start, Progress.FAILED
        return start + 1, Progress.MORE

    def _begin_value(self, char: str, start: int) -> tuple[int, Progress]:
        if self._key == "name" and self._name is None:
            if char != '"':
                return start, Progress.FAILED
            self._text, self._string = "", StringReader()
            return start + 1, Progress.MORE
        if self._key in ("arguments", "parameters") and not self._has_arguments:
            self._has_arguments, self._arguments = True, ArgumentsReader(self)
            return start, self._begin_if_ready()
        if self._strict and not self._begun and self._key not in ("type", "id"):
            return start, Progress.FAILED
        self._other = ValueScanner()
        return start, Progress.MORE

    def _begin_if_ready(self) -> Progress:
        if self._begun or self._name is None or (self._strict and not self._has_arguments):
            return Progress.MORE
        if not self._sink.begin(self._name):
            return Progress.FAILED
        self._begun = True
        for text in self._waiting:
            self._sink.arguments(text)
        self._waiting.clear()
        return Progress.MORE
