"""Adapters in a simulated cluster: which one a request names, and how long a worker takes to have it.

The worker's own code keeps adapters, chooses slots and waits; only the thread that reads folders and the copies into
slots are replaced, by times.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from baton.models.adapters.fills import Fill, PreparedAdapter
from baton.node.messages.control import AdapterRef
from baton.proxy.routing.adapter_places import RequestAdapter
from baton.simulator.workload import SimRequest
from baton.simulator.world import World
from baton.worker.adapter_slots import AdapterRead
from baton.worker.adapters import WorkerAdapters

RANK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTraffic:
    """Adapters of one size, some asked for more often than others; and the room that each worker has for them."""

    count: int
    zipf: float = 1.0
    """Number k of them is asked for as often as k to the power of minus this says; 0: all as often."""
    size_bytes: int = 84_000_000
    """Of each: rank 16 in all projections of an 8B model."""
    num_slots: int = 32
    max_in_memory: int = 128
    read_bytes_s: float = 0.5e9
    """From a folder to the host's memory, with the digest."""
    fill_bytes_s: float = 51e9
    """From there to a slot: 84 MB in 1.64 ms on one H200 (docs/benchmarks/adapters.md)."""
    step_bytes_s: float = 4.2e12
    """Each adapter of a step is read once. The time of more launches is left out."""

    def named(self, requests: Sequence[SimRequest], seed: int) -> list[SimRequest]:
        """The requests, each with an adapter."""
        chance = random.Random(seed)
        weights = list(accumulate((number + 1) ** -self.zipf for number in range(self.count)))
        drawn = chance.choices(range(self.count), cum_weights=weights, k=len(requests))
        return [replace(each, adapter=number) for each, number in zip(requests, drawn, strict=True)]

    def adapter(self, number: int) -> RequestAdapter:
        digest = hashlib.sha256(b"simulated adapter %d" % number).digest()
        return RequestAdapter(AdapterRef(digest, str(number)), RANK, self.size_bytes)


@dataclass(frozen=True, slots=True)
class _SimFill:
    world: World
    ends_at: float

    @property
    def done(self) -> bool:
        return self.world.now >= self.ends_at


@dataclass(frozen=True, slots=True)
class _SimPrepared:
    digest: bytes
    size_bytes: int


class SimSlots:
    """models.adapters.fills.FillableSlots: a fill takes its time. Copies follow one another."""

    def __init__(self, world: World, traffic: AdapterTraffic) -> None:
        self.num_slots = traffic.num_slots
        self.filled: set[bytes] = set()
        """All that were in a slot at some time."""
        self._world, self._traffic, self._free_at = world, traffic, 0.0

    def fill(self, slot: int, adapter: PreparedAdapter) -> Fill:
        assert isinstance(adapter, _SimPrepared), "made by the reader below"
        self.filled.add(adapter.digest)
        self._free_at = max(self._free_at, self._world.now) + adapter.size_bytes / self._traffic.fill_bytes_s
        return _SimFill(self._world, self._free_at)


class _SimThread(Executor):
    """Reads one folder after another."""

    def __init__(self, world: World, read_s: float) -> None:
        self._world, self._read_s, self._free_at = world, read_s, 0.0

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        self._free_at = max(self._free_at, self._world.now) + self._read_s
        self._world.at(self._free_at, call, *arguments)
        return Future()


def sim_adapters(
    world: World,
    slots: SimSlots,
    traffic: AdapterTraffic,
    clock: Callable[[], float],
    on_read: Callable[[AdapterRead], None],
) -> WorkerAdapters:
    """Of one worker."""
    by_path = {Path(str(number)): traffic.adapter(number).ref.digest for number in range(traffic.count)}

    def read(path: Path) -> tuple[bytes, PreparedAdapter]:
        return by_path[path], _SimPrepared(by_path[path], traffic.size_bytes)

    thread = _SimThread(world, traffic.size_bytes / traffic.read_bytes_s)
    return WorkerAdapters(slots, read, traffic.max_in_memory, on_read, clock, thread)
