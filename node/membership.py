"""A worker's membership of the cluster: register with every proxy, beat, notice silence, leave. No sockets, no clock.

A worker registers with all proxies that it is given and repeats until it is answered. It beats four times a second from
then on. A proxy that has been silent for the session lease is lost: its requests are dropped, and the worker registers
anew, since the proxy may have been restarted (a Ping of a new incarnation, or a Rejoin, says the same at once).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.node.messages.base import Message
from baton.node.messages.control import (
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

HEARTBEAT_S = 0.25
DEAD_AFTER_S = 2.0
"""A worker that was silent for so long is taken for dead (frozen counts as dead)."""
PROXY_LEASE_S = 5.0


@dataclass(slots=True)
class _Proxy:
    link: str
    incarnation: int | None = None
    heard_at: float = 0.0
    next_at: float = 0.0
    refused: str = ""


@dataclass(frozen=True, slots=True)
class ProxyLost:
    """Drop all requests that came over this link."""

    link: str


@dataclass(frozen=True, slots=True)
class JoinRefused:
    """A proxy will never take this worker as it is."""

    link: str
    reason: str


@dataclass(frozen=True, slots=True)
class Joined:
    link: str


Change = ProxyLost | JoinRefused | Joined


class Membership:
    """`links` are the endpoint's names of the links to the proxies. `draining` and `store` go into each heartbeat."""

    def __init__(self, register: Register | RegisterStore, links: Sequence[str], now: float) -> None:
        self.draining = False
        self.store = ""
        self._register = register
        self._proxies = {link: _Proxy(link, heard_at=now, next_at=now) for link in links}

    @property
    def links(self) -> tuple[str, ...]:
        return tuple(self._proxies)

    @property
    def joined(self) -> tuple[str, ...]:
        """The links whose proxies count this worker in."""
        return tuple(proxy.link for proxy in self._proxies.values() if proxy.incarnation is not None)

    def set_store(self, store: str) -> None:
        """From now on heartbeats name this store; may be called by another thread."""
        self.store = store

    def on_message(self, link: str, message: Message, now: float) -> list[Change]:
        """Any message of a proxy proves that it lives; Registered, Refused and Ping change the membership."""
        proxy = self._proxies[link]
        proxy.heard_at = now
        match message:
            case Registered():
                lost = self._is_new(proxy, message.incarnation)
                joined = proxy.incarnation != message.incarnation
                proxy.incarnation = message.incarnation
                return [*lost, *([Joined(link)] if joined else [])]
            case Refused():
                proxy.refused = message.reason
                return [JoinRefused(link, message.reason)]
            case Ping() if proxy.incarnation not in (None, message.incarnation):
                return self._start_over(proxy, now)
            case Rejoin() if proxy.incarnation is not None:
                return self._start_over(proxy, now)
        return []

    def on_timer(
        self, now: float, load: Load, *, load_age_s: float = 0.0, kv_seq: int = 0
    ) -> tuple[list[tuple[str, Message]], list[Change]]:
        """The messages that are due, and what silence has changed. `kv_seq`: the last KvEvents that were sent."""
        due: list[tuple[str, Message]] = []
        changes: list[Change] = []
        for proxy in self._proxies.values():
            if proxy.incarnation is not None and now - proxy.heard_at > PROXY_LEASE_S:
                proxy.incarnation = None
                changes.append(ProxyLost(proxy.link))
            if now >= proxy.next_at and not proxy.refused:
                proxy.next_at = now + HEARTBEAT_S
                is_in = proxy.incarnation is not None
                due.append((proxy.link, self._beat(load, load_age_s, kv_seq) if is_in else self._register))
        return due, changes

    def farewell(self) -> list[tuple[str, Message]]:
        """What to say on leaving."""
        goodbye = Goodbye(worker=self._register.worker, incarnation=self._register.incarnation)
        return [(link, goodbye) for link in self.joined]

    @property
    def wake_at(self) -> float:
        return min((p.next_at for p in self._proxies.values() if not p.refused), default=float("inf"))

    def _start_over(self, proxy: _Proxy, now: float) -> list[Change]:
        proxy.incarnation = None
        proxy.next_at = now
        return [ProxyLost(proxy.link)]

    def _is_new(self, proxy: _Proxy, incarnation: int) -> list[Change]:
        return [ProxyLost(proxy.link)] if proxy.incarnation not in (None, incarnation) else []

    def _beat(self, load: Load, load_age_s: float, kv_seq: int) -> Heartbeat:
        return Heartbeat(
            worker=self._register.worker,
            incarnation=self._register.incarnation,
            load=load,
            load_age_s=load_age_s,
            draining=self.draining,
            kv_seq=kv_seq,
            store=self.store,
        )
