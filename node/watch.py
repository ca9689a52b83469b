"""What libzmq reports of the connections of one socket: refusals are logged, and what it gave up is dialed again.

libzmq dials again after a connection broke, but not after one that it took for a fault of the protocol: a peer that was
refused, and on an encrypted link every byte that was changed on its way. Without this, one flipped bit would end a link
for ever. One thread owns a watch, that of its socket, and calls `turn` a few times a second.
"""

from __future__ import annotations

import errno
import logging

import zmq

from baton.node import sockets
from baton.node.sockets import Context, Socket
from baton.node.telemetry import log_event

logger = logging.getLogger("links")

EVERY_S = 0.25
"""Between two looks at what was reported."""
DIAL_AGAIN_S = (0.5, 15.0)
"""The first pause before a link that libzmq gave up is dialed again, and the longest; each is twice the one before."""

_FAILURES = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_PROGRESS = zmq.EVENT_CONNECTED | zmq.EVENT_CONNECT_DELAYED | zmq.EVENT_CONNECT_RETRIED
_OF_ROUTER = _FAILURES
_OF_DEALER = _FAILURES | _PROGRESS | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED


class RouterWatch:
    """Logs connections that a ROUTER has refused, the 1st, 2nd, 4th, 8th and so on: strangers could fill the disk."""

    def __init__(self, context: Context, router: Socket) -> None:
        self.refused = 0
        self._monitor = sockets.open_monitor(context, router, _OF_ROUTER)

    def turn(self) -> None:
        while (report := sockets.receive_event(self._monitor)) is not None:
            self.refused += 1
            if self.refused & (self.refused - 1) == 0:
                reason = _reason(*report)
                log_event(logger, "peer_refused", level=logging.WARNING, count=self.refused, reason=reason)

    def close(self) -> None:
        self._monitor.close(0)


class DealerWatch:
    """Keeps the link of a DEALER to `address` alive, and logs the 1st, 2nd, 4th ... time in a row that it fails."""

    def __init__(self, context: Context, dealer: Socket, address: str) -> None:
        self._dealer = dealer
        self._address = address
        self._monitor = sockets.open_monitor(context, dealer, _OF_DEALER)
        self._failures = 0
        self._broken_since: float | None = None
        """No connection, and libzmq has not reported that it dials."""
        self._pause_s = DIAL_AGAIN_S[0]

    def turn(self, now: float) -> None:
        while (report := sockets.receive_event(self._monitor)) is not None:
            self._on_event(*report, now)
        if self._broken_since is not None and now - self._broken_since >= self._pause_s:
            self._broken_since = None
            self._pause_s = min(2 * self._pause_s, DIAL_AGAIN_S[1])
            sockets.dial_again(self._dealer, self._address)

    def close(self) -> None:
        self._monitor.close(0)

    def _on_event(self, event: int, value: int, now: float) -> None:
        if event & _FAILURES:
            self._failures += 1
            if self._failures & (self._failures - 1) == 0:
                log_event(
                    logger,
                    "link_refused",
                    level=logging.WARNING,
                    address=self._address,
                    count=self._failures,
                    reason=_reason(event, value),
                )
        elif event == zmq.EVENT_DISCONNECTED:
            self._broken_since = now
        else:
            self._broken_since = None
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._failures, self._pause_s = 0, DIAL_AGAIN_S[0]


def _reason(event: int, value: int) -> str:
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return "the role of the client is not let in at this server"
    if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
        return f"the other end hung up: it may have another secret, or none ({errno.errorcode.get(value, value)})"
    if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
        return "one end has a secret, and the other one has not"
    if value == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
        return "the other end has another secret, or bytes were changed on their way"
    return f"not a handshake of this protocol ({value:#x})"
