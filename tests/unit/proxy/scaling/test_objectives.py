"""What is measured against the objectives, and which role answers for it."""

from __future__ import annotations

from baton.proxy.scaling.demand import RoleCapacity
from baton.proxy.scaling.objectives import LatencyObjectives, ScaleMonitor

STEP = (0.01, 0.0001)


def _workers(**ready: int) -> dict[str, RoleCapacity]:
    return {role: RoleCapacity(count, 0, 64 * count, 1000 * count, 0, 4e4 * count) for role, count in ready.items()}


def _served(monitor: ScaleMonitor, name: str, begin: float, ttft_s: float, tpot_s: float, tokens: int = 11) -> None:
    monitor.begin(name, begin)
    monitor.first_token(name, 100, begin + ttft_s)
    decoding_s = tpot_s * (tokens - 1)
    monitor.end(name, tokens, decoding_s, begin + ttft_s + decoding_s)


def test_latencies_are_measured_by_their_objectives() -> None:
    monitor = ScaleMonitor(LatencyObjectives(1.0, 0.1))
    for number in range(10):
        _served(monitor, str(number), float(number), ttft_s=0.5, tpot_s=0.03)
    assert monitor.saturations(11.0) == (0.5, 0.3)


def test_old_latencies_are_forgotten() -> None:
    monitor = ScaleMonitor(LatencyObjectives(1.0, 0.1))
    _served(monitor, "a", 0.0, ttft_s=0.5, tpot_s=0.03)
    assert monitor.saturations(100.0) == (0.0, 0.0)


def test_requests_that_wait_count_before_they_end() -> None:
    """Under overload the few that end early would otherwise say that all is well."""
    monitor = ScaleMonitor(LatencyObjectives(1.0, 0.1))
    for number in range(5):
        _served(monitor, f"done {number}", 0.0, ttft_s=0.1, tpot_s=0.03)
        monitor.begin(f"waiting {number}", 1.0)
    ttft, _ = monitor.saturations(4.0)
    assert ttft == 3.0
    for number in range(5):
        monitor.end(f"waiting {number}", 0, 0.0, 4.0)  # their clients have gone
    assert monitor.saturations(4.0)[0] == 0.1


def test_answers_of_one_token_say_nothing_of_tpot() -> None:
    monitor = ScaleMonitor(LatencyObjectives(1.0, 0.1))
    _served(monitor, "a", 0.0, ttft_s=0.1, tpot_s=0.0, tokens=1)
    assert monitor.saturations(1.0)[1] == 0.0


def test_decode_answers_for_both_where_there_is_no_prefill_worker() -> None:
    monitor = ScaleMonitor(LatencyObjectives(1.0, 0.1))
    _served(monitor, "a", 0.0, ttft_s=0.9, tpot_s=0.03)
    monitor.observe(_workers(decode=2), STEP, 2.0)
    (scale,) = monitor.scales()
    assert (scale.role, scale.saturation, scale.desired) == ("decode", 0.9, 2)
    monitor = ScaleMonitor(LatencyObjectives(1.0, 0.1))
    _served(monitor, "a", 0.0, ttft_s=0.9, tpot_s=0.03)
    monitor.observe(_workers(prefill=1, decode=2), STEP, 2.0)
    assert {scale.role: round(scale.saturation, 3) for scale in monitor.scales()} == {"prefill": 0.9, "decode": 0.3}


def test_a_role_whose_workers_are_gone_is_still_desired() -> None:
    monitor = ScaleMonitor(LatencyObjectives(1.0, 0.1))
    monitor.observe(_workers(prefill=1, decode=2), STEP, 0.0)
    monitor.observe(_workers(decode=2), STEP, 1.0)
    assert {scale.role: scale.desired for scale in monitor.scales()} == {"prefill": 1, "decode": 2}
