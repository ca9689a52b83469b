"""The one place that opens ZeroMQ sockets: how they are bound, connected, named and bounded.

`Options` holds what differs from use to use: sizes, queues, heartbeats. What all share is here: no linger, IPv6 where
the address asks for it, a checked name, and errors that say what is wrong with an address.

Facts used (libzmq's zmq_setsockopt(3)): HANDSHAKE_IVL and MAXMSGSIZE bound what an untrusted peer can do, heartbeats
find a dead host, ROUTER_MANDATORY turns a peer that is gone into EHOSTUNREACH, IMMEDIATE queues only on established
connections. Without ROUTER_HANDOVER a ROUTER ignores a peer that reconnects under its id before the old connection is
seen to be dead, for as long as the new one lasts, and still answers its heartbeats; with it, the new one replaces the
old. Ids are in connections.py.

With keys, ROUTERs are CURVE servers and DEALERs CURVE clients, which encrypt and authenticate every byte (RFC 26 of
ZeroMQ); authentication.py says which clients a ROUTER lets in. Pairs within the process have no need of it.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import zmq

from baton.node.addresses import ListenHost, is_address, is_ipv6, is_name, with_brackets
from baton.node.authentication import DOMAIN, Authenticator
from baton.node.connections import SUFFIX_CHARACTERS, connection_id
from baton.node.credentials import ROLES, Credentials, NodeRole
from baton.node.errors import PeerLost, SettingsError

Socket = zmq.Socket[bytes]

MAX_IDENTITY_BYTES = 255 - SUFFIX_CHARACTERS
MAX_SOCKETS = 32_768
"""Of a context, which libzmq sets aside 16 bytes each for. A peer takes six of them: a link for messages and one for
KV, each with both ends of its monitor. libzmq's own limit of 1,023 ends with 170 peers."""

_EVENT = struct.Struct("=HI")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What one kind of socket is allowed; None leaves what libzmq does."""

    max_message_bytes: int
    heartbeat_ms: int
    heartbeat_timeout_ms: int
    handshake_ms: int | None = None
    queued_messages: int | None = None
    """High-water mark of both directions."""
    reconnect_ms: tuple[int, int] | None = None
    """First pause before a connection is tried again, and the longest."""
    immediate: bool = False
    """Queue only on established connections."""


class Context:
    """The ZeroMQ context of a node, with the credentials of its links; it is passed to all that opens sockets."""

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials
        self.zmq: zmq.Context[Socket] = zmq.Context()
        self.zmq.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        if credentials.keys is not None:
            Authenticator(self.zmq, credentials.role, credentials.keys)

    @property
    def role(self) -> NodeRole:
        return self.credentials.role

    def close(self) -> None:
        """Close what is still open and drop what is not sent. Ends no thread that uses a socket: end those first."""
        self.zmq.destroy(linger=0)


def open_router(
    context: Context, address: str, options: Options, *, identity: str = "", mandatory: bool = False
) -> Socket:
    """A ROUTER bound at `address`, for clients of the roles that connect to this node's; those that reconnect under
    their id are let in. It reports peers that are gone if `mandatory`. Raises SettingsError if it cannot be bound."""
    router = _open(context, zmq.ROUTER, address, options)
    if (keys := context.credentials.keys) is not None:
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, keys.pair(context.role).private)
        router.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    if identity:
        router.setsockopt_string(zmq.ROUTING_ID, identity)
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)
    router.setsockopt(zmq.ROUTER_MANDATORY, mandatory)
    try:
        router.bind(with_brackets(address))
    except zmq.ZMQError as error:
        router.close(0)
        raise SettingsError(f"cannot listen on {address!r}: {error}") from None
    return router


def open_dealer(
    context: Context, address: str, options: Options, *, server: NodeRole, identity: str, secret: bytes
) -> Socket:
    """A DEALER called `identity` that connects to a `server` at `address` in the background, with an id made of
    `secret`; an address with a name is looked up and dialed by the socket's DealerWatch. Raises SettingsError for no
    address, and where the process may open no more files."""
    if is_name(address) and not is_address(address):
        raise SettingsError(f"cannot connect to {address!r}: it must be like tcp://HOST:PORT")
    dealer = _open(context, zmq.DEALER, address, options)
    if (keys := context.credentials.keys) is not None:
        own = keys.pair(context.role)
        dealer.setsockopt(zmq.CURVE_SERVERKEY, keys.public(server))
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, own.public)
        dealer.setsockopt(zmq.CURVE_SECRETKEY, own.private)
    dealer.setsockopt_string(zmq.ROUTING_ID, connection_id(identity, secret, address))
    if is_name(address):
        return dealer
    try:
        dealer.connect(with_brackets(address))
    except zmq.ZMQError as error:
        dealer.close(0)
        raise SettingsError(f"cannot connect to {address!r}: {error}") from None
    return dealer


def open_pair(context: Context, name: str) -> tuple[Socket, Socket]:
    """Two ends within this process, each for one thread at a time. The queue between them is short."""
    first, second = _new_socket(context, zmq.PAIR), _new_socket(context, zmq.PAIR)
    for socket in (first, second):
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 16)
    second.bind(f"inproc://{name}")
    first.connect(f"inproc://{name}")
    return first, second


def open_monitor(context: Context, socket: Socket, events: int) -> Socket:
    """Where libzmq reports these events of the connections of `socket`; ended by `close_monitor`.

    Its I/O thread writes them and waits where it cannot, which would stop every link of the context: so this queue has
    no bound, and must be read. Raises SettingsError, and closes `socket`, where the process may open no more files.
    """
    name = f"inproc://monitor-{id(socket)}-{secrets.token_hex(8)}"
    try:
        monitor = _new_socket(context, zmq.PAIR)
    except SettingsError:
        socket.close(0)
        raise
    try:
        socket.monitor(name, events)
    except zmq.ZMQError as error:
        monitor.close(0)
        socket.close(0)
        raise _no_socket(error) from None
    monitor.setsockopt(zmq.LINGER, 0)
    monitor.setsockopt(zmq.RCVHWM, 0)
    monitor.connect(name)
    return monitor


def close_monitor(socket: Socket, monitor: Socket) -> None:
    """Before `socket` is closed. Reports end first: libzmq would wait for ever to write one that has no reader."""
    socket.disable_monitor()
    monitor.close(0)


def receive_event(monitor: Socket) -> tuple[int, int] | None:
    """The next event with its value, if one is there."""
    frames = receive_frames(monitor)
    return _EVENT.unpack(frames[0]) if frames is not None else None


def dial(dealer: Socket, address: str, instead_of: str) -> None:
    """Connect to `address`, and replace what is left of the connection to the other one, or the same."""
    with contextlib.suppress(zmq.ZMQError):  # libzmq may have forgotten the address
        dealer.disconnect(with_brackets(instead_of))
    dealer.setsockopt(zmq.IPV6, is_ipv6(address))
    dealer.connect(with_brackets(address))


def linger(socket: Socket, timeout_s: float) -> None:
    """What was sent may go out for so long after the socket is closed."""
    socket.setsockopt(zmq.LINGER, int(timeout_s * 1000))


def bound_address(socket: Socket) -> str:
    """Where peers connect to."""
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def any_port(host: ListenHost, identity: str) -> str:
    """The address that binds a free port of `host`, for a socket whose peers are called as `identity` is.

    Raises SettingsError if the identity cannot name a socket.
    """
    name = identity.encode()
    if not 1 <= len(name) <= MAX_IDENTITY_BYTES or name[0] == 0:
        raise SettingsError(f"{identity!r} cannot name a socket")
    return host.any_port()


def receive_frames(socket: Socket) -> list[bytes] | None:
    """One message, if one is there."""
    try:
        return socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None


def receive_named(socket: Socket) -> tuple[zmq.Frame, list[bytes]] | None:
    """One message of a ROUTER, if one is there: the id of the connection, which `authenticated_role` reads, and the
    rest."""
    try:
        connection = socket.recv(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None
    return connection, socket.recv_multipart(zmq.NOBLOCK) if connection.more else []


def authenticated_role(frame: zmq.Frame) -> NodeRole | None:
    """The role of the peer that sent this frame; None on a link in the clear."""
    try:
        role = frame.get("User-Id")
    except zmq.ZMQError:
        return None
    return role if role in ROLES else None  # type: ignore[return-value]


def wait_readable(sockets: Iterable[object], timeout_s: float) -> None:
    """Wait at most so long until one of these sockets may have something to read."""
    poller = zmq.Poller()
    for socket in sockets:
        poller.register(socket, zmq.POLLIN)
    poller.poll(max(0, int(timeout_s * 1000 + 0.999)))


def offer_frames(socket: Socket, frames: Sequence[bytes | bytearray | memoryview]) -> bool:
    """Hand a message to the transport; False if it takes none now. Raises PeerLost where a peer is gone."""
    try:
        socket.send_multipart(frames, zmq.NOBLOCK)
    except zmq.Again:
        return False
    except zmq.ZMQError as error:
        if error.errno == zmq.EHOSTUNREACH:
            raise PeerLost("is gone") from None
        raise
    return True


def send_frames(socket: Socket, frames: list[bytes]) -> bool:
    """Hand a message to the transport; False if the peer is gone or its queue is full."""
    try:
        socket.send_multipart(frames, zmq.NOBLOCK)
    except zmq.ZMQError as error:
        if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
            return False
        raise
    return True


def _new_socket(context: Context, kind: int) -> Socket:
    try:
        return context.zmq.socket(kind)
    except zmq.ZMQError as error:
        raise _no_socket(error) from None


def _no_socket(error: zmq.ZMQError) -> SettingsError:
    """What to raise instead. Any other error than a lack of files or sockets is a bug, and raised here."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        raise error
    return SettingsError(f"no more sockets can be opened: {error} (see `ulimit -n`)")


def _open(context: Context, kind: int, address: str, options: Options) -> Socket:
    socket = _new_socket(context, kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IPV6, is_ipv6(address))
    socket.setsockopt(zmq.MAXMSGSIZE, options.max_message_bytes)
    socket.setsockopt(zmq.HEARTBEAT_IVL, options.heartbeat_ms)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, options.heartbeat_timeout_ms)
    socket.setsockopt(zmq.IMMEDIATE, options.immediate)
    if options.handshake_ms is not None:
        socket.setsockopt(zmq.HANDSHAKE_IVL, options.handshake_ms)
    if options.queued_messages is not None:
        socket.setsockopt(zmq.SNDHWM, options.queued_messages)
        socket.setsockopt(zmq.RCVHWM, options.queued_messages)
    if options.reconnect_ms is not None:
        socket.setsockopt(zmq.RECONNECT_IVL, options.reconnect_ms[0])
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, options.reconnect_ms[1])
    return socket
