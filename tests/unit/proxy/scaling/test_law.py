"""The law of replicas: it follows the load, is not answered twice, does not flap, and stays within its rates."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from baton.proxy.scaling.law import RoleScaler, ScalingRules


def _run(scaler: RoleScaler, saturation: float, ready: int, begin: float, seconds: int) -> list[int]:
    """One look a second."""
    desired = []
    for second in range(seconds):
        scaler.observe(saturation, ready, begin + second)
        desired.append(scaler.desired)
    return desired


def test_workers_that_are_there_are_desired_while_the_load_fits_them() -> None:
    assert _run(RoleScaler(), 0.5, 3, 0.0, 600) == [3] * 600


def test_nothing_is_desired_before_the_first_worker_is_there() -> None:
    assert _run(RoleScaler(), 2.0, 0, 0.0, 100) == [0] * 100


def test_saturation_adds_what_brings_it_below_the_bound() -> None:
    scaler = RoleScaler()
    _run(scaler, 0.5, 3, 0.0, 60)
    desired = _run(scaler, 0.8, 3, 60.0, 60)
    assert desired[0] == 3  # a single look is no trend
    assert desired[-1] == 5  # 3 * 0.8 / 0.55 = 4.4


def test_workers_on_their_way_count_against_the_need() -> None:
    """Else one step of the load would be answered again and again until the first new worker is ready."""
    scaler = RoleScaler()
    _run(scaler, 0.8, 3, 0.0, 60)
    assert scaler.desired == 5
    assert _run(scaler, 0.8, 3, 60.0, 60)[-1] == 5


def test_workers_that_never_come_are_desired_no_more() -> None:
    """The bound of an autoscaler was reached, or a worker fails at its start: the law must not count on it."""
    rules = ScalingRules(start_s=100.0)
    scaler = RoleScaler(rules)
    _run(scaler, 0.8, 3, 0.0, 60)
    assert scaler.desired == 5
    assert min(_run(scaler, 0.5, 3, 60.0, 200)) == 3


def test_a_burst_is_bounded() -> None:
    scaler = RoleScaler()
    _run(scaler, 0.5, 2, 0.0, 60)
    assert max(_run(scaler, 50.0, 2, 60.0, 60)) <= 6  # four more, where the formula asks for twelve


def test_one_peak_is_forgotten_after_the_mean() -> None:
    """A latency of ninety objectives must not keep the mean up for longer than one of two."""
    scaler = RoleScaler()
    _run(scaler, 0.3, 3, 0.0, 60)
    scaler.observe(90.0, 3, 60.0)
    assert scaler.saturation < 0.45


def test_workers_are_removed_one_by_one_and_late() -> None:
    scaler = RoleScaler()
    _run(scaler, 0.5, 6, 0.0, 60)
    desired = _run(scaler, 0.1, 6, 60.0, 600)
    assert desired[100] == 6
    falls = [second for second in range(1, 600) if desired[second] < desired[second - 1]]
    assert falls[0] >= 120
    assert all(desired[second - 1] - desired[second] == 1 for second in falls)
    assert all(later - earlier >= 60 for earlier, later in pairwise(falls))


def test_a_calm_minute_within_the_window_removes_nothing() -> None:
    scaler = RoleScaler()
    _run(scaler, 0.5, 4, 0.0, 200)
    _run(scaler, 0.1, 4, 200.0, 100)
    assert min(_run(scaler, 0.5, 4, 300.0, 300)) == 4


@given(st.lists(st.tuples(st.floats(0.0, 100.0), st.integers(0, 12)), min_size=1, max_size=300))
def test_it_never_asks_for_less_than_one_nor_more_than_a_burst(looks: list[tuple[float, int]]) -> None:
    """Whatever is reported: the service does not go, and no report adds workers without a bound."""
    scaler = RoleScaler()
    for second, (saturation, ready) in enumerate(looks):
        before, seen = scaler.desired, max([ready, scaler.desired])
        scaler.observe(saturation, ready, float(second))
        assert 0.0 <= scaler.saturation <= 2.0
        if before:
            assert 1 <= scaler.desired <= max(before, seen) + max(before, 4)
