"""The proxy's side of the control plane: one endpoint driven by the event loop, the cluster, and the pulse.

It owns the sockets and the membership, brings what workers and stores say of their blocks to the feed, and hands
messages about requests to `on_message` and losses to `on_lost`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from baton.node.membership import DEAD_AFTER_S, HEARTBEAT_S
from baton.node.messages.base import Message
from baton.node.messages.control import (
    Bundle,
    Busy,
    Cancelled,
    Failed,
    Goodbye,
    HandedOver,
    Heartbeat,
    KvEvents,
    KvSnapshot,
    Ping,
    Refused,
    Register,
    Registered,
    RegisterStore,
    Rejoin,
    Reserved,
    Tokens,
)
from baton.node.telemetry import log_event
from baton.proxy.routing.cluster import ClusterState
from baton.proxy.routing.kvfeed import KvFeed

logger = logging.getLogger("proxy")

LegMessage = Reserved | Busy | Tokens | HandedOver | Failed | Cancelled
MANY = 256
"""So many messages in one turn mean that there may be more."""


class ControlSocket(Protocol):
    """The endpoint, as the proxy uses it: node.endpoint.Endpoint, or its stand-in in the simulator."""

    @property
    def identity(self) -> str: ...

    @property
    def address(self) -> str: ...

    def fileno(self) -> int: ...

    def receive(self, timeout_s: float) -> list[tuple[str, Message]]: ...

    def send(self, peer: str, message: Message) -> bool: ...

    def close(self) -> None: ...


class ControlPlane:
    """See the module's docstring. Lives in one event loop."""

    def __init__(
        self,
        line: ControlSocket,
        cluster: ClusterState,
        feed: KvFeed,
        on_message: Callable[[str, LegMessage], None],
        on_lost: Callable[[str, str], None],
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rejected = 0
        self._line = line
        self._cluster = cluster
        self._feed = feed
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_change = on_change
        self._clock = clock
        self._incarnation = time.time_ns() >> 10
        self._pump_due = False
        self._pulse: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        return self._line.address

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._line.fileno(), self._pump)
        self._pulse = loop.create_task(self._beat())

    async def stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self._line.fileno())
        if self._pulse is not None:
            self._pulse.cancel()
        self._line.close()

    def send(self, identity: str, message: Message) -> bool:
        """False if the worker cannot be reached, which also ends its membership."""
        sent = self._line.send(identity, message)
        self._pump_soon()  # sending may swallow the edge that tells of something to read
        if not sent:
            self._lose(identity, "connection is gone")
        return sent

    # -- inside

    def _pump_soon(self) -> None:
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        inbound = self._line.receive(0)
        now = self._clock()
        for identity, message in inbound:
            self._route(identity, message, now)
        if len(inbound) >= MANY:
            self._pump_soon()

    async def _beat(self) -> None:
        beaten_at = self._clock()
        while True:
            if self._clock() - beaten_at > DEAD_AFTER_S / 2:  # it was this process that stood still
                self._cluster.excuse(self._clock())
            beaten_at = self._clock()
            for identity in self._cluster.identities():
                self.send(identity, Ping(proxy=self._line.identity, incarnation=self._incarnation))
            self._feed.tidy(self._clock())
            self._pump()  # before anyone is judged by silence
            for identity, reason in self._cluster.overdue(self._clock()):
                self._lose(identity, reason)
            await asyncio.sleep(HEARTBEAT_S / 2)

    def _route(self, identity: str, message: Message, now: float) -> None:
        match message:
            case Register() | RegisterStore():
                self._on_register(identity, message, now)
            case Heartbeat():
                self._on_heartbeat(identity, message, now)
            case KvEvents():
                self._answer(identity, self._feed.on_events(identity, message, now))
            case KvSnapshot():
                self._answer(identity, self._feed.on_snapshot(identity, message, now))
            case Goodbye():
                if self._cluster.lose(identity):
                    log_event(logger, "worker_left", worker=identity)
                    self._on_gone(identity, "left")
            case Bundle():
                for tokens in message.tokens:
                    self._on_message(identity, tokens)
            case Reserved() | Busy() | Tokens() | HandedOver() | Failed() | Cancelled():
                self._on_message(identity, message)
            case _:
                self.rejected += 1

    def _on_register(self, identity: str, message: Register | RegisterStore, now: float) -> None:
        known = self._cluster.knows(identity)
        if isinstance(message, Register):
            role: str = message.role
            reason = self._cluster.join(identity, message, now)
        else:
            role, reason = "store", self._cluster.join_store(identity, message, now)
        if reason:
            log_event(logger, "worker_refused", level=logging.WARNING, worker=identity, reason=reason)
            self._line.send(identity, Refused(reason=reason))
            return
        self._feed.join(identity)
        self._line.send(identity, Registered(proxy=self._line.identity, incarnation=self._incarnation))
        if not known:
            log_event(logger, "worker_joined", worker=identity, role=role)
            self._on_change()

    def _on_heartbeat(self, identity: str, message: Heartbeat, now: float) -> None:
        if self._cluster.beat(identity, message, now):
            self._answer(identity, self._feed.on_beat(identity, message.kv_seq, message.store, now))
            self._on_change()
        else:  # it registered with an earlier life of this proxy, or was taken for dead: it must register anew
            self._line.send(identity, Rejoin())

    def _answer(self, identity: str, message: Message | None) -> None:
        if message is not None:
            self._line.send(identity, message)

    def _lose(self, identity: str, reason: str) -> None:
        if self._cluster.lose(identity):
            log_event(logger, "worker_lost", level=logging.WARNING, worker=identity, reason=reason)
            self._on_gone(identity, reason)

    def _on_gone(self, identity: str, reason: str) -> None:
        self._feed.leave(identity)
        self._on_lost(identity, reason)
