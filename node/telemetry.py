"""Logging: one line an event, `time LEVEL node event key=value ...`, on stderr.

It owns the format and nothing else. Life-cycle events are INFO, requests DEBUG, nothing is logged a token; rates are
metrics. Text of prompts and answers never goes into a log: values are ids, counts, sizes and reasons.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

Value = str | int | float | bool | bytes | None

MAX_LINE_CHARS = 4000
"""Of a library's message."""
MAX_TRACEBACK_LINES = 400
"""Without its middle, if it has more: the frames come first, the exception's message last."""
MAX_VALUE_CHARS = 300
"""A longer value is cut: a peer's reason, a path, an exception's message have no bound of their own."""


def configure_logging(level: str, node_name: str, stream: TextIO | None = None) -> None:
    """Send the log of the whole process, libraries included, to `stream` (stderr) in the format above.

    `level` is "debug", "info", "warning" or "error". Called once, from a node's `__main__`; calling it again replaces
    what was set before.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(_LineFormatter(node_name))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def log_event(logger: logging.Logger, event: str, /, *, level: int = logging.INFO, **fields: Value) -> None:
    """Log `event key=value ...`; keys carry units, values are quoted where they need it."""
    if logger.isEnabledFor(level):
        logger.log(level, "%s", " ".join([event, *(f"{key}={format_value(value)}" for key, value in fields.items())]))


def format_value(value: Value) -> str:
    """One value as it stands in a log line: quoted where a blank or a quote is in it, bytes as hex, floats short."""
    if isinstance(value, bytes):
        text = value.hex()
    elif isinstance(value, float):
        text = f"{value:.6g}"
    else:
        text = str(value)
    if len(text) > MAX_VALUE_CHARS:
        text = text[:MAX_VALUE_CHARS] + "..."
    if text and text.isprintable() and not any(char in ' "=\\' for char in text):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def excerpt(value: object, max_chars: int = MAX_VALUE_CHARS) -> str:
    """A value that a file, a client or a peer has chosen, for an error text: on one line, printable, cut."""
    try:
        text = str(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    cut = _escaped(text[:max_chars])
    return cut if len(text) <= max_chars else f"{cut}..."


class _LineFormatter(logging.Formatter):
    """Format of all records; a library's multi-line message becomes one line, a traceback keeps its own lines. These
    are indented, as the exception's message may hold line breaks of a client: no line of it looks like an event."""

    def __init__(self, node_name: str) -> None:
        super().__init__()
        self._node_name = node_name

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        message = excerpt(record.getMessage(), MAX_LINE_CHARS)
        line = f"{time.removesuffix('+00:00')}Z {record.levelname} {self._node_name} {message}"
        if record.exc_info is None:
            return line
        return "\n".join([line, *map(_continuation, _ends_of(self.formatException(record.exc_info).splitlines()))])


def _ends_of(lines: list[str]) -> list[str]:
    cut = len(lines) - MAX_TRACEBACK_LINES
    if cut <= 0:
        return lines
    half = MAX_TRACEBACK_LINES // 2
    return [*lines[:half], f"... {cut} lines ...", *lines[half + cut :]]


def _continuation(line: str) -> str:
    return f"  {excerpt(line, MAX_LINE_CHARS)}"


def _escaped(text: str) -> str:
    """Line breaks, terminals' control sequences and other characters that cannot be seen, as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
