"""What libzmq reports of the connections of one socket: refusals are logged, and what it gave up is dialed again.

libzmq dials again after a connection broke, but not after one that it took for a fault of the protocol: a peer that was
refused, and on an encrypted link every byte that was changed on its way. Without this, one flipped bit would end a link
for ever. One thread owns a watch, that of its socket, and calls `turn` a few times a second.

EVENT_HANDSHAKE_FAILED_PROTOCOL is not asked for: where it is, libzmq 4.3.5 loses the error code of an encrypted message
that it cannot read, and instead of closing the connection it reads nothing from it until the heartbeats fail.
"""

from __future__ import annotations

import logging
from collections import deque

import zmq

from baton.node import sockets
from baton.node.addresses import is_name
from baton.node.names import NameLookup
from baton.node.sockets import Context, Socket
from baton.node.telemetry import log_event

logger = logging.getLogger("links")

EVERY_S = 0.25
"""Between two looks at what was reported."""
DIAL_AGAIN_S = (0.25, 15.0)
"""The first pause before a link that libzmq gave up is dialed again, and the longest; each is twice the one before."""
LOOK_UP_S = (0.25, 2.0)
"""The same between two look-ups of a name, while the link to it is not established."""
HANDSHAKE_S = 6.0
"""A connection that is not established after this time is not going to be."""
MAX_HANDSHAKES = 1024

_NO_HANDSHAKE = "no handshake: the other end may have another secret, or none"
_NOT_ADMITTED = "the role of the client is not let in at this server"

_OF_ROUTER = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_OF_DEALER = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_CONNECT_DELAYED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
)


class RouterWatch:
    """Logs connections that a ROUTER has refused, the 1st, 2nd, 4th, 8th and so on: strangers could fill the disk."""

    def __init__(self, context: Context, router: Socket) -> None:
        self.refused = 0
        self._router = router
        self._monitor = sockets.open_monitor(context, router, _OF_ROUTER)
        self._accepted_at: deque[float] = deque(maxlen=MAX_HANDSHAKES)
        """Of connections whose handshake has not ended. Which of them has ended is not reported; they are counted."""

    def turn(self, now: float) -> None:
        while (report := sockets.receive_event(self._monitor)) is not None:
            event, _ = report
            if event == zmq.EVENT_ACCEPTED:
                self._accepted_at.append(now)
            elif self._accepted_at:
                self._accepted_at.popleft()
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._refuse(_NOT_ADMITTED)
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._refuse(_NO_HANDSHAKE)
        while self._accepted_at and now - self._accepted_at[0] > HANDSHAKE_S:
            self._accepted_at.popleft()
            self._refuse(_NO_HANDSHAKE)

    def close(self) -> None:
        sockets.close_monitor(self._router, self._monitor)

    def _refuse(self, reason: str) -> None:
        self.refused += 1
        if self.refused & (self.refused - 1) == 0:
            log_event(logger, "peer_refused", level=logging.WARNING, count=self.refused, reason=reason)


class DealerWatch:
    """Keeps the link of a DEALER to `address` alive, and logs the 1st, 2nd, 4th ... time in a row that it fails.

    A host name is looked up at the start and whenever the link breaks. The addresses that it has are dialed in turn.
    """

    def __init__(self, context: Context, dealer: Socket, address: str) -> None:
        """Raises SettingsError, and closes `dealer`, where the process may open no more files."""
        self._dealer = dealer
        self._address = address
        self.breaks = 0
        """Times that an established connection has ended."""
        self._lookup = NameLookup(address) if is_name(address) else None
        self._dialed = "" if self._lookup is not None else address
        self._dialed_at = float("-inf")
        self._look_up_at = float("-inf")
        self._look_up_pause_s = LOOK_UP_S[0]
        self._monitor = sockets.open_monitor(context, dealer, _OF_DEALER)
        self._established = False
        self._not_admitted = False
        self._failures = 0
        self._broken_since: float | None = None
        """No connection, and libzmq has not reported that it dials."""
        self._pause_s = DIAL_AGAIN_S[0]

    def turn(self, now: float) -> None:
        while (report := sockets.receive_event(self._monitor)) is not None:
            self._on_event(report[0], now)
        if self._lookup is not None and not self._established:
            self._follow_name(self._lookup, now)
        if self._broken_since is not None and now - self._broken_since >= self._pause_s:
            self._broken_since = None
            self._pause_s = min(2 * self._pause_s, DIAL_AGAIN_S[1])
            sockets.dial(self._dealer, self._dialed, instead_of=self._dialed)

    @property
    def is_established(self) -> bool:
        return self._established

    def close(self) -> None:
        sockets.close_monitor(self._dealer, self._monitor)

    def _follow_name(self, lookup: NameLookup, now: float) -> None:
        """Dial what the name stands for now; another of its addresses where the last one did not answer in time."""
        found = lookup.take()
        at = found.index(self._dialed) if self._dialed in found else -1
        if found and (at < 0 or (len(found) > 1 and now - self._dialed_at >= HANDSHAKE_S)):
            last, self._dialed = self._dialed, found[(at + 1) % len(found)]
            self._dialed_at, self._broken_since = now, None
            sockets.dial(self._dealer, self._dialed, instead_of=last)
        if now >= self._look_up_at:
            lookup.begin()
            self._look_up_at = now + self._look_up_pause_s
            self._look_up_pause_s = min(2 * self._look_up_pause_s, LOOK_UP_S[1])

    def _on_event(self, event: int, now: float) -> None:
        match event:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._established, self._not_admitted, self._broken_since = True, False, None
                self._failures, self._pause_s = 0, DIAL_AGAIN_S[0]
                self._look_up_at, self._look_up_pause_s = float("-inf"), LOOK_UP_S[0]
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._not_admitted = True
            case zmq.EVENT_DISCONNECTED:
                self.breaks += self._established
                if not self._established:
                    self._fail()
                self._established, self._broken_since = False, now
            case zmq.EVENT_CONNECT_RETRIED:
                self._dialed_at, self._broken_since = float("-inf"), None  # refused: another address may answer
            case _:
                self._broken_since = None

    def _fail(self) -> None:
        self._failures += 1
        if self._failures & (self._failures - 1) == 0:
            log_event(
                logger,
                "link_refused",
                level=logging.WARNING,
                address=self._address,
                count=self._failures,
                reason=_NOT_ADMITTED if self._not_admitted else _NO_HANDSHAKE,
            )
