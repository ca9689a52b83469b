"""The workers that arrivals fill: known before any latency shows them, linear in the rate, and not moved by chance."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from baton.proxy.routing.router import WorkerView
from baton.proxy.scaling.demand import ArrivalRate, Arrivals, RoleCapacity, busy_workers, capacities
from baton.proxy.scaling.law import RoleScaler

ARRIVALS = Arrivals(4.0, 4000, 1000, 0.0145, 0.00025)
CAPACITY = RoleCapacity(3, 120, 768, 14_700, 120 * 70, 3 / 6e-5)


def _rates(
    rate: float, seconds: int, begin: int = 0, seen: ArrivalRate | None = None
) -> tuple[ArrivalRate, list[float]]:
    """Even arrivals, with a look each second."""
    seen, looks = seen or ArrivalRate(), []
    for second in range(begin, begin + seconds):
        for number in range(round(rate)):
            seen.add(second + number / rate)
        looks.append(seen.rate(second + 1.0))
    return seen, looks


def test_a_step_of_the_rate_is_seen_in_seconds() -> None:
    """Guards the time that a new worker has to start in: a mean of a minute would take that long."""
    seen, before = _rates(4.0, 100)
    assert before[-1] == pytest.approx(4.0, rel=0.03)
    _, after = _rates(8.0, 30, 100, seen)
    assert after[9] > 5.5 and after[14] == pytest.approx(8.0, rel=0.05)


def test_chance_is_not_a_step() -> None:
    """Guards against a worker more for each burst of a Poisson process."""
    chance, seen, now, looks = random.Random(1), ArrivalRate(), 0.0, []
    while now < 600:
        now += chance.expovariate(6.0)
        seen.add(now)
        if now > 60:
            looks.append(seen.rate(now))
    looks.sort()
    assert looks[len(looks) // 20] > 5.0 and looks[-len(looks) // 20] < 7.0


def test_the_need_is_linear_in_the_rate() -> None:
    """Guards against latencies in the law, which grow with the load: half full workers would look like few."""
    one = busy_workers(CAPACITY, ARRIVALS, 0.1, prompts=True, answers=True)
    two = busy_workers(CAPACITY, replace(ARRIVALS, rate=8.0), 0.1, prompts=True, answers=True)
    assert two == pytest.approx(2 * one)
    assert one == pytest.approx(4 * (4000 * 6e-5 + 1000 * 0.00025 + 1000 * 0.0145 * 70 / 4900))


def test_each_role_is_asked_for_its_own_work() -> None:
    prompts = busy_workers(CAPACITY, ARRIVALS, 0.1, prompts=True, answers=False)
    answers = busy_workers(CAPACITY, ARRIVALS, 0.1, prompts=False, answers=True)
    assert prompts == pytest.approx(4 * 4000 * 6e-5)
    assert prompts + answers == pytest.approx(busy_workers(CAPACITY, ARRIVALS, 0.1, prompts=True, answers=True))
    tight = busy_workers(CAPACITY, ARRIVALS, 0.016, prompts=False, answers=True)
    assert tight > answers, "an objective close to a step asks for workers with few rows"


def test_nothing_is_known_without_workers_or_arrivals() -> None:
    assert busy_workers(RoleCapacity(), ARRIVALS, 0.1, prompts=True, answers=True) == 0.0
    assert busy_workers(CAPACITY, replace(ARRIVALS, rate=0.0), 0.1, prompts=True, answers=True) == 0.0


def test_capacities_are_those_of_workers_that_take_requests() -> None:
    worker = WorkerView("d0/1", "tcp://d0", "decode", False, 3, 0, 900, 1000, 64, 40_000.0)
    found = capacities([worker, replace(worker, identity="d1/1", draining=True), replace(worker, role="prefill")])
    assert found == {role: RoleCapacity(1, 3, 64, 1000, 100, 40_000.0) for role in ("decode", "prefill")}


def test_arrivals_add_workers_at_once_and_keep_them() -> None:
    """Guards the order: up with the rate, before latencies; down only when neither asks for the workers."""
    scaler = RoleScaler()
    for second in range(60):
        scaler.observe(0.2, 3, float(second), busy=2.6)
    scaler.observe(0.2, 3, 60.0, busy=4.3)
    assert scaler.desired == 5
    for second in range(61, 600):
        scaler.observe(0.2, 5, float(second), busy=4.3)
    assert scaler.desired == 5
    for second in range(600, 1200):
        scaler.observe(0.2, scaler.desired, float(second), busy=1.0)
    assert scaler.desired < 3
