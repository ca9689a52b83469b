"""Guards node.telemetry: one line an event for any values, so that programs can read the log."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.node.telemetry import MAX_LINE_CHARS, MAX_VALUE_CHARS, configure_logging, excerpt, format_value, log_event

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (?P<level>[A-Z]+) (?P<node>\S+) (?P<rest>.*)")


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """The process's log at level info, in memory; pytest's own handlers are restored afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    root.handlers[:] = []  # basicConfig(force=True) closes what it removes
    configure_logging("info", "decode-0", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def test_an_event_is_one_line_with_time_level_node_and_fields(log: io.StringIO) -> None:
    """Guards merging the logs of several nodes, which needs every part of the line."""
    log_event(logging.getLogger("x"), "registered", worker="decode-0", blocks=128, wait_s=0.25, ok=True, peer=None)
    match = LINE.fullmatch(log.getvalue().removesuffix("\n"))
    assert match is not None, log.getvalue()
    assert (match["level"], match["node"]) == ("INFO", "decode-0")
    assert match["rest"] == "registered worker=decode-0 blocks=128 wait_s=0.25 ok=True peer=None"


def test_debug_is_silent_at_info(log: io.StringIO) -> None:
    """Guards against request lines at INFO, which would be most of the log."""
    log_event(logging.getLogger("x"), "request", level=logging.DEBUG, request_id="r")
    log_event(logging.getLogger("x"), "worker_lost", level=logging.WARNING)
    assert [line.split(" ", 3)[1:] for line in log.getvalue().splitlines()] == [["WARNING", "decode-0", "worker_lost"]]


def test_a_multi_line_message_of_a_library_is_one_line(log: io.StringIO) -> None:
    """Guards against forged events: a client may put a line break into a path."""
    logging.getLogger("lib").warning("bad path %s", "/x\r\n2026-01-01T00:00:00.000Z INFO decode-0 registered")
    assert log.getvalue().count("\n") == 1


def test_a_traceback_is_kept(log: io.StringIO) -> None:
    """Guards against losing the traceback of a crash."""
    try:
        raise ValueError("the cause")
    except ValueError:
        logging.getLogger("x").exception("crashed")
    assert "Traceback" in log.getvalue() and "ValueError: the cause" in log.getvalue()


def test_no_line_of_a_traceback_looks_like_an_event(log: io.StringIO) -> None:
    """Guards against forged events: an exception's message may quote what a client has sent, line breaks included."""
    forged = "2026-01-01T00:00:00.000Z INFO decode-0 registered"
    try:
        error = ValueError(f"bad\n{forged}\r{forged}\u2028{forged}")
        error.add_note(f"note\n{forged}")
        raise ExceptionGroup(f"several\n{forged}", [error])
    except ExceptionGroup:
        logging.getLogger("x").exception("crashed")
    first, *others = re.split("[\r\n\u2028]", log.getvalue().removesuffix("\n"))
    assert LINE.fullmatch(first) and sum(forged in line for line in others) == 5
    assert all(line.startswith("  ") for line in others)


def test_a_long_traceback_loses_its_middle(log: io.StringIO) -> None:
    """Guards the disk against a message of a million lines; the type and the frames are shown all the same."""
    try:
        raise ValueError("first\n" + "\n" * 100_000 + "x" * 100_000)
    except ValueError:
        logging.getLogger("x").exception("crashed")
    assert len(log.getvalue()) < 20 * MAX_LINE_CHARS
    assert "ValueError: first" in log.getvalue() and "xxx" in log.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("tcp://127.0.0.1:5", "tcp://127.0.0.1:5"),
        ("two words", '"two words"'),
        ('say "hi"', r'"say \"hi\""'),
        ("a=b", '"a=b"'),
        ("", '""'),
        ("line\nbreak", r'"line\nbreak"'),
        (b"\x01\xff", "01ff"),
        (1 / 3, "0.333333"),
        (float("nan"), "nan"),
    ],
)
def test_values_are_quoted_only_where_needed(value: str | float | bytes, text: str) -> None:
    """Guards parsing: an unquoted `key=two words` would be read as a key and a separate word."""
    assert format_value(value) == text


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_stays_one_printable_token(text: str) -> None:
    """Guards the terminal against control characters, line separators and lone surrogates from a peer."""
    shown = format_value(text)
    assert shown.isprintable()
    assert shown.startswith('"') or " " not in shown


def test_a_long_value_is_cut() -> None:
    """Guards the log against an exception message with a megabyte of input."""
    assert len(format_value("x" * 100_000)) < MAX_VALUE_CHARS + 10


def test_a_library_writes_no_control_sequences(log: io.StringIO) -> None:
    """Guards terminals, and the line format, against what a library quotes of a client's bytes."""
    logging.getLogger("lib").warning("bad %s", "\x1b[2J\x00\u2028\u202e" + "x" * 100_000)
    try:
        raise ValueError("\x1b[2J\x07")
    except ValueError:
        logging.getLogger("lib").exception("crashed")
    lines = log.getvalue().split("\n")
    assert all(line.isprintable() for line in lines)
    assert len(lines[0]) < MAX_LINE_CHARS + 100 and "\\x1b[2J" in lines[0]


@given(st.text(st.characters(exclude_categories=())))
def test_an_excerpt_is_printable(text: str) -> None:
    """Guards error texts, which terminals, logs and answers show."""
    assert excerpt(text).isprintable()


def test_an_excerpt_of_anything_is_short() -> None:
    """Guards against an error text of a megabyte, and against a value that cannot be shown."""
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert len(excerpt("x" * 100_000)) < MAX_VALUE_CHARS + 10
    assert "nested" in excerpt(deep)
