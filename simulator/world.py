"""Simulated time: a heap of events, and an asyncio loop that jumps from one to the next instead of waiting.

Most events (a worker's step, a message between workers) are plain calls out of the heap and never touch asyncio; the
loop runs only when one of them made a coroutine ready. Equal times are served in the order in which they were set, so a
run depends on nothing but its inputs.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Sized
from itertools import count
from typing import Any

Call = Callable[..., object]


class Standstill(RuntimeError):
    """A task waits, and no event is due."""


class World:
    """The clock and the scheduled events, in seconds from 0."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events_done = 0
        self._heap: list[tuple[float, int, Call, tuple[Any, ...]]] = []
        self._order = count()

    def clock(self) -> float:
        return self.now

    def at(self, when: float, call: Call, *arguments: Any) -> None:
        """Schedule a call at `when`; a time in the past is due now."""
        heapq.heappush(self._heap, (when, next(self._order), call, arguments))

    def later(self, delay_s: float, call: Call, *arguments: Any) -> None:
        heapq.heappush(self._heap, (self.now + delay_s, next(self._order), call, arguments))

    def run(self, until: float, ready: Sized) -> None:
        """Run events up to `until` while no coroutine is ready; advance the clock to `until` if none became ready."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            when, _, call, arguments = heapq.heappop(heap)
            if when > self.now:
                self.now = when
            self.events_done += 1
            call(*arguments)
            if ready:
                return
        if until == float("inf"):
            raise Standstill(f"nothing is due after {self.now:.3f} s")
        self.now = max(self.now, until)


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop whose time is the world's. `add_reader` keeps the callback: the network calls it."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.readers: dict[int, Callable[[], object]] = {}
        self._world = world
        self._selector = self  # BaseEventLoop asks its selector to wait, at one place

    def time(self) -> float:
        return self._world.now

    def select(self, timeout: float | None) -> list[object]:
        """Called by asyncio to wait: runs the world's events instead."""
        if timeout is None or timeout > 0:
            until = float("inf") if timeout is None else self._world.now + timeout
            self._world.run(until, self._ready)  # type: ignore[attr-defined]
        return []

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        assert not args, "the simulated loop keeps no arguments"
        self.readers[fd] = callback

    def remove_reader(self, fd: Any) -> bool:
        return self.readers.pop(fd, None) is not None

    # -- BaseEventLoop calls these

    def _process_events(self, event_list: list[object]) -> None:
        assert not event_list

    def _write_to_self(self) -> None:
        """Does nothing: no other thread wakes this loop."""
