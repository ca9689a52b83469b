"""A ZeroMQ endpoint that carries messages: one ROUTER bound for whoever connects, one DEALER for each peer it calls.

It owns its sockets and belongs to one thread; only `wake` may be called from others. Peers are named by endpoint
identity, `worker/incarnation`, which never comes back after a restart. What is not exactly one valid message is
counted and dropped: no input raises out of `receive`. A caller names itself, so it may not take the name of a peer that
is called from here: that peer is known by its address. Delivery is not guaranteed; whoever needs an answer repeats.

Facts used: ROUTER_MANDATORY turns a peer that is gone into EHOSTUNREACH, HANDSHAKE_IVL and MAXMSGSIZE bound what a
stranger can do, ZMTP heartbeats find a dead host (libzmq's zmq_setsockopt(3)).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

import zmq

from baton.node.errors import SettingsError
from baton.node.messages.base import MAX_BODY_BYTES, BadMessage, Message, encode
from baton.node.messages.wire import decode
from baton.node.telemetry import log_event

logger = logging.getLogger("endpoint")

MAX_FRAMES_A_TURN = 1024
"""So that a flood on one socket cannot keep the owner from its timers."""
LEAST_POLL_S = 0.001


Context = zmq.Context[zmq.Socket[bytes]]


def new_context() -> Context:
    """The ZeroMQ context of a process; whoever needs sockets is given it."""
    return zmq.Context()


def identity_of(worker: str, incarnation: int) -> str:
    """The endpoint identity of one life of a worker."""
    return f"{worker}/{incarnation}"


class Endpoint:
    """See the module's docstring. `bind` is an address such as tcp://127.0.0.1:0; None accepts nobody.

    `understand` turns bytes into one of the messages that this endpoint takes, or raises BadMessage.
    """

    def __init__(
        self, context: Context, identity: str, bind: str | None, understand: Callable[[bytes], Message] = decode
    ) -> None:
        self.identity = identity
        self._understand = understand
        self.rejected = 0
        self._context = context
        self._links: dict[str, zmq.Socket[bytes]] = {}
        self._names: dict[zmq.Socket[bytes], str] = {}
        self._poller = zmq.Poller()
        self._router = self._open_router(bind) if bind is not None else None
        self._waker, self._wakee = self._open_waker()
        self._wake_lock = threading.Lock()
        self._closed = False

    @property
    def address(self) -> str:
        """Where peers connect to."""
        assert self._router is not None, "this endpoint accepts nobody"
        return self._router.getsockopt_string(zmq.LAST_ENDPOINT)

    def fileno(self) -> int:
        """Becomes readable when the ROUTER may have something; edge-triggered: drain with `receive(0)`."""
        assert self._router is not None
        return int(self._router.getsockopt(zmq.FD))

    def connect(self, peer: str, address: str) -> None:
        """Open a link to `peer`; connecting goes on in the background, and again whenever the link breaks."""
        if peer in self._links:
            return
        socket = self._new_socket(zmq.DEALER)
        socket.setsockopt_string(zmq.IDENTITY, self.identity)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            socket.close(0)
            raise SettingsError(f"cannot connect to {address!r}: {error}") from None
        self._links[peer] = socket
        self._names[socket] = peer
        self._poller.register(socket, zmq.POLLIN)

    def disconnect(self, peer: str) -> None:
        """Close the link to `peer`, if there is one."""
        socket = self._links.pop(peer, None)
        if socket is not None:
            self._poller.unregister(socket)
            del self._names[socket]
            socket.close(0)

    def send(self, peer: str, message: Message) -> bool:
        """Hand `message` to the transport; False if the peer is not connected or its queue is full."""
        body = encode(message)
        link = self._links.get(peer)
        try:
            if link is not None:
                link.send(body, zmq.NOBLOCK)
            elif self._router is not None:
                self._router.send_multipart([peer.encode(), body], zmq.NOBLOCK)
            else:
                return False
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def receive(self, timeout_s: float, also: Iterable[object] = ()) -> list[tuple[str, Message]]:
        """Wait at most `timeout_s` for messages (or for `also` to become readable), and return all that are there.

        Below a millisecond, which ZeroMQ cannot wait, it looks, sleeps so long and looks again.
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
            elif socket in self._names:
                self._drain_link(socket, inbox)
        return inbox

    def wake(self) -> None:
        """Make a `receive` in progress, or the next one, return at once. May be called from any thread."""
        with self._wake_lock:
            if not self._closed:
                try:
                    self._waker.send(b"", zmq.NOBLOCK)
                except zmq.Again:
                    pass  # it is full of wakes already

    def linger(self, timeout_s: float = 0.5) -> None:
        """Let what was sent go out after `close`, for at most so long."""
        for socket in self._names:
            socket.setsockopt(zmq.LINGER, int(timeout_s * 1000))

    def close(self) -> None:
        with self._wake_lock:
            self._closed = True
            sockets = [self._waker, self._wakee, *self._links.values(), *([self._router] if self._router else [])]
            for socket in sockets:
                socket.close()

    # -- inside

    def _new_socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_BODY_BYTES)
        socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 1000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 5000)
        socket.setsockopt(zmq.SNDHWM, 100_000)
        socket.setsockopt(zmq.RCVHWM, 100_000)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        return socket

    def _open_router(self, bind: str) -> zmq.Socket[bytes]:
        router = self._new_socket(zmq.ROUTER)
        router.setsockopt_string(zmq.IDENTITY, self.identity)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            router.bind(bind)
        except zmq.ZMQError as error:
            router.close(0)
            raise SettingsError(f"cannot listen on {bind!r}: {error}") from None
        self._poller.register(router, zmq.POLLIN)
        return router

    def _open_waker(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        waker, wakee = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        for socket in (waker, wakee):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 16)
        name = f"inproc://wake-{id(self)}-{id(wakee)}"
        wakee.bind(name)
        waker.connect(name)
        self._poller.register(wakee, zmq.POLLIN)
        return waker, wakee

    def _drain_wakes(self) -> None:
        while True:
            try:
                self._wakee.recv(zmq.NOBLOCK)
            except zmq.Again:
                return

    def _drain_router(self, inbox: list[tuple[str, Message]]) -> None:
        assert self._router is not None
        for _ in range(MAX_FRAMES_A_TURN):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 2:
                self._reject(f"{len(frames)} frames")
            elif frames[0].decode(errors="replace") in self._links:
                self._reject("a caller has taken the name of a peer that this endpoint calls")
            else:
                self._admit(frames[0], frames[1], inbox)

    def _drain_link(self, socket: zmq.Socket[bytes], inbox: list[tuple[str, Message]]) -> None:
        for _ in range(MAX_FRAMES_A_TURN):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) == 1:
                self._admit(self._names[socket].encode(), frames[0], inbox)
            else:
                self._reject(f"{len(frames)} frames")

    def _admit(self, peer: bytes, body: bytes, inbox: list[tuple[str, Message]]) -> None:
        try:
            inbox.append((peer.decode(), self._understand(body)))
        except (BadMessage, UnicodeDecodeError) as error:
            self._reject(str(error))

    def _reject(self, reason: str) -> None:
        """Count, and log at 1, 2, 4, 8 ...: a flood of garbage must not become a flood of log lines."""
        self.rejected += 1
        if self.rejected & (self.rejected - 1) == 0:
            log_event(logger, "message_rejected", level=logging.WARNING, count=self.rejected, reason=reason)
