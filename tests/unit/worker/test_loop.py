"""worker.loop: how a worker drains."""

from __future__ import annotations

from baton.worker.loop import DRAIN_NOTICE_S, Draining


def test_an_idle_worker_stays_until_the_proxies_know() -> None:
    """Guards requests on their way to a worker that has just been told to leave."""
    draining = Draining(30.0)
    assert not draining.is_over(idle=True, now=1e9)
    assert draining.begin(10.0) and draining.begun
    assert not draining.is_over(idle=True, now=10.0 + DRAIN_NOTICE_S / 2)
    assert draining.is_over(idle=True, now=10.0 + DRAIN_NOTICE_S)


def test_work_is_waited_for_as_long_as_told() -> None:
    """Guards running streams, and the bound on waiting for them; a second SIGTERM starts nothing anew."""
    draining = Draining(30.0)
    draining.begin(10.0)
    assert not draining.begin(20.0)
    assert not draining.is_over(idle=False, now=39.9)
    assert draining.is_over(idle=False, now=40.0)


def test_no_time_is_no_time() -> None:
    """Guards --drain-s 0: leave at once."""
    draining = Draining(0.0)
    draining.begin(10.0)
    assert draining.is_over(idle=False, now=10.0)
