"""simulator.world: time advances by events only, also for asyncio code."""

from __future__ import annotations

import asyncio

import pytest

from baton.simulator.world import Standstill, VirtualLoop, World


def test_events_at_equal_times_keep_their_order() -> None:
    """Guards determinism: events scheduled first run first."""
    world, seen = World(), list[str]()
    world.at(2.0, seen.append, "c")
    world.at(1.0, seen.append, "a")
    world.at(1.0, seen.append, "b")
    world.run(5.0, ())
    assert (seen, world.now) == (["a", "b", "c"], 5.0)


def test_an_event_in_the_past_is_due_now() -> None:
    """Guards against a clock that runs backwards."""
    world, seen = World(), list[float]()
    world.at(3.0, lambda: world.at(1.0, lambda: seen.append(world.now)))
    world.run(3.0, ())
    assert seen == [3.0]


def test_hours_are_skipped_in_order() -> None:
    """Guards the event loop: sleeps, timeouts and the world's events share one clock."""
    world = World()
    loop = VirtualLoop(world)
    seen: list[tuple[str, float]] = []

    async def sleeper(name: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        seen.append((name, loop.time()))

    async def main() -> None:
        event = asyncio.Event()
        world.at(5000.0, event.set)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(event.wait(), 10.0)
        await asyncio.gather(sleeper("b", 7200.0), sleeper("a", 3600.0))
        assert event.is_set()

    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
    assert [name for name, _ in seen] == ["a", "b"]
    assert [at for _, at in seen] == pytest.approx([3610.0, 7210.0], abs=1e-6)


def test_waiting_with_no_event_due_is_an_error() -> None:
    """Guards against a simulation that hangs with a waiter and no event due."""
    loop = VirtualLoop(World())
    try:
        with pytest.raises(Standstill):
            loop.run_until_complete(asyncio.Event().wait())
    finally:
        loop.close()
