"""node.endpoint: messages pass in both directions, invalid input is dropped, and no call blocks."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from baton.kvtransfer.protocol.pairs import MAX_PAIRS
from baton.node.credentials import Credentials
from baton.node.endpoint import Endpoint
from baton.node.errors import SettingsError
from baton.node.messages.base import MAX_BODY_BYTES, encode
from baton.node.messages.control import Ping, Rejoin
from baton.node.messages.transfer import Abort
from baton.node.sockets import Context

WAIT_S = 60.0
ABORT = Abort(transfer_id=b"t" * 16, reason="a test")


@pytest.fixture
def context() -> Iterator[Context]:
    """Of links in the clear; test_authentication.py has those with keys."""
    context = Context(Credentials("proxy"))
    yield context
    context.close()


@pytest.fixture
def pair(context: Context) -> Iterator[tuple[Endpoint, Endpoint]]:
    server, client = Endpoint(context, "server", "tcp://127.0.0.1:0"), Endpoint(context, "client/1", None)
    client.connect("server", server.address, "prefill")
    yield server, client
    server.close()
    client.close()


def _next(endpoint: Endpoint) -> list[tuple[str, object]]:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if got := endpoint.receive(0.1):
            return list(got)
    return []


def test_received_messages_name_their_sender(pair: tuple[Endpoint, Endpoint]) -> None:
    """Guards against misattribution: a ROUTER names a peer by its identity, a DEALER by its link."""
    server, client = pair
    assert client.send("server", Rejoin())
    assert _next(server) == [("client/1", Rejoin())]
    assert server.send("client/1", Ping(proxy="p", incarnation=1))
    assert _next(client) == [("server", Ping(proxy="p", incarnation=1))]


def test_two_links_are_kept_apart(context: Context) -> None:
    """Guards a worker of two proxies that call themselves the same: each is known by the link to its address."""
    first, second = (Endpoint(context, "proxy", "tcp://127.0.0.1:0") for _ in range(2))
    client = Endpoint(context, "client/1", None)
    for link, server in (("a", first), ("b", second)):
        client.connect(link, server.address, "prefill")
        assert client.send(link, Ping(proxy=link, incarnation=1))
        assert _next(server) == [("client/1", Ping(proxy=link, incarnation=1))]
    for link, server in (("b", second), ("a", first)):
        assert server.send("client/1", Rejoin())
        assert _next(client) == [(link, Rejoin())]
    first.close()
    assert client.send("b", Rejoin()) and _next(second) == [("client/1", Rejoin())], "the other stays"
    second.close()
    client.close()


def _raw_dealer(context: Context, address: str, connection: bytes) -> zmq.Socket[bytes]:
    """A client with any connection id, which has sent one message."""
    dealer = context.zmq.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
    dealer.setsockopt(zmq.ROUTING_ID, connection)
    dealer.connect(address)
    dealer.send(encode(Rejoin()))
    return dealer


def test_a_peer_replaces_its_own_dead_connection(pair: tuple[Endpoint, Endpoint], context: Context) -> None:
    """Guards a process that was frozen: its peers have reconnected before it sees that the old connections are dead.
    The new ones were ignored for as long as they lasted."""
    server, _ = pair
    first = _raw_dealer(context, server.address, b"d/1#00")
    assert _next(server) == [("d/1", Rejoin())]
    second = _raw_dealer(context, server.address, b"d/1#00")
    assert _next(server) == [("d/1", Rejoin())]
    assert server.send("d/1", Ping(proxy="p", incarnation=1))
    assert second.recv() == encode(Ping(proxy="p", incarnation=1))
    assert not first.poll(0)
    first.close(0)
    second.close(0)


@pytest.mark.parametrize("connection", [b"client/1", b"client/1#00", b"peer", b"peer#00"])
def test_a_stranger_does_not_take_a_name(pair: tuple[Endpoint, Endpoint], context: Context, connection: bytes) -> None:
    """Guards a peer's messages, and those to it, against a client that connects later and states its name."""
    server, client = pair
    server.connect("peer", "tcp://127.0.0.1:1", "prefill")
    assert client.send("server", Rejoin()) and _next(server) == [("client/1", Rejoin())]
    stranger = _raw_dealer(context, server.address, connection)
    deadline = time.monotonic() + WAIT_S
    while not server.rejected and time.monotonic() < deadline:
        assert server.receive(0.1) == []
    assert server.rejected == 1
    assert server.send("client/1", Ping(proxy="p", incarnation=1))
    assert _next(client) == [("server", Ping(proxy="p", incarnation=1))]
    assert not stranger.poll(0)
    stranger.close(0)


def test_send_to_an_unconnected_peer_returns_false(pair: tuple[Endpoint, Endpoint]) -> None:
    """Guards loss detection: a send to a peer that is not connected reports failure and raises nothing."""
    server, client = pair
    assert not server.send("unknown/1", Rejoin())
    assert not client.send("unknown/1", Rejoin())


def test_garbage_is_counted_and_dropped(pair: tuple[Endpoint, Endpoint], context: Context) -> None:
    """Guards the loop against raw bytes, wrong frame counts, invalid messages and invalid identities."""
    server, client = pair
    port = int(server.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as raw:
        raw.sendall(b"\x00garbage" * 1000)
    invalid_peer = context.zmq.socket(zmq.DEALER)
    invalid_peer.setsockopt(zmq.LINGER, 0)
    invalid_peer.setsockopt(zmq.IDENTITY, b"\xff\xfe bad")
    invalid_peer.connect(server.address)
    invalid_peer.send(encode(Rejoin()))
    invalid_peer.send_multipart([b"a", b"b", b"c"])
    invalid_peer.send(b"\xc1" * 100)
    deadline = time.monotonic() + WAIT_S
    while server.rejected < 3 and time.monotonic() < deadline:
        assert server.receive(0.1) == []
    assert server.rejected == 3
    assert client.send("server", Rejoin())
    assert _next(server) == [("client/1", Rejoin())]
    invalid_peer.close(0)


def test_an_oversized_frame_does_not_arrive(pair: tuple[Endpoint, Endpoint], context: Context) -> None:
    """Guards memory: a frame beyond the bound closes its own connection and no other."""
    server, client = pair
    invalid_peer = context.zmq.socket(zmq.DEALER)
    invalid_peer.setsockopt(zmq.LINGER, 0)
    invalid_peer.connect(server.address)
    invalid_peer.send(b"x" * (MAX_BODY_BYTES + 1))
    assert client.send("server", Rejoin())
    assert _next(server) == [("client/1", Rejoin())]
    assert server.rejected == 0
    invalid_peer.close(0)


def test_one_turn_reads_a_bounded_number_of_bytes(context: Context) -> None:
    """Guards an event loop against a backlog that is read as one: nothing is lost, it comes in several turns."""
    server = Endpoint(context, "server", "tcp://127.0.0.1:0", bytes_a_turn=3 * len(encode(Rejoin())))
    client = Endpoint(context, "client/1", None)
    client.connect("server", server.address, "prefill")
    assert all(client.send("server", Rejoin()) for _ in range(20))
    turns = []
    while sum(map(len, turns)) < 20:
        turns.append(_next(server))
        assert turns[-1], "messages are missing"
    assert max(map(len, turns)) <= 3
    server.close()
    client.close()


def test_wake_ends_a_wait_from_another_thread(pair: tuple[Endpoint, Endpoint]) -> None:
    """Guards latency: a command wakes the I/O thread; without the wake this test hangs."""
    server, _ = pair
    threading.Timer(0.05, server.wake).start()
    assert server.receive(3600.0) == []


def test_a_taken_address_is_a_settings_error(pair: tuple[Endpoint, Endpoint], context: Context) -> None:
    """Guards start-up: the error names the address instead of ending in a traceback."""
    with pytest.raises(SettingsError, match="cannot listen"):
        Endpoint(context, "other", pair[0].address)


def _exchange(one: Endpoint, other: Endpoint, names: tuple[str, str]) -> None:
    """Each asks the other until it is answered, as greetings do."""
    heard: set[str] = set()
    deadline = time.monotonic() + WAIT_S
    while heard != set(names) and time.monotonic() < deadline:
        for endpoint, peer, address in ((one, names[1], other.address), (other, names[0], one.address)):
            endpoint.connect(peer, address, "mixed")
            endpoint.send(peer, ABORT)
        for endpoint in (one, other):
            heard |= {sender for sender, message in endpoint.receive(0.02) if message == ABORT}
    assert heard == set(names)


def test_mixed_workers_may_connect_to_each_other_at_once() -> None:
    """Each refuses a second connection of a known name: without a rule which of two stays, neither would be heard."""
    contexts = [Context(Credentials("mixed")) for _ in range(2)]
    one, other = (
        Endpoint(context, name, "tcp://127.0.0.1:0") for context, name in zip(contexts, ("a/1", "b/1"), strict=True)
    )
    try:
        one.connect("b/1", other.address, "mixed")
        other.connect("a/1", one.address, "mixed")
        _exchange(one, other, ("a/1", "b/1"))
        one.disconnect("b/1")  # whichever end closes its link, the pair can be made anew
        other.disconnect("a/1")
        _exchange(one, other, ("a/1", "b/1"))
    finally:
        for closing in (one, other, *contexts):
            closing.close()


@pytest.mark.parametrize("room", [0, 1, 2])
def test_a_link_for_which_no_socket_is_left_is_not_opened_and_the_others_go_on(room: int) -> None:
    """Guards a worker that has as many files open as it may: it ended with all its requests when it met a peer. A link
    takes three sockets; each of them may be the one that is refused."""
    context = Context(Credentials("proxy"))
    context.zmq.set(zmq.MAX_SOCKETS, 2 + 3 + room)
    client = Endpoint(context, "client/1", None)
    try:
        client.connect("a", "tcp://127.0.0.1:9", "prefill")
        for _ in range(3):
            with pytest.raises(SettingsError, match="no more sockets can be opened"):
                client.connect("b", "tcp://127.0.0.1:9", "prefill")
        assert not client.send("b", ABORT) and client.send("a", ABORT)
        client.disconnect("a")
        assert _connects(client, "b"), "sockets of links that were not opened are still in use"
    finally:
        client.close()
        context.close()


def _connects(client: Endpoint, peer: str) -> bool:
    """Whether there is room for a link; a thread of libzmq ends sockets some time after they were closed."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            client.connect(peer, "tcp://127.0.0.1:9", "prefill")
        except SettingsError:
            time.sleep(0.01)
        else:
            return True
    return False


def test_a_worker_can_have_links_with_all_its_peers(context: Context) -> None:
    """Guards clusters of more than 170 peers of a worker, for which libzmq's own limit of sockets does not suffice."""
    assert context.zmq.get(zmq.MAX_SOCKETS) >= 6 * MAX_PAIRS
