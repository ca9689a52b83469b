"""The engine behind the HTTP side: it makes a session of each generation and brings it the workers' messages.

It owns the table of sessions and the counters; the queue before the workers is `routing.admission`, one a model.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from baton.node.errors import BadRequest, DeadlineExceeded, PeerLost
from baton.node.membership import HEARTBEAT_S
from baton.node.messages.control import AdapterLoaded, Cancel, Failed, Prefill, Reserve
from baton.node.messages.versions import NotInVersion
from baton.proxy.adapter_loads import AdapterLoads
from baton.proxy.control import ControlPlane, ControlSocket, LegMessage
from baton.proxy.inbox import Turns
from baton.proxy.interface import Delta, Generation, WorkerStatus
from baton.proxy.metrics.timeline import Timeline
from baton.proxy.routing.adapter_places import RequestAdapter
from baton.proxy.routing.admission import Admission, ViewOf
from baton.proxy.routing.cluster import ClusterState
from baton.proxy.routing.failed_pairs import FailedPairs, Pair
from baton.proxy.routing.fair_queue import Ticket
from baton.proxy.routing.kvfeed import KvFeed
from baton.proxy.routing.kvindex import KvIndex
from baton.proxy.routing.model_workers import ClusterShape, Leg
from baton.proxy.routing.roles import MixedRoles
from baton.proxy.routing.router import CHOICE_REASONS, Route, RoutingRules
from baton.proxy.scaling.demand import capacities
from baton.proxy.scaling.objectives import LatencyObjectives, RoleScale, ScaleMonitor
from baton.proxy.session import Session
from baton.proxy.session_host import Event, ProxyStopping, WorkerLost
from baton.proxy.settings import ProxySettings

POLL_S = 0.1
SESSIONS_A_TURN = 32
"""Each takes the event loop 30 us for one token, 10 us for each of several: what else it has to do waits 1 to 6 ms."""
LAST_MESSAGES_S = 2.0
"""For telling the clients of unfinished requests, and the workers, that the proxy stops."""

COUNTERS = (
    "requests_total",
    "retries_total",
    "busy_total",
    "paused_total",
    "resumed_total",
    "worker_lost_total",
    "routed_disaggregated_total",
    "routed_local_short_total",
    "routed_local_sooner_total",
    "routed_local_transfer_failed_total",
    "routed_local_always_total",
    "routed_local_no_prefill_worker_total",
    *(f"routed_{role}_{choice}_total" for role in ("prefill", "decode") for choice in CHOICE_REASONS),
    "kv_hit_predicted_tokens_total",
    "kv_hit_actual_tokens_total",
    "kv_hit_missed_tokens_total",
    "kv_hit_unforeseen_tokens_total",
)


class Dispatcher:
    """Implements proxy.interface.Engine and proxy.session_host.SessionHost. Lives in one event loop."""

    def __init__(
        self,
        socket: ControlSocket,
        settings: ProxySettings,
        models: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`models`: names under which they are served."""
        self._clock = clock
        self._settings = settings
        rules = RoutingRules(
            settings.policy,
            settings.local_prefill,
            settings.local_prefill_tokens,
            settings.local_prefill_itl_weight,
        )
        objectives = LatencyObjectives(settings.slo_ttft_ms / 1000, settings.slo_tpot_ms / 1000)
        self._cluster = ClusterState(
            settings.stall_s,
            models,
            [each.lower() for each in settings.namespace],
            lambda: MixedRoles(objectives.ttft_s, objectives.tpot_s),
        )
        self._index = KvIndex(settings.kv_index_blocks)
        self._feed = KvFeed(self._index)
        self._failed_pairs = FailedPairs()
        self._admissions = {
            name: Admission(
                workers, self._index, rules, self._failed_pairs, settings.share_of(settings.max_queue), clock
            )
            for name, workers in self._cluster.models.items()
        }
        self._monitors = {name: ScaleMonitor(objectives) for name in self._cluster.models}
        self._control = ControlPlane(
            socket,
            self._cluster,
            self._feed,
            self._on_message,
            self._on_lost,
            self._on_change,
            self._on_adapter,
            clock,
        )
        self._adapter_loads = AdapterLoads(self._control.send)
        self._sessions: dict[str, Callable[[Event], None]] = {}
        self._counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self._plan_at = float("-inf")
        self._turn = 0
        self._turns = Turns(SESSIONS_A_TURN)
        self._draining = self._orphaned = False
        self._stopped = False

    def start(self) -> None:
        self._control.start()

    def orphan(self) -> None:
        """What started this proxy is gone. May be called from another thread."""
        self._orphaned = True

    def drain(self) -> None:
        """From now on this proxy is not ready. It serves what open connections bring, until `stop`."""
        self._draining = True

    async def stop(self) -> None:
        """Fail and cancel the requests that have not ended, then close."""
        self._draining = self._stopped = True
        for hear in self._sessions.values():
            hear(ProxyStopping())
        for admission in self._admissions.values():
            admission.stop()
        await self._requests_end(LAST_MESSAGES_S)
        await self._control.stop()

    async def _requests_end(self, wait_s: float) -> None:
        until = self._clock() + wait_s
        while self._sessions and self._clock() < until:
            await asyncio.sleep(POLL_S)

    # -- Engine

    def generate(
        self, generation: Generation, timeline: Timeline, *, timeout_s: float
    ) -> AsyncGenerator[list[Delta], None]:
        self._turn += 1
        session = Session(
            self,
            generation,
            timeline,
            deadline=self._clock() + timeout_s,
            turn=self._turn,
            turns=self._turns,
            max_attempts=self._settings.max_attempts,
            clock=self._clock,
        )
        return session.run()

    async def load_adapter(self, model: str, adapter: RequestAdapter, *, timeout_s: float) -> None:
        roles = self._cluster.models[model].takers_of(adapter)
        asked = [worker for workers in roles.values() for worker in workers]
        answers = await self._adapter_loads.load(asked, adapter.ref, timeout_s)
        for worker, error in answers.items():
            if error:
                raise BadRequest(f"worker {worker}: {error}", param="lora_path")
        for role, workers in roles.items():
            if not any(worker in answers for worker in workers):
                if not any(worker in self._cluster.models[model].members for worker in workers):
                    raise PeerLost(f"each {role} worker was lost while it loaded the adapter")
                raise DeadlineExceeded(f"no {role} worker has loaded the adapter in {timeout_s:.0f} s")

    def ready(self) -> str:
        if self._draining:
            return "shutting down"
        return next((reason for each in self._admissions.values() if (reason := each.unready())), "")

    def max_model_len(self, model: str) -> int:
        shape = self._admissions[model].workers.shape
        return shape.max_model_len if shape is not None else 0

    def worker_loads(self) -> list[WorkerStatus]:
        return self._cluster.statuses()

    def counters(self) -> Mapping[str, float]:
        counts = self._feed.counts
        return {
            **self._counters,
            "rejected_messages_total": self._control.rejected,
            "rejected_queue_full_total": sum(each.rejected for each in self._admissions.values()),
            "queued_requests": sum(each.waiting for each in self._admissions.values()),
            "orphaned": self._orphaned,
            "mixed_prompt_workers": sum(len(each.mixed.prompts) for each in self._cluster.models.values()),
            "failed_pairs": len(self._avoided_pairs()),
            "kv_index_blocks": len(self._index),
            "kv_index_evictions_total": self._index.evicted,
            "kv_event_batches_total": counts.batches,
            "kv_event_blocks_total": counts.blocks,
            "kv_event_gaps_total": counts.gaps,
            "kv_event_replays_total": counts.replays,
            "kv_event_snapshots_total": counts.snapshots,
        }

    def dispatched(self) -> Mapping[str, Mapping[str, int]]:
        return {name: admission.dispatched() for name, admission in self._admissions.items()}

    def scales(self) -> Mapping[str, Sequence[RoleScale]]:
        return {name: monitor.scales() for name, monitor in self._monitors.items()}

    def _avoided_pairs(self) -> frozenset[Pair]:
        cut = (workers.cut_pairs() for workers in self._cluster.models.values())
        return self._failed_pairs.avoided(self._clock()).union(*cut)

    # -- SessionHost

    @contextmanager
    def registered(self, request_id: str, hear: Callable[[Event], None]) -> Iterator[None]:
        if self._stopped:
            raise PeerLost("the proxy is shutting down")
        self.count("requests_total")
        assert request_id not in self._sessions, request_id
        self._sessions[request_id] = hear
        try:
            yield
        finally:
            del self._sessions[request_id]

    async def admit(self, model: str, ticket: Ticket, view_of: ViewOf, deadline: float) -> tuple[Route, ClusterShape]:
        return await self._admissions[model].admit(ticket, view_of, deadline)

    def generation_ended(self, model: str, tenant: str, tokens: int) -> None:
        self._admissions[model].ended(tenant, tokens)

    def latency_of(self, model: str) -> ScaleMonitor:
        return self._monitors[model]

    def open_leg(self, leg: Leg, message: Prefill | Reserve) -> None:
        self._cluster.assign(leg)
        self._feed.expect(leg.worker, leg.request_id, leg.hashes)
        try:
            self._control.send(leg.worker, message)
        except NotInVersion as error:  # another worker may be of this version
            failed = Failed(request_id=leg.request_id, attempt=message.attempt, reason=str(error), retryable=True)
            self._on_message(leg.worker, failed)

    def prompt_computed(self, worker: str, request_id: str) -> None:
        self._cluster.prompt_computed(worker, request_id)
        self._on_change()  # its tenant may have another one there

    def close_leg(self, worker: str, request_id: str, *, computed: bool, cancel: Cancel | None = None) -> None:
        if cancel is not None:
            self._control.send(worker, cancel)
        self._cluster.settle(worker, request_id)
        self._feed.settle(worker, request_id, self._clock(), computed=computed)
        self._on_change()

    def transfer_ended(self, prefill: str, decode: str, *, ok: bool) -> None:
        if ok:
            self._failed_pairs.discard((prefill, decode), self._clock())
        else:
            self._failed_pairs.add((prefill, decode), self._clock())

    def count(self, name: str, amount: int = 1) -> None:
        self._counters[name] += amount

    # -- from the control plane

    def _on_message(self, worker: str, message: LegMessage) -> None:
        if (hear := self._sessions.get(message.request_id)) is not None:
            hear((worker, message))

    def _on_adapter(self, worker: str, message: AdapterLoaded) -> None:
        self._adapter_loads.on_loaded(worker, message)

    def _on_lost(self, worker: str, reason: str) -> None:
        self._adapter_loads.on_lost(worker)
        self.count("worker_lost_total")
        for hear in self._sessions.values():
            hear(WorkerLost(worker, reason))
        self._on_change()

    def _on_change(self) -> None:
        if (now := self._clock()) >= self._plan_at:
            self._plan_at = now + HEARTBEAT_S
            self._plan(now)
        for admission in self._admissions.values():
            admission.cluster_changed()

    def _plan(self, now: float) -> None:
        """What depends on the load of the last seconds: the replicas to ask for, the roles of mixed workers."""
        for name, workers in self._cluster.models.items():
            monitor = self._monitors[name]
            if monitor.due(now):
                monitor.observe(capacities(workers.view()), workers.mixed.steps.fit(), now)
            workers.mixed.plan(workers.view(), monitor.recent(now), monitor.answer_tokens, now)
