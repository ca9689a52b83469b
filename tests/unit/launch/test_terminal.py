"""Guards launch.terminal: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import io

from baton.launch.terminal import Screen

LINES = [
    "waiting (5 s): no token yet",
    "[decode-0] 2026-01-01T00:00:00.000Z INFO decode-0 loading_weights tensors=12 of=291",
    "[prefill-0] 2026-01-01T00:00:00.000Z INFO prefill-0 loading_weights tensors=13 of=291",
    "[decode-0] 2026-01-01T00:00:02.000Z INFO decode-0 loading_weights tensors=200 of=291",
    "[decode-0] 2026-01-01T00:00:03.000Z INFO decode-0 weights_loaded took_s=3",
    "[decode-0] 2026-01-01T00:00:05.000Z INFO decode-0 capturing_graphs graphs=3 of=16",
    "ready http://127.0.0.1:8000",
]


class FakeTerminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_log_has_every_line_as_it_is() -> None:
    """Guards against control characters in a file, and against a start of minutes without a line."""
    out = io.StringIO()
    screen = Screen(out)
    for line in LINES:
        screen.say(line)
    screen.close()
    assert out.getvalue().splitlines() == LINES


def test_a_terminal_has_bars_in_place_of_lines_of_progress() -> None:
    """Guards against a terminal full of counts, a line lost to a bar, and a bar that stays when its work is done."""
    out = FakeTerminal()
    screen = Screen(out)
    for line in LINES:
        screen.say(line)
    shown = out.getvalue()
    assert "of=291" not in shown and "of=16" not in shown
    for title, count in (("decode-0 loading weights", "200/291"), ("prefill-0 loading weights", "13/291")):
        assert title in shown and count in shown
    assert "decode-0 capturing graphs" in shown and "3/16" in shown
    for line in (LINES[0], LINES[4], LINES[6]):
        assert f"{line}\n" in shown
    assert list(screen._bars) == ["prefill-0", "decode-0"]
    screen.close()
    assert screen._bars == {}
