"""The search for the highest rate: it ends, and what it finds is right within a tenth, whatever the server's limit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.benchmark.load.search import MAX_DOUBLINGS, MAX_HALVINGS, PRECISION, RateSearch


@given(st.floats(0.05, 1000), st.floats(0.05, 1000))
def test_it_finds_the_limit(limit: float, start: float) -> None:
    """A search that stops at its first bracket is off by a factor of two."""
    search, asked = RateSearch(start), 0
    while (rate := search.next_rate()) is not None:
        search.observe(rate, rate <= limit)
        asked += 1
        assert asked < 40
    if limit >= start / 2**MAX_HALVINGS:
        assert search.found is not None and search.found <= limit <= search.found * PRECISION


@pytest.mark.parametrize("kept", [True, False])
def test_it_gives_up_where_there_is_no_limit(kept: bool) -> None:
    """A null server keeps everything, a broken one nothing; neither may be asked for ever."""
    search, asked = RateSearch(1.0), []
    while (rate := search.next_rate()) is not None:
        asked.append(rate)
        search.observe(rate, kept)
    assert len(asked) == 1 + (MAX_DOUBLINGS if kept else MAX_HALVINGS)
    assert search.found == (max(asked) if kept else None)
