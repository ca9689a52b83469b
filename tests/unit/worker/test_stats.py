"""worker.stats: the measured speed that the router compares, and consecutive stages without gaps."""

from __future__ import annotations

from baton.node.messages.control import Stages
from baton.worker.stats import PromptSpeed, StageTimes


def test_small_steps_do_not_count() -> None:
    """Guards against rating a worker as slow because most of its prompts were cached."""
    speed = PromptSpeed(100)
    speed.add_step(49, 1.0)
    speed.add_step(100, 0.0)
    assert speed.tokens_s == 0.0
    speed.add_step(50, 0.1)
    assert speed.tokens_s == 500.0
    speed.add_step(5, 1.0)
    assert speed.tokens_s == 500.0


def test_speed_follows_a_change() -> None:
    """Guards against an average over the whole past: a slower machine shows within some steps."""
    speed = PromptSpeed(100)
    for _ in range(100):
        speed.add_step(100, 0.1)
    assert abs(speed.tokens_s - 1000.0) < 1e-6
    for _ in range(20):
        speed.add_step(100, 1.0)
    assert 100.0 < speed.tokens_s < 150.0


def test_loading_from_a_tier_is_not_queue_time() -> None:
    """Guards against reporting the same seconds in two stages."""
    times = StageTimes(received_at=10.0)
    times.tier_load_s, times.loaded_tokens = 1.5, (16, 0, 0)
    times.begin(14.0)
    times.begin(15.0)  # a later chunk
    assert times.prefilled(16.0) == Stages(queue_s=2.5, tier_load_s=1.5, prefill_s=2.0, loaded_tokens=(16, 0, 0))


def test_a_leg_without_a_transfer_reports_exactly_twice() -> None:
    """Guards against stages of a later step, which would be read as the gap between the first two tokens."""
    times = StageTimes(received_at=10.0)
    times.begin(11.0)
    assert times.drew(11.0, 12.0) == Stages(queue_s=1.0, prefill_s=1.0) and times.open
    assert times.drew(12.5, 13.0) == Stages(admission_s=0.5, step_s=0.5) and not times.open


def test_a_handed_over_leg_reports_once() -> None:
    """Guards against reporting decode's first step as prefill."""
    times = StageTimes(received_at=10.0)
    times.arrive(11.0, wait_s=0.25, transfer_s=0.5)
    times.begin(12.0)
    stages = times.drew(12.0, 12.5)
    assert stages == Stages(transfer_wait_s=0.25, transfer_s=0.5, admission_s=1.0, step_s=0.5) and not times.open


def test_no_duration_is_negative() -> None:
    """Guards against messages out of bounds: a load longer than the wait, a step before the arrival."""
    times = StageTimes(received_at=10.0)
    times.tier_load_s = 5.0
    assert times.prefilled(9.0) == Stages(tier_load_s=5.0)
    times.arrive(12.0, 0.0, 0.0)
    assert times.drew(11.0, 10.5) == Stages()
