"""How many client connections a server holds, how long each may take, and which one goes when there are too many.

It sees a connection through `ClientConnection` alone, so it knows no HTTP and no server. Once a second it looks at all
of them; nothing here runs for a token. Refusals are counted by reason.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from baton.proxy.http.failures import Failure


class Phase(enum.IntEnum):
    """What a connection is doing, in the order in which connections are closed to make room for new ones."""

    CLOSING = 0
    """Its last answer is on its way."""
    IDLE = 1
    DRAIN = 2
    """It was answered before the end of its request, which is still arriving."""
    HEAD = 3
    BODY = 4
    ANSWER = 5
    """It waits for its answer, or receives it: never closed from here."""


REFUSALS: dict[str, str] = {
    "head_too_large": "request line, headers, or what else is not body, too large",
    "malformed": "no HTTP/1.0 or HTTP/1.1 request",
    "slow_head": "headers not complete in time",
    "slow_body": "body slower than the lowest rate",
    "slow_reader": "answer not read in time",
    "too_many_connections": "no connection could be closed for a new one",
    "closed_for_another": "closed without a running request to make room for a new one",
    "too_many_pipelined": "more requests sent than the connection answers ahead",
    "body_memory": "no memory for the body",
}
"""Why connections and requests are refused before their route; labels of a metric."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Of the connections of one server. Only their number depends on the server, the others on what clients do."""

    max_connections: int
    head_timeout_s: float = 10.0
    """From the connection, or the first byte of a further request, to the end of the headers."""
    body_grace_s: float = 10.0
    """A body may take so long, and one second more for `body_bytes_per_s` that have arrived."""
    body_bytes_per_s: float = 4096.0
    drain_s: float = 5.0
    """For what a client still sends after it was answered: most read the answer only then."""
    flush_s: float = 60.0
    """For a client to read the rest of its last answer."""
    sweep_every_s: float = 1.0


class ClientConnection(Protocol):
    """One connection, as its limits see it."""

    @property
    def phase(self) -> Phase: ...

    @property
    def since_s(self) -> float:
        """When the phase began, on the clock of the event loop."""
        ...

    @property
    def body_bytes(self) -> int:
        """Of the request that is arriving, so far."""
        ...

    @property
    def unsent_bytes(self) -> int:
        """Of answers, still in this process."""
        ...

    def too_slow(self, phase: Phase) -> None:
        """End it, with an answer where the client may wait for one; called again, at once."""
        ...

    def drop(self) -> None:
        """Close it at once."""
        ...


class Connections:
    """The open connections of one server."""

    def __init__(self, limits: ConnectionLimits, on_refused: Callable[[str, Failure | None], None]) -> None:
        """`on_refused` gets the reason, one of REFUSALS, and the answer if there is one."""
        self.limits = limits
        self.on_refused = on_refused
        self._open: dict[ClientConnection, None] = {}
        self._sweeping = False

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: ClientConnection) -> bool:
        """Whether the new connection may stay. At the limit, others that run no request are closed for it."""
        if len(self._open) >= self.limits.max_connections and not self._make_room():
            return False
        self._open[connection] = None
        if not self._sweeping:
            self._sweeping = True
            self._sweep_later()
        return True

    def remove(self, connection: ClientConnection) -> None:
        self._open.pop(connection, None)

    def _make_room(self) -> bool:
        """Close a sixteenth at once, so that a flood of connections does not sort all of them for each."""
        idlest = sorted((each.phase, each.since_s, number) for number, each in enumerate(self._open))
        by_number = list(self._open)
        count = max(1, len(by_number) // 16)
        chosen = [by_number[number] for phase, _, number in idlest[:count] if phase < Phase.ANSWER]
        for connection in chosen:
            self.remove(connection)
            self.on_refused("closed_for_another", None)
            connection.drop()
        return bool(chosen)

    def _sweep_later(self) -> None:
        asyncio.get_running_loop().call_later(self.limits.sweep_every_s, self._sweep)

    def _sweep(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for connection in list(self._open):
            phase = connection.phase
            if now_s - connection.since_s > self._allowed_s(connection, phase):
                connection.too_slow(phase)
        if self._open:
            self._sweep_later()
        else:
            self._sweeping = False

    def _allowed_s(self, connection: ClientConnection, phase: Phase) -> float:
        limits = self.limits
        match phase:
            case Phase.ANSWER:
                return float("inf")  # requests have their own deadline
            case Phase.BODY:
                return limits.body_grace_s + connection.body_bytes / limits.body_bytes_per_s
            case Phase.IDLE | Phase.HEAD:
                return limits.head_timeout_s
            case _:
                return limits.flush_s if connection.unsent_bytes else limits.drain_s
