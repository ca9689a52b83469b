"""worker.speed: what the router may believe about how fast a worker is."""

from __future__ import annotations

from baton.worker.speed import PromptSpeed


def test_small_steps_say_nothing() -> None:
    """Guards against shunning a worker for computing only what it had not cached."""
    speed = PromptSpeed(100)
    speed.step(49, 1.0)
    speed.step(100, 0.0)
    assert speed.tokens_s == 0.0
    speed.step(50, 0.1)
    assert speed.tokens_s == 500.0
    speed.step(5, 1.0)
    assert speed.tokens_s == 500.0


def test_it_follows_a_change() -> None:
    """Guards against an average over all of the past: a machine that slows down is noticed within some steps."""
    speed = PromptSpeed(100)
    for _ in range(100):
        speed.step(100, 0.1)
    assert abs(speed.tokens_s - 1000.0) < 1e-6
    for _ in range(20):
        speed.step(100, 1.0)
    assert 100.0 < speed.tokens_s < 150.0
