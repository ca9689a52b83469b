"""The engine behind the HTTP side: admission, sessions, and the workers' messages brought to the sessions they concern.

It owns the table of sessions and the queue before the workers. Requests are let in one after the other, in order, so a
small one never starves a large one; the queue is bounded, and who finds it full is told to come again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from baton.node.errors import DeadlineExceeded, Overloaded, PeerLost
from baton.node.messages.base import Message
from baton.node.messages.control import Cancel
from baton.proxy.control import ControlPlane, ControlSocket, LegMessage
from baton.proxy.interface import Delta, Generation, WorkerStatus
from baton.proxy.metrics.timeline import Timeline
from baton.proxy.routing.cluster import ClusterShape, ClusterState, Leg
from baton.proxy.routing.kvfeed import KvFeed
from baton.proxy.routing.kvindex import KvIndex
from baton.proxy.routing.router import CHOICE_REASONS, RequestView, Route, RoutingRules, Wait, pick
from baton.proxy.session import Event, ProxyStopping, Session, WorkerLost
from baton.proxy.settings import ProxySettings

NO_WORKER_GRACE_S = 5.0
"""A role whose last worker is gone gets so long to come back, for all requests together, before they are failed."""
LOOK_AGAIN_S = 0.1
LAST_WORDS_S = 2.0
"""For telling the clients of unfinished requests, and the workers, that the proxy goes."""

COUNTERS = (
    "requests_total",
    "retries_total",
    "busy_total",
    "worker_lost_total",
    "rejected_queue_full_total",
    "routed_disaggregated_total",
    "routed_local_short_total",
    "routed_local_sooner_total",
    "routed_local_always_total",
    "routed_local_no_prefill_worker_total",
    *(f"routed_{role}_{why}_total" for role in ("prefill", "decode") for why in CHOICE_REASONS),
    "kv_hit_predicted_tokens_total",
    "kv_hit_actual_tokens_total",
    "kv_hit_missed_tokens_total",
    "kv_hit_unforeseen_tokens_total",
)


class Dispatcher:
    """Implements proxy.interface.Engine and proxy.session.SessionHost. Lives in one event loop."""

    def __init__(
        self, line: ControlSocket, settings: ProxySettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._rules = RoutingRules(
            settings.policy,
            settings.local_prefill,
            settings.local_prefill_tokens,
            settings.local_prefill_itl_weight,
        )
        self._cluster = ClusterState(settings.stall_s)
        self._index = KvIndex(settings.kv_index_blocks)
        self._feed = KvFeed(self._index)
        self._control = ControlPlane(
            line, self._cluster, self._feed, self._on_message, self._on_lost, self._on_change, clock
        )
        self._inboxes: dict[str, asyncio.Queue[Event]] = {}
        self._counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self._gate = asyncio.Lock()  # fair: first come, first served
        self._changed = asyncio.Event()
        self._waiting = 0
        self._turn = 0
        self._draining = False
        self._stopping = False
        self._started_at = self._clock()

    def start(self) -> None:
        self._control.start()

    async def stop(self) -> None:
        """Let running requests end, for at most `drain_s`, fail and cancel the others, then close."""
        self._draining = True
        await self._requests_end(self._settings.drain_s)
        self._stopping = True
        for inbox in self._inboxes.values():
            inbox.put_nowait(ProxyStopping())
        self._changed.set()
        await self._requests_end(LAST_WORDS_S)
        await self._control.stop()

    async def _requests_end(self, wait_s: float) -> None:
        until = self._clock() + wait_s
        while self._inboxes and self._clock() < until:
            await asyncio.sleep(LOOK_AGAIN_S)

    # -- Engine

    def generate(self, generation: Generation, timeline: Timeline, *, timeout_s: float) -> AsyncGenerator[Delta, None]:
        self._turn += 1
        session = Session(
            self,
            generation,
            timeline,
            deadline=self._clock() + timeout_s,
            turn=self._turn,
            max_attempts=self._settings.max_attempts,
            clock=self._clock,
        )
        return session.run()

    def ready(self) -> str:
        if self._draining:
            return "shutting down"
        if self._cluster.shape is None:
            return "no worker has registered"
        route = pick(self._cluster.view(), RequestView(1 << 20, 0, 0), self._rules)
        return route.reason if isinstance(route, Wait) and route.missing else ""

    @property
    def max_model_len(self) -> int:
        shape = self._cluster.shape
        return shape.max_model_len if shape is not None else 0

    def worker_loads(self) -> list[WorkerStatus]:
        return self._cluster.statuses()

    def counters(self) -> Mapping[str, float]:
        counts = self._feed.counts
        return {
            **self._counters,
            "rejected_messages_total": self._control.rejected,
            "queued_requests": self._waiting,
            "kv_index_blocks": len(self._index),
            "kv_index_evictions_total": self._index.evicted,
            "kv_event_batches_total": counts.batches,
            "kv_event_blocks_total": counts.blocks,
            "kv_event_gaps_total": counts.gaps,
            "kv_event_replays_total": counts.replays,
            "kv_event_snapshots_total": counts.snapshots,
        }

    # -- SessionHost

    @contextmanager
    def registered(self, request_id: str, inbox: asyncio.Queue[Event]) -> Iterator[None]:
        if self._draining:
            raise PeerLost("the proxy is shutting down")
        self.count("requests_total")
        assert request_id not in self._inboxes, request_id
        self._inboxes[request_id] = inbox
        try:
            yield
        finally:
            del self._inboxes[request_id]

    async def admit(
        self, view_of: Callable[[ClusterShape], RequestView], deadline: float, *, first: bool
    ) -> tuple[Route, ClusterShape]:
        """Wait, in turn, until the router finds a place. Raises Overloaded, PeerLost, DeadlineExceeded.

        Only a first attempt may find the queue full: a stream that lost its worker has begun already.
        """
        if first and self._waiting >= self._settings.max_queue:
            self.count("rejected_queue_full_total")
            raise Overloaded(f"{self._waiting} requests are waiting already")
        self._waiting += 1
        try:
            async with asyncio.timeout_at(self._loop_time(deadline)), self._gate:
                return await self._find_route(view_of)
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed before a worker had room for it") from None
        finally:
            self._waiting -= 1

    async def _find_route(self, view_of: Callable[[ClusterShape], RequestView]) -> tuple[Route, ClusterShape]:
        while True:
            self._changed.clear()
            shape = self._cluster.last_shape
            if shape is None:
                raise PeerLost("no worker is there")
            request = view_of(shape)
            seen = replace(request, hits=self._index.match(request.hashes))
            route = pick(self._cluster.view(), seen, self._rules)
            if isinstance(route, Route):
                return route, shape
            if self._stopping:
                raise PeerLost("the proxy is shutting down")
            if route.missing and self._clock() - self._had_at(route.missing) >= NO_WORKER_GRACE_S:
                raise PeerLost(route.reason)
            try:
                await asyncio.wait_for(self._changed.wait(), LOOK_AGAIN_S)
            except TimeoutError:
                continue

    def _had_at(self, role: str) -> float:
        return max(self._cluster.had_at(role), self._started_at)

    def open_leg(self, leg: Leg, message: Message) -> None:
        self._cluster.assign(leg)
        self._feed.expect(leg.worker, leg.request_id, leg.hashes)
        self._control.send(leg.worker, message)

    def prompt_computed(self, worker: str, request_id: str) -> None:
        self._cluster.prompt_computed(worker, request_id)

    def close_leg(self, worker: str, request_id: str, *, computed: bool, cancel: Cancel | None = None) -> None:
        if cancel is not None:
            self._control.send(worker, cancel)
        self._cluster.settle(worker, request_id)
        self._feed.settle(worker, request_id, self._clock(), computed=computed)
        self._changed.set()

    def count(self, name: str, amount: int = 1) -> None:
        self._counters[name] += amount

    # -- told by the wire

    def _on_message(self, worker: str, message: LegMessage) -> None:
        if (inbox := self._inboxes.get(message.request_id)) is not None:
            inbox.put_nowait((worker, message))

    def _on_lost(self, worker: str, reason: str) -> None:
        self.count("worker_lost_total")
        for inbox in self._inboxes.values():
            inbox.put_nowait(WorkerLost(worker, reason))
        self._changed.set()

    def _on_change(self) -> None:
        self._changed.set()

    def _loop_time(self, deadline: float) -> float:
        """A deadline of our clock on the event loop's."""
        return asyncio.get_running_loop().time() + deadline - self._clock()
