"""Guards node.telemetry: one line an event whatever the values are, so that a log can be read by a program."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.node.telemetry import MAX_VALUE_CHARS, configure_logging, format_value, log_event

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (?P<level>[A-Z]+) (?P<node>\S+) (?P<rest>.*)")


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """The process's log at level info, in memory; pytest's own handlers are put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    root.handlers[:] = []  # basicConfig(force=True) closes what it removes
    configure_logging("info", "decode-0", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def test_an_event_is_one_line_with_time_level_node_and_fields(log: io.StringIO) -> None:
    """A missing part makes two nodes' logs impossible to merge."""
    log_event(logging.getLogger("x"), "registered", worker="decode-0", blocks=128, wait_s=0.25, ok=True, peer=None)
    match = LINE.fullmatch(log.getvalue().removesuffix("\n"))
    assert match is not None, log.getvalue()
    assert (match["level"], match["node"]) == ("INFO", "decode-0")
    assert match["rest"] == "registered worker=decode-0 blocks=128 wait_s=0.25 ok=True peer=None"


def test_debug_is_silent_at_info(log: io.StringIO) -> None:
    """Request lines are DEBUG: at INFO they would be most of the log."""
    log_event(logging.getLogger("x"), "request", level=logging.DEBUG, request_id="r")
    log_event(logging.getLogger("x"), "worker_lost", level=logging.WARNING)
    assert [line.split(" ", 3)[1:] for line in log.getvalue().splitlines()] == [["WARNING", "decode-0", "worker_lost"]]


def test_a_librarys_message_of_many_lines_is_one_line(log: io.StringIO) -> None:
    """A client-controlled line break (in a path, say) could forge an event."""
    logging.getLogger("lib").warning("bad path %s", "/x\r\n2026-01-01T00:00:00.000Z INFO decode-0 registered")
    assert log.getvalue().count("\n") == 1


def test_a_traceback_is_kept(log: io.StringIO) -> None:
    """A crash without its traceback cannot be mended."""
    try:
        raise ValueError("the cause")
    except ValueError:
        logging.getLogger("x").exception("crashed")
    assert "Traceback" in log.getvalue() and "ValueError: the cause" in log.getvalue()


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
    """`key=two words` would be read as a key and a stray word."""
    assert format_value(value) == text


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_stays_one_printable_token(text: str) -> None:
    """Control characters, line separators and lone surrogates of a peer's reason must not reach the terminal."""
    shown = format_value(text)
    assert shown.isprintable()
    assert shown.startswith('"') or " " not in shown


def test_a_long_value_is_cut() -> None:
    """An exception's message can hold a megabyte of input."""
    assert len(format_value("x" * 100_000)) < MAX_VALUE_CHARS + 10
