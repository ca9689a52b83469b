"""Links with keys: which nodes are let in, under which names, and what they may send."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import zmq

from baton.node.authentication import CONNECTS_TO, Authenticator
from baton.node.credentials import ROLES, Credentials, Keys, NodeRole
from baton.node.endpoint import Endpoint
from baton.node.messages.base import Message, encode
from baton.node.messages.control import Heartbeat, Load, Ping, Prefill, Register, Registered, Rejoin, Tokens
from baton.node.messages.senders import SENT, sender_error
from baton.node.messages.store import STORE_MESSAGES
from baton.node.messages.wire import MESSAGES
from baton.node.sockets import Context
from baton.testing.relay import Relay, Toward

WAIT_S = 60.0
KEYS, OTHER_KEYS = Keys(b"k" * 32), Keys(b"o" * 32)
TOKENS = Tokens(request_id="r", attempt=0, index=0, ids=(1,))
BEAT = Heartbeat(worker="d", incarnation=1, load=Load())


class Nodes:
    """Nodes of one test, each with a context of its own."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def context(self, role: NodeRole, keys: Keys | None = KEYS) -> Context:
        context = Context(Credentials(role, keys))
        self._stack.callback(context.close)
        return context

    def server(self, role: NodeRole, name: str = "server", keys: Keys | None = KEYS) -> Endpoint:
        return self._close(Endpoint(self.context(role, keys), name, "tcp://127.0.0.1:0"))

    def client(
        self, server: Endpoint, server_role: NodeRole, role: NodeRole, name: str = "d/1", keys: Keys | None = KEYS
    ) -> Endpoint:
        client = self._close(Endpoint(self.context(role, keys), name, None))
        client.connect("server", server.address, server_role)
        return client

    def close(self) -> None:
        self._stack.close()

    def _close(self, endpoint: Endpoint) -> Endpoint:
        self._stack.callback(endpoint.close)
        return endpoint


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.close()


def received(endpoint: Endpoint, count: int = 1) -> list[tuple[str, Message]]:
    """The next messages, at least `count`."""
    deadline, found = time.monotonic() + WAIT_S, list[tuple[str, Message]]()
    while len(found) < count:
        assert time.monotonic() < deadline, found
        found += endpoint.receive(0.1)
    return found


def rejects(endpoint: Endpoint, count: int) -> None:
    """It receives nothing until it has rejected so many messages."""
    deadline = time.monotonic() + WAIT_S
    while endpoint.rejected < count:
        assert time.monotonic() < deadline, endpoint.rejected
        assert endpoint.receive(0.1) == []


def test_messages_pass_between_nodes_of_one_secret(nodes: Nodes) -> None:
    """Guards the cluster itself."""
    server = nodes.server("proxy")
    client = nodes.client(server, "proxy", "decode")
    assert client.send("server", TOKENS) and received(server) == [("d/1", TOKENS)]
    assert server.send("d/1", Rejoin()) and received(client) == [("server", Rejoin())]


STRANGERS: dict[str, dict[str, object]] = {
    "no keys": {"keys": None},
    "another secret": {"keys": OTHER_KEYS},
    "a key of a role that is not let in": {"role": "proxy"},
    "the key of another server": {"server_role": "store"},
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_is_not_heard_and_hears_nothing(nodes: Nodes, stranger: str) -> None:
    """Guards membership, prompts and answers: what strangers send is not even counted as a message."""
    server = nodes.server("proxy")
    options = {"server_role": "proxy", "role": "decode", "keys": KEYS, **STRANGERS[stranger]}
    alone = nodes.client(server, name="s/1", **options)  # type: ignore[arg-type]
    for _ in range(3):
        alone.send("server", TOKENS)
    client = nodes.client(server, "proxy", "decode")
    for _ in range(20):  # while the stranger tries again
        assert client.send("server", TOKENS) and received(server) == [("d/1", TOKENS)]
        assert not server.send("s/1", Ping(proxy="p", incarnation=1))
        assert alone.receive(0.02) == []
    assert server.rejected == 0


def test_a_client_does_not_talk_to_a_server_without_the_secret(nodes: Nodes) -> None:
    """Guards workers against a process that listens at the proxy's address: it learns no KV and gives no orders."""
    for keys in (None, OTHER_KEYS):
        server = nodes.server("proxy", keys=keys)
        client = nodes.client(server, "proxy", "decode")
        client.send("server", TOKENS)
        for _ in range(10):
            assert server.receive(0.03) == [] and client.receive(0.0) == []


class Tap(Relay):
    """A relay that remembers what has passed."""

    seen = b""

    async def _spoil(self, piece: bytes, toward: Toward) -> bytes:
        self.seen += piece
        return piece


async def test_the_bytes_on_the_wire_are_encrypted(nodes: Nodes) -> None:
    """Guards against keys that are set and not used: the reader of a network sees no message and no name."""
    server = nodes.server("proxy")
    tap = Tap(int(server.address.rpartition(":")[2]), "seed")
    await tap.start()
    client = Endpoint(nodes.context("decode"), "decode-of-kim/1", None)
    client.connect("server", f"tcp://127.0.0.1:{tap.port}", "proxy")
    sent = Tokens(request_id="a text that is easy to find", attempt=0, index=0, ids=(1,))
    client.send("server", sent)
    deadline = time.monotonic() + WAIT_S
    while not (heard := server.receive(0.0)):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    assert heard == [("decode-of-kim/1", sent)]
    assert len(tap.seen) > 200 and b"easy to find" not in tap.seen and b"kim" not in tap.seen
    client.close()
    await tap.close()


def test_a_name_belongs_to_a_key(nodes: Nodes) -> None:
    """Guards the name of a member against a node of another role, and of its own role: the first one keeps it."""
    server = nodes.server("proxy")
    first = nodes.client(server, "proxy", "decode", "d/1")
    assert first.send("server", BEAT) and received(server) == [("d/1", BEAT)]
    for number, role in enumerate(("prefill", "decode", "store"), 1):
        nodes.client(server, "proxy", role, "d/1").send("server", BEAT)
        rejects(server, number)
    assert server.send("d/1", Rejoin()) and received(first) == [("server", Rejoin())]


def test_a_role_sends_only_what_is_its_own(nodes: Nodes) -> None:
    """Guards the proxy against a store that answers requests and a worker that registers for another role."""
    server = nodes.server("proxy")
    store = nodes.client(server, "proxy", "store", "s/1")
    store.send("server", TOKENS)
    store.send("server", Registered(proxy="x", incarnation=1))
    rejects(server, 2)
    prefill = nodes.client(server, "proxy", "prefill", "p/1")
    prefill.send("server", register("decode"))
    rejects(server, 3)
    prefill.send("server", register("prefill"))
    store.send("server", BEAT)
    assert sorted(received(server, 2), key=lambda each: each[0]) == [("p/1", register("prefill")), ("s/1", BEAT)]
    assert server.send("p/1", register("prefill")) and server.send("p/1", Rejoin())
    assert received(prefill) == [("server", Rejoin())], "a proxy does not register"
    assert prefill.rejected == 1


def register(role: str) -> Register:
    return Register(
        worker="p",
        incarnation=1,
        role=role,  # type: ignore[arg-type]
        model="m",
        namespace=bytes(32),
        block_tokens=16,
        total_blocks=1,
        max_num_seqs=1,
        max_model_len=1,
        address="",
    )


def test_every_message_has_senders_and_every_pair_of_roles_a_link() -> None:
    """Guards messages that are added later: one without a sender is dropped everywhere."""
    sent = set[type[Message]]().union(*SENT.values())
    assert sent == {*MESSAGES, *STORE_MESSAGES}
    endpoints = [role for role in ROLES if role != "stage"]  # whose messages are in worker.stages.remote
    linked = {(client, server) for server in endpoints for client in CONNECTS_TO[server]}
    assert all((role == "stage") == ("stage" in CONNECTS_TO[role]) for role in ROLES)
    assert set(SENT) == linked | {(server, client) for client, server in linked}


def test_a_decode_worker_gives_no_orders() -> None:
    """Guards workers against one another: what the table forbids has a reason that can be read in the log."""
    order = encode(Ping(proxy="p", incarnation=1))
    assert order and sender_error("decode", "prefill", Ping(proxy="p", incarnation=1)) == "Ping from a decode node"
    assert Prefill not in SENT["decode", "prefill"] and sender_error("proxy", "proxy", Rejoin())
    assert sender_error("proxy", "decode", Rejoin()) == ""


@pytest.mark.parametrize("length", [0, 1, 2, 6, 8])
def test_a_question_of_another_form_is_answered_no(nodes: Nodes, length: int) -> None:
    """Guards the thread, without which no new peer gets in."""
    context = zmq.Context[zmq.Socket[bytes]]()
    answerer = Authenticator(context, "proxy", KEYS)
    assert answerer.answer([b"1.0", b"7", b"baton", b"a", b"", b"CURVE", b"k" * 32, b"x"][:length])[2] == b"400"
    context.term()
