"""node.endpoint: messages go both ways, strangers' bytes go nowhere, nothing blocks."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from baton.node.endpoint import Endpoint
from baton.node.errors import SettingsError
from baton.node.messages.base import MAX_BODY_BYTES, encode
from baton.node.messages.control import Ping, Rejoin
from baton.node.sockets import new_context

WAIT_S = 5.0


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context = new_context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def pair(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[tuple[Endpoint, Endpoint]]:
    server, client = Endpoint(context, "server", "tcp://127.0.0.1:0"), Endpoint(context, "client/1", None)
    client.connect("server", server.address)
    yield server, client
    server.close()
    client.close()


def _next(endpoint: Endpoint) -> list[tuple[str, object]]:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if got := endpoint.receive(0.1):
            return list(got)
    return []


def test_messages_carry_the_peer_they_come_from(pair: tuple[Endpoint, Endpoint]) -> None:
    """Guards identity: the server names the client by its identity, the client the server by its link."""
    server, client = pair
    assert client.send("server", Rejoin())
    assert _next(server) == [("client/1", Rejoin())]
    assert server.send("client/1", Ping(proxy="p", incarnation=1))
    assert _next(client) == [("server", Ping(proxy="p", incarnation=1))]


def test_an_unknown_peer_is_told_by_false(pair: tuple[Endpoint, Endpoint]) -> None:
    """Guards loss detection: a peer that is not connected cannot be sent to, and nothing is raised."""
    server, client = pair
    assert not server.send("nobody/1", Rejoin())
    assert not client.send("nobody/1", Rejoin())


def test_garbage_is_counted_and_dropped(
    pair: tuple[Endpoint, Endpoint], context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    """Guards the loop: raw bytes, wrong frame counts, non-messages, hostile identities; then a real message."""
    server, client = pair
    port = int(server.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as raw:
        raw.sendall(b"\x00garbage" * 1000)
    stranger = context.socket(zmq.DEALER)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.setsockopt(zmq.IDENTITY, b"\xff\xfe bad")
    stranger.connect(server.address)
    stranger.send(encode(Rejoin()))
    stranger.send_multipart([b"a", b"b", b"c"])
    stranger.send(b"\xc1" * 100)
    deadline = time.monotonic() + WAIT_S
    while server.rejected < 3 and time.monotonic() < deadline:
        assert server.receive(0.1) == []
    assert server.rejected == 3
    assert client.send("server", Rejoin())
    assert _next(server) == [("client/1", Rejoin())]
    stranger.close(0)


def test_an_oversized_frame_does_not_arrive(
    pair: tuple[Endpoint, Endpoint], context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    """Guards memory: a frame beyond the bound ends its connection and nobody else's."""
    server, client = pair
    stranger = context.socket(zmq.DEALER)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.connect(server.address)
    stranger.send(b"x" * (MAX_BODY_BYTES + 1))
    assert client.send("server", Rejoin())
    assert _next(server) == [("client/1", Rejoin())]
    assert server.rejected == 0
    stranger.close(0)


def test_wake_ends_a_wait_from_another_thread(pair: tuple[Endpoint, Endpoint]) -> None:
    """Guards latency: the I/O thread must not sleep through a command; without the wake this test hangs."""
    server, _ = pair
    threading.Timer(0.05, server.wake).start()
    assert server.receive(3600.0) == []


def test_a_taken_address_is_a_settings_error(
    pair: tuple[Endpoint, Endpoint], context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    """Guards start-up: the user is told which address, not shown a traceback."""
    with pytest.raises(SettingsError, match="cannot listen"):
        Endpoint(context, "other", pair[0].address)
