"""The proxy's side of the control plane: one endpoint driven by the event loop, the cluster's state, and heartbeats.

It owns the socket and the membership, passes block events of workers and stores to the feed, messages about requests
to `on_message`, those about adapters to `on_adapter` and losses to `on_lost`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from baton.node.link_counts import LinkCounts
from baton.node.membership import DEAD_AFTER_S, HEARTBEAT_S
from baton.node.messages.base import PROTOCOL_VERSION, Message
from baton.node.messages.control import (
    AdapterLoaded,
    Bundle,
    Busy,
    Cancelled,
    Drain,
    Failed,
    Goodbye,
    HandedOver,
    Heartbeat,
    KvEvents,
    KvSnapshot,
    Ping,
    PromptLogprobs,
    Refused,
    Register,
    Registered,
    RegisterStore,
    Rejoin,
    Reserved,
    Tokens,
)
from baton.node.messages.versions import written_for
from baton.node.telemetry import log_event
from baton.proxy.routing.cluster import ClusterState
from baton.proxy.routing.kvfeed import KvFeed

logger = logging.getLogger("proxy")

OnAdapter = Callable[[str, AdapterLoaded], None]
LegMessage = Reserved | Busy | PromptLogprobs | Tokens | HandedOver | Failed | Cancelled
BYTES_A_TURN = 64 << 10
"""Of messages, some 1,000 tokens: they take the event loop 2 ms."""
MAX_READS = 256
"""Of waiting messages, before a worker that may have sent one of them is judged."""


class ControlSocket(Protocol):
    """The endpoint as the proxy uses it: `node.endpoint.Endpoint`, or the simulator's."""

    @property
    def identity(self) -> str: ...

    @property
    def address(self) -> str: ...

    def fileno(self) -> int: ...

    def receive(self, timeout_s: float) -> list[tuple[str, Message]]: ...

    def send(self, peer: str, message: Message) -> bool: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Link:
    """Of a member."""

    joins: int
    """Of its Register: another one is of a worker that has dropped its requests since."""
    version: int
    """Of its Register: the one that it is written to in."""
    counts: LinkCounts


class ControlPlane:
    """Drives the control socket from the event loop: membership, heartbeats, block events, messages about requests."""

    def __init__(
        self,
        socket: ControlSocket,
        cluster: ClusterState,
        feed: KvFeed,
        on_message: Callable[[str, LegMessage], None],
        on_lost: Callable[[str, str], None],
        on_change: Callable[[], None],
        on_adapter: OnAdapter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rejected = 0
        self._socket = socket
        self._links: dict[str, _Link] = {}  # by identity of those that are members
        self._cluster = cluster
        self._feed = feed
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_change = on_change
        self._on_adapter = on_adapter
        self._clock = clock
        self._incarnation = time.time_ns() >> 10
        self._receive_due = False
        self._heartbeat_task: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        return self._socket.address

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket.fileno(), self._receive)
        self._heartbeat_task = loop.create_task(self._heartbeat())

    async def stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        if self._heartbeat_task is not None:
            self._heartbeat_task.cancel()
        self._socket.close()

    def send(self, identity: str, message: Message) -> bool:
        """False if the worker cannot be reached, which also ends its membership. Raises NotInVersion."""
        sent = self._put(identity, message)
        self._receive_soon()  # sending may consume the edge-triggered event for messages to read
        if not sent:
            self._lose(identity, "connection is gone")
        return sent

    # -- inside

    def _put(self, identity: str, message: Message) -> bool:
        if (link := self._links.get(identity)) is not None:
            message = written_for(link.version, message)
            link.counts.sent += 1
        return self._socket.send(identity, message)

    def _receive_soon(self) -> None:
        if not self._receive_due:
            self._receive_due = True
            asyncio.get_running_loop().call_soon(self._receive)

    def _receive(self) -> None:
        self._receive_due = False
        if self._read():
            self._receive_soon()  # there may be more

    def _read(self) -> bool:
        """Whether there was something."""
        inbound = self._socket.receive(0)
        now = self._clock()
        for identity, message in inbound:
            self._route(identity, message, now)
            if (link := self._links.get(identity)) is not None:
                link.counts.received += 1
        return bool(inbound)

    async def _heartbeat(self) -> None:
        last_beat_at = self._clock()
        while True:
            if self._clock() - last_beat_at > DEAD_AFTER_S / 2:  # this process was stopped, not the workers
                self._cluster.excuse(self._clock())
            last_beat_at = self._clock()
            for identity in self._cluster.identities():
                sent = self._links[identity].counts.sent
                self.send(identity, Ping(proxy=self._socket.identity, incarnation=self._incarnation, sent=sent))
            self._feed.tidy(self._clock())
            self._lose_overdue()
            await asyncio.sleep(HEARTBEAT_S / 2)

    def _lose_overdue(self) -> None:
        """No worker is judged by messages that wait here."""
        for _ in range(MAX_READS):
            if not self._cluster.overdue(self._clock()) or not self._read():
                break
        self._receive_soon()
        for identity, reason in self._cluster.overdue(self._clock()):
            self._lose(identity, reason)

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
            case Reserved() | Busy() | PromptLogprobs() | Tokens() | HandedOver() | Failed() | Cancelled():
                self._on_message(identity, message)
            case AdapterLoaded():
                self._on_adapter(identity, message)
            case _:
                self.rejected += 1

    def _on_register(self, identity: str, message: Register | RegisterStore, now: float) -> None:
        if (link := self._links.get(identity)) is not None:
            if message.version < link.version:
                return  # it speaks both, and this proxy has answered the other one
            if (message.joins, message.version) != (link.joins, link.version):
                self._lose(identity, "it registers again")
        known = self._cluster.knows(identity)
        if isinstance(message, Register):
            role: str = message.role
            reason = self._cluster.join(identity, message, now)
        else:
            role, reason = "store", self._cluster.join_store(identity, message, now)
        if reason:
            log_event(logger, "worker_refused", level=logging.WARNING, worker=identity, reason=reason)
            refusal = Refused(reason=reason, version=PROTOCOL_VERSION)
            self._socket.send(identity, written_for(message.version, refusal))
            return
        self._feed.join(identity)
        if not known:
            self._links[identity] = _Link(message.joins, message.version, LinkCounts())
            self._links[identity].counts.join(message.sent)
        sent = self._links[identity].counts.sent
        self._put(
            identity,
            Registered(
                proxy=self._socket.identity,
                incarnation=self._incarnation,
                version=message.version,
                sent=sent,
                peers=self._cluster.peers_of(identity),
            ),
        )
        if not known:
            log_event(logger, "worker_joined", worker=identity, role=role, protocol=message.version)
            self._on_change()

    def _on_heartbeat(self, identity: str, message: Heartbeat, now: float) -> None:
        if (link := self._links.get(identity)) is not None and (lost := link.counts.lost(message.sent)):
            self._lose(identity, f"{lost} of its messages were lost")
        if self._cluster.beat(identity, message, now):
            self._answer(identity, self._feed.on_beat(identity, message.kv_seq, message.store, now))
            if message.orphaned and not message.draining and self._cluster.is_replaced(identity):
                log_event(logger, "worker_replaced", worker=identity)
                self._put(identity, Drain())
            self._on_change()
        else:  # it registered with an earlier life of this proxy, or was taken for dead: it must register anew
            self._socket.send(identity, Rejoin())

    def _answer(self, identity: str, message: Message | None) -> None:
        if message is not None:
            self._put(identity, message)

    def _lose(self, identity: str, reason: str) -> None:
        if self._cluster.lose(identity):
            log_event(logger, "worker_lost", level=logging.WARNING, worker=identity, reason=reason)
            self._on_gone(identity, reason)

    def _on_gone(self, identity: str, reason: str) -> None:
        del self._links[identity]
        self._feed.leave(identity)
        self._on_lost(identity, reason)
