"""One run: a cluster of real code on a simulated clock, clients that send a workload, and the clients' records."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from baton.node.errors import BatonError
from baton.node.messages.base import Role
from baton.node.messages.control import SamplingSpec
from baton.proxy.dispatcher import Dispatcher
from baton.proxy.interface import Generation
from baton.proxy.metrics.timeline import Timeline
from baton.proxy.settings import ProxySettings
from baton.simulator.adapters import AdapterTraffic
from baton.simulator.host import PROXY, Host, Sharing
from baton.simulator.latency import Profile
from baton.simulator.network import Network, SimLine
from baton.simulator.parallel import ONE, WorkerSize, of_size
from baton.simulator.ramp import Autoscale
from baton.simulator.record import RequestRecord
from baton.simulator.runner import token_of
from baton.simulator.store import Capacity, HostStore
from baton.simulator.workload import SimRequest
from baton.simulator.world import VirtualLoop, World

MODEL = "simulated"
SETTLE_S = 1.0
"""Workers register in this time, before the first request."""
LOOK_S = 0.5
READS_EVENTS = ("kv-aware",)
"""Routing policies for which it matters when a worker reports a block that a step has filled."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Worker `name` is killed this long after the first arrival."""

    at_s: float
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A cluster. Prefill workers are called p0, p1 ..., decode workers d0, d1 ..., mixed ones m0, m1 ..."""

    profile: Profile
    prefill: int = 0
    decode: int = 0
    mixed: int = 0
    prefill_size: WorkerSize = ONE
    decode_size: WorkerSize = ONE
    """Of decode and mixed workers."""
    proxy: ProxySettings = field(default_factory=ProxySettings)
    prefill_policy: str = "fcfs"
    losses: tuple[Loss, ...] = ()
    autoscale: Autoscale | None = None
    """Of the decode or mixed workers, of which there are `least` at the begin; the run ends when so many are left."""
    store: Capacity | None = None
    """Of the store that each host has; its workers are as many as the profile says, of both roles."""
    store_loads: str = "measured"
    adapters: AdapterTraffic | None = None
    """None: no request has one."""
    ahead: bool = True
    """Leave workers alone while their steps are alike, unless the router must hear of their blocks after each step; the
    records are the same without, and take longer."""
    late_events: bool = False
    """Leave them alone even so: the router hears of blocks of such steps up to a heartbeat late."""


@dataclass(frozen=True, slots=True)
class SimOutcome:
    """What a run gave: its requests, what the nodes counted, and how much was simulated."""

    records: tuple[RequestRecord, ...]
    counters: Mapping[str, float]
    """Of the proxy."""
    busy: Mapping[str, float]
    """Seconds that each worker has spent in steps, by name."""
    work: Mapping[str, float]
    """The workers' own counters, summed, those of killed workers included."""
    events: int
    messages: int
    moved_bytes: int
    simulated_s: float
    stopped: bool = False
    """Before the end, by the caller's wish."""
    levels: tuple[tuple[float, int], ...] = ()
    """How many workers were there or starting, of those that are scaled, from the times on at which that changed."""
    adapters_filled: Mapping[str, int] = field(default_factory=dict)
    """How many adapters were in slots of each worker at some time, by name."""


Stop = Callable[[Sequence[RequestRecord], float], bool]
"""Whether to end a run early: of the requests sent so far, and the time on their clock."""


def simulate(
    scenario: Scenario, requests: Sequence[SimRequest], stop: Stop = lambda records, now_s: False
) -> SimOutcome:
    """Run the workload until every request has been served or has failed and no worker holds a block, or to `stop`."""
    return _Simulation(scenario).run(requests, stop)


class _Simulation:
    def __init__(self, scenario: Scenario) -> None:
        profile = scenario.profile
        self._scenario = scenario
        sizes = {True: scenario.prefill_size, False: scenario.decode_size}
        by_layer = any(size.stages > 1 for size in sizes.values())
        shared = any(size != ONE for size in sizes.values())
        self._sizes = {
            is_prefill: (of_size(profile, size), Sharing(size, by_layer) if shared else None)
            for is_prefill, size in sizes.items()
        }
        """Of prefill workers, and of others."""
        self._world = World()
        self._network = Network(self._world, profile.message_s, profile.chunk_s, profile.link_bytes_s)
        self._hosts: dict[str, Host] = {}
        self._stores: list[HostStore] = []
        self._records: list[RequestRecord] = []
        self._clients: set[asyncio.Task[None]] = set()
        self._levels: list[tuple[float, int]] = []
        self._scaled: set[str] = set()
        self._num_started = 0
        self._leaving: set[str] = set()
        self._loop = VirtualLoop(self._world)
        self._line = SimLine(self._network, PROXY, self._proxy_ready)

    def run(self, requests: Sequence[SimRequest], stop: Stop) -> SimOutcome:
        try:
            return self._loop.run_until_complete(self._main(requests, stop))
        finally:
            self._loop.close()

    async def _main(self, requests: Sequence[SimRequest], stop: Stop) -> SimOutcome:
        dispatcher = Dispatcher(self._line, self._scenario.proxy, [MODEL], self._world.clock)
        dispatcher.start()
        self._start_hosts()
        begin = SETTLE_S - (requests[0].arrival_s if requests else 0.0)
        for loss in self._scenario.losses:
            self._world.at(SETTLE_S + loss.at_s, self._kill, loss.name)
        for request in requests:
            self._world.at(begin + request.arrival_s, self._send, dispatcher, request, begin)
        if self._scenario.autoscale is not None:
            self._world.at(SETTLE_S, self._scale, dispatcher, self._scenario.autoscale)
        stopped = False
        while self._clients or len(self._records) < len(requests) or self._scales_down():
            await asyncio.sleep(LOOK_S)
            if stopped := stop(self._records, self._world.now - begin):
                break
        if stopped:
            await self._give_up()
        else:
            await self._at_rest()
        counters = dict(dispatcher.counters())
        simulated_s = self._world.now
        await dispatcher.stop()
        return SimOutcome(
            records=tuple(sorted(self._records, key=lambda record: record.request.number)),
            counters=counters,
            busy={name: host.runner.busy_s for name, host in self._hosts.items()},
            work=sum((Counter(host.load.counters) for host in self._hosts.values()), Counter()),
            events=self._world.events_done,
            messages=self._network.messages,
            moved_bytes=self._network.moved_bytes,
            simulated_s=simulated_s,
            stopped=stopped,
            levels=tuple(self._levels),
            adapters_filled={name: len(host.adapters_filled) for name, host in self._hosts.items()},
        )

    # -- the cluster

    def _start_hosts(self) -> None:
        """Start workers one after the other, so that their heartbeats are spread as in real processes."""
        roles: list[tuple[str, Role]] = [(f"p{n}", "prefill") for n in range(self._scenario.prefill)]
        roles += [(f"d{n}", "decode") for n in range(self._scenario.decode)]
        roles += [(f"m{n}", "mixed") for n in range(self._scenario.mixed)]
        profile, capacity = self._scenario.profile, self._scenario.store
        num_stores = -(-len(roles) // profile.store.host_workers) if capacity is not None else 0
        if capacity is not None:
            self._stores = [HostStore(self._network, f"s{n}", PROXY, profile, capacity) for n in range(num_stores)]
        self._scaled, self._num_started = {name for name, role in roles if role != "prefill"}, len(roles)
        for number, (name, role) in enumerate(roles):
            store = self._stores[number % num_stores] if num_stores else None
            self._world.later(number / len(roles) * SETTLE_S / 2, self._start_host, name, role, store)

    def _start_host(self, name: str, role: Role, store: HostStore | None) -> None:
        self._hosts[name] = Host(
            self._network,
            name,
            role,
            *self._sizes[role == "prefill"],
            self._scenario.prefill_policy,
            self._scenario.ahead and (self._scenario.late_events or self._scenario.proxy.policy not in READS_EVENTS),
            store,
            self._scenario.store_loads,
            self._scenario.adapters,
        )

    def _scale(self, dispatcher: Dispatcher, bounds: Autoscale) -> None:
        """The autoscaler: one look a second at what the proxy asks for."""
        role: Role = "mixed" if self._scenario.mixed else "decode"
        desired = [scale.desired for scale in dispatcher.scales()[MODEL] if scale.role == role]
        for name in [name for name in self._leaving if self._hosts[name].loop.drained]:
            self._leaving.discard(name)
            self._hosts[name].kill()
            self._scaled.discard(name)
        staying = sorted(self._scaled - self._leaving, key=lambda name: int(name[1:]))
        wanted = min(bounds.most, max(bounds.least, *desired)) if desired else len(staying)
        for _ in range(wanted - len(staying)):
            name = f"{role[0]}{self._num_started}"
            self._num_started += 1
            self._scaled.add(name)
            self._world.later(bounds.start_s, self._start_host, name, role, None)
        for name in staying[wanted:]:
            if name in self._hosts:
                self._leaving.add(name)
                self._hosts[name].drain()
        if not self._levels or self._levels[-1][1] != len(self._scaled):
            self._levels.append((self._world.now - SETTLE_S, len(self._scaled)))
        self._world.later(1.0, self._scale, dispatcher, bounds)

    def _scales_down(self) -> bool:
        bounds = self._scenario.autoscale
        return bounds is not None and len(self._scaled) > bounds.least

    def _kill(self, name: str) -> None:
        self._hosts[name].kill()

    def _proxy_ready(self) -> None:
        for callback in list(self._loop.readers.values()):
            callback()

    async def _give_up(self) -> None:
        """End the clients; what workers hold goes with them."""
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _at_rest(self) -> None:
        """Let the last cancelled requests end; then check that every block is accounted for and none is held."""
        alive = [host for host in self._hosts.values() if host.alive]
        for _ in range(240):
            if all(host.load.running + host.load.waiting == 0 for host in alive):
                break
            await asyncio.sleep(LOOK_S)
        await asyncio.sleep(LOOK_S)
        for host in alive:
            host.loop.check()
        for store in self._stores:
            store.check()

    # -- clients

    def _send(self, dispatcher: Dispatcher, request: SimRequest, begin: float) -> None:
        record = RequestRecord(request)
        self._records.append(record)
        task = self._loop.create_task(self._client(dispatcher, record, begin))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _client(self, dispatcher: Dispatcher, record: RequestRecord, begin: float) -> None:
        request, profile = record.request, self._scenario.profile
        await asyncio.sleep(profile.request_s)
        request_id, seed = f"r{request.number}", request.number << 20
        traffic = self._scenario.adapters
        generation = Generation(
            request_id=request_id,
            model=MODEL,
            prompt_ids=request.prompt_ids(),
            sampling=SamplingSpec(max_tokens=request.output_tokens, seed=seed),
            tenant=request.tenant,
            adapter=None if traffic is None or request.adapter is None else traffic.adapter(request.adapter),
            expected_tokens=request.output_tokens,
        )
        timeline, timeout_s = Timeline(self._world.clock), self._scenario.proxy.request_timeout_s
        stream = dispatcher.generate(generation, timeline, timeout_s=timeout_s)
        try:
            async with aclosing(stream):
                async for delta in (delta async for together in stream for delta in together):
                    expected = range(seed + len(record.token_s), seed + len(record.token_s) + len(delta.ids))
                    assert delta.ids == tuple(token_of(token, 0) for token in expected), "a token is not its own"
                    times = self._network.times_of(request_id, len(record.token_s), len(delta.ids))
                    record.token_s += [time_s + profile.stream_s - begin for time_s in times]
                    record.cached_tokens = delta.cached_tokens
            assert len(record.token_s) == request.output_tokens, "tokens are missing, or too many"
        except BatonError as error:
            record.error = f"{type(error).__name__}: {error}"
        finally:
            self._network.forget(request_id)
