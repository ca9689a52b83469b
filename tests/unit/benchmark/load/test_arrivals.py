"""Arrivals: the load that was asked for is the load that is offered, and a seed is a run."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.benchmark.load import arrivals

COUNTS = st.integers(1, 200)
RATES = st.floats(0.01, 1e4)
SEEDS = st.integers(0, 2**32)


@given(COUNTS, RATES, st.floats(0.1, 20), SEEDS)
def test_the_rate_offered_is_the_rate_asked_for(count: int, rate: float, burstiness: float, seed: int) -> None:
    """A drawn sum that is left alone differs by seed, and two servers would be given two loads."""
    times = arrivals.gamma(count, rate, burstiness, seed)
    assert len(times) == count and times == sorted(times) and times[0] >= 0
    assert times[-1] == pytest.approx(count / rate)
    assert times == arrivals.gamma(count, rate, burstiness, seed)


def test_burstiness_is_the_shape_of_the_gaps() -> None:
    """Squared variation of a gamma's gaps is 1 / shape; a wrong parameter turns bursts into an even stream."""

    def variation(times: list[float]) -> float:
        gaps = [later - earlier for earlier, later in pairwise([0.0, *times])]
        return statistics.pvariance(gaps) / statistics.mean(gaps) ** 2

    for burstiness in (0.25, 1.0, 4.0):
        assert variation(arrivals.gamma(50_000, 10, burstiness, 3)) == pytest.approx(1 / burstiness, rel=0.1)
    assert variation(arrivals.constant(1000, 10)) == pytest.approx(0, abs=1e-9)


def test_a_ramp_begins_and_ends_at_its_rates() -> None:
    """A ramp that swaps its ends, or mixes the two shapes, overloads a server at the wrong time."""
    linear, exponential = arrivals.Ramp(2, 32, False).rates(5), arrivals.Ramp(2, 32, True).rates(5)
    assert linear.tolist() == [2, 9.5, 17, 24.5, 32] and exponential.tolist() == pytest.approx([2, 4, 8, 16, 32])
    assert arrivals.Ramp(2, 32, False).rates(1).tolist() == [2]
    times = arrivals.ramp(20_000, arrivals.Ramp(10, 40, False), 1.0, 0)
    first, last = times[2000] / 2000, (times[-1] - times[-2001]) / 2000
    assert first == pytest.approx(1 / 11.5, rel=0.1) and last == pytest.approx(1 / 38.5, rel=0.1)


@given(st.lists(st.floats(0, 1e5), min_size=1, max_size=50), RATES)
def test_a_trace_keeps_its_pattern_at_another_rate(times: list[float], rate: float) -> None:
    """Only the scale changes: the busiest moment stays where it was."""
    scaled = arrivals.scaled_to_rate(times, rate)
    if max(times) > 1e-6:
        assert max(scaled) == pytest.approx(len(times) / rate)
        assert [time / max(times) for time in times] == pytest.approx([time / max(scaled) for time in scaled])


@given(st.lists(st.integers(0, 30), max_size=50), st.sampled_from([0.0, 3.0]), SEEDS)
def test_spreading_moves_an_arrival_within_its_tick(ticks: list[int], quantum: float, seed: int) -> None:
    """Moved further, the load of a minute is no longer its own; not at all, it comes in bursts that never were."""
    times = [quantum * tick for tick in ticks]
    moved = arrivals.spread(times, quantum, seed)
    assert all(0 <= new - old <= quantum for old, new in zip(times, moved, strict=True))


def test_nobody_waits_where_all_are_due_at_once() -> None:
    assert arrivals.all_at_once(3) == [0.0, 0.0, 0.0]
