"""A ZeroMQ message endpoint: one bound ROUTER for incoming connections, one DEALER for each peer that it connects to.

It owns its sockets and belongs to one thread; only `wake` may be called from other threads. Peers are identified by
endpoint identity, `worker/incarnation`, which is never reused after a restart. Anything that is not exactly one valid
message, or is none that the peer's role sends, is counted and dropped: no input raises out of `receive`. An incoming
peer states its own identity, so it must not use one that another connection holds, or that of a peer that this endpoint
connects to, which is known by its address. Delivery is not guaranteed: a sender that needs an answer retransmits.

Two nodes of a role of `MUTUAL` may each connect to the other. One connection serves both: an endpoint opens none to a
peer that it hears already, and where both open one at once, that of the lesser identity stays.

Socket limits are in `OPTIONS`; sockets.py opens the sockets, connections.py says who holds an identity.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import zmq

from baton.node import sockets
from baton.node.connections import NameHolder, NameHolders, NameTaken, stated_name
from baton.node.credentials import NodeRole
from baton.node.messages.base import MAX_BODY_BYTES, BadMessage, Message, encode
from baton.node.messages.senders import sender_error
from baton.node.messages.wire import decode
from baton.node.sockets import Context, Socket
from baton.node.telemetry import log_event
from baton.node.watch import EVERY_S, DealerWatch, RouterWatch

logger = logging.getLogger("endpoint")

MAX_FRAMES_A_TURN = 1024
"""Bounds one `receive`, with `bytes_a_turn`, so that a flood on one socket cannot starve the owner's timers."""
LEAST_POLL_S = 0.001
MUTUAL: frozenset[NodeRole] = frozenset({"mixed"})
"""Roles whose nodes exchange KV with others of the same role."""


OPTIONS = sockets.Options(
    max_message_bytes=MAX_BODY_BYTES,
    heartbeat_ms=1000,
    heartbeat_timeout_ms=5000,
    handshake_ms=5000,
    queued_messages=100_000,
    reconnect_ms=(20, 500),
)


def identity_of(worker: str, incarnation: int) -> str:
    """The endpoint identity of one incarnation of a worker."""
    return f"{worker}/{incarnation}"


@dataclass(frozen=True, slots=True)
class _Link:
    """A connection to a peer at its address."""

    peer: str
    role: NodeRole | None
    """None: the link is in the clear."""
    socket: Socket
    watch: DealerWatch
    is_mutual: bool
    """The peer may connect to this endpoint, too."""


class Endpoint:
    """Sends and receives typed messages over a ROUTER and any number of DEALER links.

    `bind` is an address such as tcp://127.0.0.1:0; None accepts no connections. `decode_body` turns bytes into one of
    the messages that this endpoint accepts, or raises BadMessage.
    """

    def __init__(
        self,
        context: Context,
        identity: str,
        bind: str | None,
        decode_body: Callable[[bytes], Message] = decode,
        bytes_a_turn: float = math.inf,
    ) -> None:
        """`bytes_a_turn`: one `receive` reads a socket up to the message that reaches it."""
        self.identity = identity
        self._bytes_a_turn = bytes_a_turn
        self._decode_body = decode_body
        self.rejected = 0
        self._context = context
        self._secret = secrets.token_bytes(16)
        self._holders = NameHolders()
        self._links: dict[str, _Link] = {}
        self._link_of: dict[Socket, _Link] = {}
        self._watched_at = 0.0
        self._poller = zmq.Poller()
        self._router = self._open_router(bind) if bind is not None else None
        self._watch = RouterWatch(context, self._router) if self._router is not None else None
        self._waker, self._wakee = self._open_waker()
        self._wake_lock = threading.Lock()
        self._closed = False

    @property
    def address(self) -> str:
        """The bound address that peers connect to."""
        assert self._router is not None, "this endpoint accepts no connections"
        return sockets.bound_address(self._router)

    def fileno(self) -> int:
        """Becomes readable when the ROUTER may have something; edge-triggered: drain with `receive(0)`."""
        assert self._router is not None
        return int(self._router.getsockopt(zmq.FD))

    def connect(self, peer: str, address: str, role: NodeRole) -> None:
        """Open a link to `peer`, a node of this role; it connects in the background, again when it breaks. Raises
        SettingsError for no address, and where the process may open no more files."""
        is_mutual = role in MUTUAL and role == self._context.role
        if peer in self._links or (is_mutual and self._holders.connection_of(peer) is not None):
            return
        socket = sockets.open_dealer(
            self._context, address, OPTIONS, server=role, identity=self.identity, secret=self._secret
        )
        watch = DealerWatch(self._context, socket, address)
        self._holders.reserve(peer)
        known_role = role if self._context.credentials.keys is not None else None
        link = _Link(peer, known_role, socket, watch, is_mutual)
        self._links[peer] = self._link_of[socket] = link
        self._poller.register(socket, zmq.POLLIN)

    def disconnect(self, peer: str) -> None:
        """Close the link to `peer`, if there is one."""
        link = self._links.pop(peer, None)
        if link is not None:
            self._holders.release(peer)
            self._poller.unregister(link.socket)
            del self._link_of[link.socket]
            link.watch.close()
            link.socket.close(0)

    def send(self, peer: str, message: Message) -> bool:
        """Hand `message` to the transport; False if the peer is not connected or its queue is full."""
        body = encode(message)
        link = self._links.get(peer)
        if link is not None:
            return sockets.send_frames(link.socket, [body])
        connection = self._holders.connection_of(peer)
        if self._router is None or connection is None:
            return False
        sent = sockets.send_frames(self._router, [connection, body])
        if not sent and self._context.role in MUTUAL:
            self._holders.forget(peer)  # so that `connect` opens one of our own
        return sent

    def receive(self, timeout_s: float, also: Iterable[object] = ()) -> list[tuple[str, Message]]:
        """Wait at most `timeout_s` for messages (or for `also` to become readable), and return all that have arrived.

        ZeroMQ cannot wait less than a millisecond: for shorter timeouts this polls, sleeps and polls again.
        """
        extra = list(also)
        for socket in extra:
            self._poller.register(socket, zmq.POLLIN)
        try:
            napping = 0.0 < timeout_s < LEAST_POLL_S
            ready = self._poller.poll(0 if napping else max(0, int(timeout_s * 1000 + 0.999)))
            if napping and not ready:
                time.sleep(timeout_s)
                ready = self._poller.poll(0)
        finally:
            for socket in extra:
                self._poller.unregister(socket)  # type: ignore[arg-type]
        inbox: list[tuple[str, Message]] = []
        for socket, _ in ready:
            if socket is self._wakee:
                self._drain_wakes()
            elif socket is self._router:
                self._drain_router(inbox)
            elif (link := self._link_of.get(socket)) is not None:
                self._drain_link(link, inbox)
        self._watch_connections(time.monotonic())
        return inbox

    def wake(self) -> None:
        """Make a `receive` in progress, or the next one, return at once. May be called from any thread."""
        with self._wake_lock:
            if not self._closed:
                sockets.send_frames(self._waker, [b""])  # fails if the queue is already full of wakes

    def linger(self, timeout_s: float = 0.5) -> None:
        """Keep sending queued messages for at most `timeout_s` after `close`."""
        for link in self._links.values():
            sockets.linger(link.socket, timeout_s)

    def close(self) -> None:
        with self._wake_lock:
            self._closed = True
            for link in self._links.values():
                link.watch.close()
                link.socket.close()
            if self._router is not None and self._watch is not None:
                self._watch.close()
                self._router.close()
            self._waker.close()
            self._wakee.close()

    # -- internals

    def _open_router(self, bind: str) -> Socket:
        router = sockets.open_router(self._context, bind, OPTIONS, identity=self.identity, mandatory=True)
        self._poller.register(router, zmq.POLLIN)
        return router

    def _open_waker(self) -> tuple[Socket, Socket]:
        waker, wakee = sockets.open_pair(self._context, f"wake-{id(self)}-{secrets.token_hex(8)}")
        self._poller.register(wakee, zmq.POLLIN)
        return waker, wakee

    def _watch_connections(self, now: float) -> None:
        if now - self._watched_at < EVERY_S:
            return
        self._watched_at = now
        if self._watch is not None:
            self._watch.turn(now)
        for link in self._links.values():
            link.watch.turn(now)

    def _drain_wakes(self) -> None:
        while sockets.receive_frames(self._wakee) is not None:
            pass

    def _drain_router(self, inbox: list[tuple[str, Message]]) -> None:
        assert self._router is not None
        num_bytes = 0
        for _ in range(MAX_FRAMES_A_TURN):
            received = sockets.receive_named(self._router)
            if received is None:
                return
            connection, frames = received
            if len(frames) == 1:
                self._admit_incoming(connection, frames[0], inbox)
            else:
                self._reject(f"{len(frames)} frames")
            num_bytes += sum(map(len, frames))
            if num_bytes >= self._bytes_a_turn:
                return

    def _drain_link(self, link: _Link, inbox: list[tuple[str, Message]]) -> None:
        for _ in range(MAX_FRAMES_A_TURN):
            frames = sockets.receive_frames(link.socket)
            if frames is None:
                return
            if len(frames) == 1:
                self._admit(link.peer, link.role, frames[0], inbox)
            else:
                self._reject(f"{len(frames)} frames")

    def _admit_incoming(self, frame: zmq.Frame, body: bytes, inbox: list[tuple[str, Message]]) -> None:
        connection = frame.bytes
        try:
            holder = self._holders.find(connection) or self._learn(connection, sockets.authenticated_role(frame))
        except (NameTaken, UnicodeDecodeError) as error:
            self._reject(str(error))
        else:
            self._admit(holder.name, holder.role, body, inbox)

    def _learn(self, connection: bytes, role: NodeRole | None) -> NameHolder:
        """The peer at a new connection. Raises as NameHolders.learn does."""
        link = self._links.get(name := stated_name(connection))
        if link is not None and link.is_mutual and name < self.identity:
            self.disconnect(name)
        return self._holders.learn(connection, role)

    def _admit(self, peer: str, role: NodeRole | None, body: bytes, inbox: list[tuple[str, Message]]) -> None:
        try:
            message = self._decode_body(body)
        except BadMessage as error:
            self._reject(str(error))
            return
        if role is not None and (reason := sender_error(role, self._context.role, message)):
            self._reject(reason)
        else:
            inbox.append((peer, message))

    def _reject(self, reason: str) -> None:
        """Count, and log at 1, 2, 4, 8 ...: a flood of garbage must not become a flood of log lines."""
        self.rejected += 1
        if self.rejected & (self.rejected - 1) == 0:
            log_event(logger, "message_rejected", level=logging.WARNING, count=self.rejected, reason=reason)
