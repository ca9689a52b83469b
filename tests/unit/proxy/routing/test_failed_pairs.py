"""proxy.routing.failed_pairs: pairs are avoided for a bounded time, and no more of them are kept than the bound."""

from __future__ import annotations

import pytest

from baton.proxy.routing import failed_pairs
from baton.proxy.routing.failed_pairs import AVOID_MAX_S, AVOID_S, FailedPairs

PAIR = ("p/1", "d/1")


def test_a_failed_pair_is_avoided_until_its_time_is_over() -> None:
    """Guards against requests that fail one after the other, and against a pair that is never tried again."""
    pairs = FailedPairs()
    pairs.add(PAIR, 0.0)
    assert pairs.avoided(AVOID_S - 0.1) == {PAIR}
    assert not pairs.avoided(AVOID_S + 0.1)


def test_requests_that_fail_together_count_once_and_later_ones_double_the_time() -> None:
    pairs = FailedPairs()
    for _ in range(20):
        pairs.add(PAIR, 0.0)
    assert not pairs.avoided(AVOID_S)
    now, avoid_s = AVOID_S, AVOID_S
    for _ in range(6):
        avoid_s = min(2 * avoid_s, AVOID_MAX_S)
        pairs.add(PAIR, now)
        assert pairs.avoided(now + avoid_s - 0.1) == {PAIR}
        now += avoid_s
        assert not pairs.avoided(now)


def test_a_transfer_that_succeeds_ends_it() -> None:
    pairs = FailedPairs()
    pairs.add(PAIR, 0.0)
    pairs.add(("p/2", "d/1"), 0.0)
    pairs.discard(PAIR, 1.0)
    assert pairs.avoided(1.0) == {("p/2", "d/1")}


def test_of_too_many_pairs_the_oldest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failed_pairs, "MAX_PAIRS", 2)
    pairs = FailedPairs()
    for number in range(3):
        pairs.add((f"p/{number}", "d/1"), float(number))
    assert pairs.avoided(3.0) == {("p/1", "d/1"), ("p/2", "d/1")}
