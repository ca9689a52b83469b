"""What stands between a session and the dispatcher: what a session asks for, and the events that come back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from baton.node.messages.control import Cancel, Prefill, Reserve
from baton.proxy.control import LegMessage
from baton.proxy.routing.admission import ViewOf
from baton.proxy.routing.fair_queue import Ticket
from baton.proxy.routing.model_workers import ClusterShape, Leg
from baton.proxy.routing.router import Route
from baton.proxy.scaling.objectives import ScaleMonitor


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker that this session may be using is gone."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The request's time is up."""


@dataclass(frozen=True, slots=True)
class ProxyStopping:
    """The proxy stops: the time for draining is over."""


@dataclass(frozen=True, slots=True)
class ClientBehind:
    """The client did not read for so long that the attempt has ended here."""


Event = tuple[str, LegMessage] | WorkerLost | DeadlinePassed | ProxyStopping | ClientBehind
"""A tuple is a worker and what it sent about one of the request's legs."""


class LegHost(Protocol):
    """What the legs of an attempt need of the dispatcher."""

    def open_leg(self, leg: Leg, message: Prefill | Reserve) -> None:
        """Count the leg and send its message; a failure comes back as WorkerLost."""

    def prompt_computed(self, worker: str, request_id: str) -> None:
        """The leg's first token has come: its prompt waits no longer."""

    def close_leg(self, worker: str, request_id: str, *, computed: bool, cancel: Cancel | None = None) -> None:
        """The leg has ended, or is cancelled; `computed`: its prompt was, so that its blocks are there."""

    def transfer_ended(self, prefill: str, decode: str, *, ok: bool) -> None:
        """The KV came from the one to the other, or it did not."""

    def count(self, name: str, amount: int = 1) -> None: ...


class SessionHost(LegHost, Protocol):
    """What a session needs of the dispatcher."""

    def registered(self, request_id: str, hear: Callable[[Event], None]) -> AbstractContextManager[None]:
        """Inside it, `hear` gets the messages about the request. Raises PeerLost where the proxy shuts down."""

    async def admit(self, model: str, ticket: Ticket, view_of: ViewOf, deadline: float) -> tuple[Route, ClusterShape]:
        """Wait for a route; returns it with the shape of the revision that it leads to."""

    def generation_ended(self, model: str, tenant: str, tokens: int) -> None:
        """It counted for so many tokens too few when it was admitted, or too many (negative)."""

    def latency_of(self, model: str) -> ScaleMonitor:
        """What measures the latencies of the model's requests."""
