"""A worker's membership of the cluster: registration, heartbeats, session leases, leaving. No sockets, no clock.

A worker registers with every configured proxy and retransmits until it is answered; then it sends four heartbeats a
second. One that is refused registers again, after longer and longer pauses: the workers that it does not fit may leave.
A proxy that is silent for the session lease is lost: its requests are dropped, and the worker registers again, since
the proxy may have restarted. A Ping of a new incarnation, or a Rejoin, has the same effect at once; so has a Ping that
shows that messages of the proxy were lost (link_counts.py). Each proxy is spoken to in its own version of the protocol.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from baton.node.errors import SettingsError
from baton.node.link_counts import LinkCounts
from baton.node.messages.base import PROTOCOL_VERSION, Message
from baton.node.messages.control import (
    MAX_SILENT_PEERS,
    Goodbye,
    Heartbeat,
    Load,
    Ping,
    Refused,
    Register,
    Registered,
    RegisterStore,
    Rejoin,
)
from baton.node.messages.versions import OLDEST_VERSION, NotInVersion, written_for
from baton.node.telemetry import excerpt

HEARTBEAT_S = 0.25
DEAD_AFTER_S = 2.0
"""A worker that is silent for this long is treated as dead; a frozen process counts as dead."""
PROXY_LEASE_S = 4.0
"""A proxy that is silent for this long is lost. The worker drops its requests after the step that it is at: in 5 s."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}", re.ASCII)
REFUSED_PAUSE_S = (1.0, 15.0)
"""The first pause after a refusal, and the longest; each is twice the one before."""
OLDER_AFTER_S = 1.0
"""A registration without an answer for so long is repeated in the version before, too: a proxy of that version cannot
read the newer one."""


def name_error(name: str) -> str:
    """What is wrong with the name of a worker or a store, which stands in logs and is a label of metrics; or ""."""
    if _NAME.fullmatch(name):
        return ""
    return (
        f"the name {excerpt(name, 80)!r}: a name has at most 64 letters, digits and . _ : @ -, and begins with a "
        "letter or a digit"
    )


@dataclass(slots=True)
class _Proxy:
    link: str
    incarnation: int | None = None
    last_message_at: float = 0.0
    next_at: float = 0.0
    refused_until: float = float("-inf")
    pause_s: float = REFUSED_PAUSE_S[0]
    """After the next refusal."""
    draining_sent: bool = False
    """A heartbeat has said that this worker drains."""
    joins: int = 0
    counts: LinkCounts = field(default_factory=LinkCounts)
    version: int = PROTOCOL_VERSION
    """Of the protocol, as far as this proxy is known."""
    unanswered_since: float = 0.0
    """While it is not joined."""


@dataclass(frozen=True, slots=True)
class ProxyLost:
    """Drop all requests that came over this link."""

    link: str


@dataclass(frozen=True, slots=True)
class JoinRefused:
    """A proxy has refused this worker, which registers again after a pause."""

    link: str
    reason: str
    pause_s: float


@dataclass(frozen=True, slots=True)
class Joined:
    """A proxy has accepted this worker's registration."""

    link: str


Change = ProxyLost | JoinRefused | Joined


class Membership:
    """Decides what a worker sends to each proxy to join, stay in and leave the cluster.

    `links` are the endpoint's names of the links to the proxies. Raises SettingsError for a bad name of the worker.
    Each heartbeat carries `draining`, `store`, `silent_peers` and `orphaned`; the first that says `draining` is due at
    once. Every message of a proxy passes `on_message`, and what is sent to one passes `outgoing`, in their order.
    """

    def __init__(self, register: Register | RegisterStore, links: Sequence[str], now: float) -> None:
        if reason := name_error(register.worker):
            raise SettingsError(reason)
        self.draining = False
        self.orphaned = False
        self.store = ""
        self.silent_peers: tuple[str, ...] = ()
        self._register = register
        self._proxies = {link: _Proxy(link, last_message_at=now, next_at=now, unanswered_since=now) for link in links}

    @property
    def links(self) -> tuple[str, ...]:
        return tuple(self._proxies)

    @property
    def joined(self) -> tuple[str, ...]:
        """The links to proxies that have accepted this worker."""
        return tuple(proxy.link for proxy in self._proxies.values() if proxy.incarnation is not None)

    @property
    def unready(self) -> str:
        """Why this node gets no requests; "": it does. May be called from another thread."""
        if self.draining:
            return "draining"
        return "" if self.joined or not self._proxies else "no proxy has accepted this node"

    def set_store(self, store: str) -> None:
        """Name this store in later heartbeats; may be called from another thread."""
        self.store = store

    def on_message(self, link: str, message: Message, now: float) -> list[Change]:
        """Every message renews the proxy's lease; Registered, Refused, Ping and Rejoin change the membership."""
        proxy = self._proxies[link]
        proxy.last_message_at = now
        changes = self._on_message(proxy, message, now)
        proxy.counts.received += 1
        return changes

    def outgoing(self, link: str, message: Message) -> Message:
        """Count a message that is sent over this link, to a proxy or a peer; returns it as it is written there."""
        if (proxy := self._proxies.get(link)) is None:
            return message
        proxy.counts.sent += 1
        return written_for(proxy.version, message)

    def _on_message(self, proxy: _Proxy, message: Message, now: float) -> list[Change]:
        link = proxy.link
        match message:
            case Registered():
                lost = self._lost_if_restarted(proxy, message.incarnation)
                joined = proxy.incarnation != message.incarnation
                proxy.incarnation = message.incarnation
                proxy.version = min(message.version, PROTOCOL_VERSION)
                if joined:
                    proxy.counts.join(message.sent)
                proxy.refused_until, proxy.pause_s = float("-inf"), REFUSED_PAUSE_S[0]
                return [*lost, *([Joined(link)] if joined else [])]
            case Refused() if proxy.incarnation is None and OLDEST_VERSION <= message.version < proxy.version:
                proxy.version, proxy.next_at = message.version, now
            case Refused() if proxy.incarnation is None and now >= proxy.refused_until:
                return [self._pause(proxy, message.reason, now)]
            case Ping() if proxy.incarnation not in (None, message.incarnation):
                return self._register_again(proxy, now)
            case Ping() if proxy.counts.lost(message.sent) and proxy.incarnation is not None:
                return self._register_again(proxy, now)
            case Rejoin() if proxy.incarnation is not None:
                return self._register_again(proxy, now)
        return []

    def on_timer(
        self, now: float, load: Load, *, load_age_s: float = 0.0, kv_seq: int = 0
    ) -> tuple[list[tuple[str, Message]], list[Change]]:
        """The messages that are due, and the proxies whose lease has expired. `kv_seq`: the last KvEvents sent."""
        due: list[tuple[str, Message]] = []
        changes: list[Change] = []
        for proxy in self._proxies.values():
            if proxy.incarnation is not None and now - proxy.last_message_at > PROXY_LEASE_S:
                changes += self._register_again(proxy, now)
            is_joined = proxy.incarnation is not None
            hurries = self.draining and is_joined and not proxy.draining_sent
            if now >= proxy.next_at or hurries:
                proxy.next_at = now + HEARTBEAT_S
                proxy.draining_sent = self.draining and is_joined
                beat = self._heartbeat(load, load_age_s, kv_seq, proxy)
                due += [(proxy.link, each) for each in ([beat] if is_joined else self._registrations(proxy, now))]
        return due, changes

    def goodbyes(self) -> list[tuple[str, Message]]:
        """A Goodbye for each proxy that has accepted this worker."""
        goodbye = Goodbye(worker=self._register.worker, incarnation=self._register.incarnation)
        return [(link, goodbye) for link in self.joined]

    @property
    def wake_at(self) -> float:
        return min((proxy.next_at for proxy in self._proxies.values()), default=float("inf"))

    def _pause(self, proxy: _Proxy, reason: str, now: float) -> JoinRefused:
        """Register again later. Refusals of retransmitted Registers, which come in meanwhile, change nothing."""
        pause_s = proxy.pause_s
        proxy.next_at = proxy.refused_until = proxy.unanswered_since = now + pause_s
        proxy.version = PROTOCOL_VERSION  # another proxy may answer at that address by then
        proxy.pause_s = min(2 * pause_s, REFUSED_PAUSE_S[1])
        return JoinRefused(proxy.link, reason, pause_s)

    def _register_again(self, proxy: _Proxy, now: float) -> list[Change]:
        proxy.incarnation = None
        proxy.next_at = proxy.unanswered_since = now
        proxy.version = PROTOCOL_VERSION
        proxy.joins += 1
        return [ProxyLost(proxy.link)]

    def _lost_if_restarted(self, proxy: _Proxy, incarnation: int) -> list[Change]:
        return [ProxyLost(proxy.link)] if proxy.incarnation not in (None, incarnation) else []

    def _registrations(self, proxy: _Proxy, now: float) -> list[Message]:
        """In the version of the proxy; while that may be another one, in each that is spoken here, the newest first."""
        register = replace(self._register, version=proxy.version, joins=proxy.joins, sent=proxy.counts.sent)
        if proxy.version == OLDEST_VERSION or now - proxy.unanswered_since < OLDER_AFTER_S:
            return [register]
        try:
            older = written_for(OLDEST_VERSION, replace(register, version=OLDEST_VERSION))
        except NotInVersion:  # only proxies of this version know what to do with such a worker
            return [register]
        proxy.counts.sent -= 1  # both pass `outgoing`: the proxy that needs the second one cannot read the first
        return [register, older]

    def _heartbeat(self, load: Load, load_age_s: float, kv_seq: int, proxy: _Proxy) -> Heartbeat:
        return Heartbeat(
            worker=self._register.worker,
            incarnation=self._register.incarnation,
            load=load,
            load_age_s=load_age_s,
            draining=self.draining,
            kv_seq=kv_seq,
            store=self.store,
            silent_peers=self.silent_peers[:MAX_SILENT_PEERS],
            orphaned=self.orphaned,
            sent=proxy.counts.sent,
        )
