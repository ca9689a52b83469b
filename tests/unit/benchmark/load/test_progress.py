"""The progress bar: numbers that are right, drawn rarely, gone at the end."""

from __future__ import annotations

import io

from baton.benchmark.load.progress import ProgressBar
from baton.benchmark.load.record import FAILED
from baton.tests.unit.benchmark.load.test_summary import record


def test_it_shows_what_is_done_under_way_and_failed() -> None:
    """A bar drawn for each of a thousand requests a second would be the client's main work."""
    now, out = [0.0], io.StringIO()
    bar = ProgressBar(out, "2 req/s", 4, clock=lambda: now[0])
    for _ in range(3):
        bar.sent()
    bar.ended(record())
    assert out.getvalue() == ""
    now[0] = 2.0
    bar.ended(record(status=FAILED))
    line = "2 req/s |" + "█" * 12 + " " * 12 + "| 2/4, 1 under way, 1 failed, 1.0/s, 2 s"
    assert bar.line() == line and out.getvalue() == f"\r\x1b[K{line}"
    bar.close()
    assert out.getvalue().endswith("\r\x1b[K")
