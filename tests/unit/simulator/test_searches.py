"""Guards how the searches of `baton simulate place` show what they have done."""

from __future__ import annotations

import pytest

from baton.simulator.bounds import Bound
from baton.simulator.placement import Split
from baton.simulator.searches import Searches


def test_without_a_terminal_a_line_says_what_is_settled(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards logs against a progress bar that is drawn five times a second."""
    nothing = Bound(0.0, "answers take all of the workers")
    searches = Searches([], [(Split(1, 2), nothing), (Split(2, 1), nothing)], first_rate=0.0, jobs=1)
    assert searches.run() == []
    assert searches.skipped == [f"{name}: at most 0 requests/s: {nothing.reason}" for name in ("1P2D", "2P1D")]
    written = capsys.readouterr().err
    assert written.count("\n") == 1 and "\r" not in written
    assert "2 of 2 splits" in written
