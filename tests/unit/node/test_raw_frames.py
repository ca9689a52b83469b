"""Bytes of ZMTP that no library sends, after a handshake that is right: what arrives is counted, the rest hangs up.

Each frame is sent once a valid message over the same connection has arrived, so the handshake has succeeded.
Source: ZMTP 3.1, https://rfc.zeromq.org/spec/37.
"""

from __future__ import annotations

import random
import resource
import socket
import time
from collections.abc import Iterator

import pytest
import zmq

from baton.node.credentials import Credentials, Keys
from baton.node.endpoint import Endpoint
from baton.node.messages.base import MAX_BODY_BYTES, encode
from baton.node.messages.control import Rejoin
from baton.node.sockets import Context

WAIT_S = 60.0
KEYS = Keys(b"k" * 32)
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
MORE, LONG, COMMAND = 1, 2, 4


def ready(identity: bytes) -> bytes:
    """The command that ends the handshake. Its length must be right, or the peer hangs up before any frame."""
    socket_type, own = b"\x0bSocket-Type\x00\x00\x00\x06DEALER", b"\x08Identity\x00\x00\x00" + bytes([len(identity)])
    return short(b"\x05READY" + socket_type + own + identity, COMMAND)


def short(body: bytes, flags: int = 0) -> bytes:
    return bytes([flags, len(body)]) + body


def long(length: int, body: bytes, flags: int = LONG) -> bytes:
    return bytes([flags]) + length.to_bytes(8, "big") + body


VALID = short(encode(Rejoin()))
COUNTED: dict[str, tuple[bytes, int]] = {
    "no message": (short(b"hello"), 1),
    "an empty frame": (short(b""), 1),
    "a valid message and one byte more": (short(encode(Rejoin()) + b"\x00"), 1),
    "two frames": (short(b"a", MORE) + VALID, 1),
    "50,000 empty frames": (short(b"", MORE) * 50_000 + short(b""), 1),
    "a megabyte of garbage": (long(1 << 20, b"\xc1" * (1 << 20)), 1),
    "three kinds in a row": (short(b"\xc1") + short(b"\x91" * 200) + long(300, bytes(300)), 3),
}
HUNG_UP: dict[str, bytes] = {
    "a frame of 2^63 - 1 bytes": long(2**63 - 1, b""),
    "a frame of 2^64 - 1 bytes": long(2**64 - 1, b""),
    "a frame of 2^40 bytes, and a part of it": long(2**40, b"x" * 1000),
    "one byte above the limit": long(MAX_BODY_BYTES + 1, b"x" * 1000),
    "a command of 2^33 bytes": long(2**33, b"x" * 1000, LONG | COMMAND),
}


@pytest.fixture
def context() -> Iterator[Context]:
    context = Context(Credentials("proxy"))
    yield context
    context.close()


@pytest.fixture
def endpoint(context: Context) -> Iterator[Endpoint]:
    """Without keys."""
    endpoint = Endpoint(context, "server", "tcp://127.0.0.1:0")
    yield endpoint
    endpoint.close()


@pytest.fixture
def secure() -> Iterator[Endpoint]:
    context = Context(Credentials("proxy", KEYS))
    endpoint = Endpoint(context, "server", "tcp://127.0.0.1:0")
    yield endpoint
    endpoint.close()
    context.close()


def dial(endpoint: Endpoint) -> socket.socket:
    host, _, port = endpoint.address.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_S)


def connect(endpoint: Endpoint, identity: bytes = b"raw/1") -> socket.socket:
    """A connection after its handshake; frames that come before the peer's READY would end it."""
    connection = dial(endpoint)
    connection.sendall(GREETING + ready(identity))
    greeting = read_exactly(connection, len(GREETING))
    assert greeting[12:16] == b"NULL"
    flags, length = read_exactly(connection, 2)
    assert flags == COMMAND and read_exactly(connection, length).startswith(b"\x05READY")
    return connection


def read_exactly(connection: socket.socket, size_bytes: int) -> bytes:
    data = b""
    while len(data) < size_bytes:
        part = connection.recv(size_bytes - len(data))
        assert part, "the peer has hung up"
        data += part
    return data


def receives(endpoint: Endpoint) -> list[object]:
    """The messages of the next batch that has any."""
    deadline = time.monotonic() + WAIT_S
    while not (found := endpoint.receive(0.1)):
        assert time.monotonic() < deadline, "nothing arrived"
    return [message for _, message in found]


def rejects(endpoint: Endpoint, count: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while endpoint.rejected < count:
        assert time.monotonic() < deadline, endpoint.rejected
        assert endpoint.receive(0.1) == []
    assert endpoint.rejected == count


def hears_the_end(connection: socket.socket) -> bytes:
    """All that the peer sends until it hangs up; TimeoutError if it does not."""
    heard = b""
    try:
        while part := connection.recv(65_536):
            heard += part
    except ConnectionError:  # it closed while bytes of ours were on their way
        pass
    return heard


@pytest.mark.parametrize(("frames", "count"), COUNTED.values(), ids=COUNTED)
def test_frames_that_are_no_message_arrive_and_are_counted(endpoint: Endpoint, frames: bytes, count: int) -> None:
    """Guards `receive` against garbage in frames of the right form, and the connection, which stays."""
    with connect(endpoint) as connection:
        connection.sendall(VALID)
        assert receives(endpoint) == [Rejoin()]
        connection.sendall(frames)
        rejects(endpoint, count)
        connection.sendall(VALID)
        assert receives(endpoint) == [Rejoin()]


@pytest.mark.parametrize("frame", HUNG_UP.values(), ids=HUNG_UP)
def test_a_frame_above_the_limit_ends_its_connection(endpoint: Endpoint, frame: bytes) -> None:
    """Guards memory: a length is believed only up to the limit, and no byte of the frame is waited for."""
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with connect(endpoint) as connection, connect(endpoint, b"other/1") as other:
        connection.sendall(VALID)
        assert receives(endpoint) == [Rejoin()]
        connection.sendall(frame)
        hears_the_end(connection)
        other.sendall(VALID)
        assert receives(endpoint) == [Rejoin()]
    assert endpoint.rejected == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 64 << 10


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_after_the_handshake(endpoint: Endpoint, seed: int) -> None:
    """Guards every other connection against whatever one of them sends."""
    with connect(endpoint) as connection, connect(endpoint, b"other/1") as other:
        connection.sendall(VALID)
        assert receives(endpoint) == [Rejoin()]
        connection.sendall(random.Random(seed).randbytes(5000))
        other.sendall(VALID)
        assert receives(endpoint) == [Rejoin()]


def test_a_node_with_keys_refuses_the_greeting(secure: Endpoint) -> None:
    """Guards against frames that reach a node before its peer has shown a key."""
    with dial(secure) as connection:
        connection.sendall(GREETING + ready(b"raw/1") + VALID + COUNTED["no message"][0])
        heard = hears_the_end(connection)
    assert len(heard) <= len(GREETING) and b"READY" not in heard
    assert secure.receive(0) == [] and secure.rejected == 0


def test_garbage_of_a_peer_with_keys_is_counted(secure: Endpoint) -> None:
    """Guards a node against peers that belong to the cluster and are broken."""
    context = zmq.Context[zmq.Socket[bytes]]()
    peer = context.socket(zmq.DEALER)
    own = KEYS.pair("decode")
    peer.setsockopt(zmq.LINGER, 0)
    peer.setsockopt(zmq.CURVE_SERVERKEY, KEYS.public("proxy"))
    peer.setsockopt(zmq.CURVE_PUBLICKEY, own.public)
    peer.setsockopt(zmq.CURVE_SECRETKEY, own.private)
    peer.setsockopt(zmq.ROUTING_ID, b"decode-0/1")
    peer.connect(secure.address)
    garbage = [[b"hello"], [b""], [b"a", encode(Rejoin())], [b"\xc1" * 1000], [b""] * 500]
    for frames in garbage:
        peer.send_multipart(frames)
    rejects(secure, len(garbage))
    context.destroy(0)
