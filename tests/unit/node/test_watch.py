"""node.watch: a link comes back however libzmq gave it up, and refusals are in the log of both ends."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import pytest

from baton.node import watch
from baton.node.credentials import Credentials, Keys
from baton.node.endpoint import Endpoint
from baton.node.messages.control import Heartbeat, Load, Rejoin
from baton.node.sockets import Context
from baton.testing.relay import FaultKind, LinkFault, Toward
from baton.testing.relay_board import RelayBoard
from baton.testing.relayed_process import ask_for_relay

WAIT_S = 60.0
KEYS, OTHER_KEYS = Keys(b"k" * 32), Keys(b"o" * 32)
BEAT = Heartbeat(worker="d", incarnation=1, load=Load())


class Ends:
    """A proxy's endpoint and a worker's, with a relay between them."""

    def __init__(self, server_keys: Keys | None = KEYS, client_keys: Keys | None = KEYS) -> None:
        self.contexts = Context(Credentials("proxy", server_keys)), Context(Credentials("decode", client_keys))
        self.server = Endpoint(self.contexts[0], "proxy", "tcp://127.0.0.1:0")
        self.client = Endpoint(self.contexts[1], "d/1", None)
        self.heard: set[str] = set()
        self.board = RelayBoard(seed=1)
        port = int(self.server.address.rpartition(":")[2])
        relay = ask_for_relay(self.board.port, "decode-0", port, data=False)
        self.client.connect("proxy", f"tcp://127.0.0.1:{relay}", "proxy")

    def until(self, holds: Callable[[], bool]) -> None:
        """Both send until it holds."""
        deadline = time.monotonic() + WAIT_S
        while not holds():
            assert time.monotonic() < deadline
            self.client.send("proxy", BEAT)
            self.heard.update(name for name, _ in self.server.receive(0.01))
            self.server.send("d/1", Rejoin())
            self.heard.update(name for name, _ in self.client.receive(0.01))

    def talk(self) -> None:
        """Until each has heard the other."""
        self.heard.clear()
        self.until(lambda: self.heard == {"d/1", "proxy"})

    def close(self) -> None:
        self.server.close()
        self.client.close()
        self.board.close()
        for context in self.contexts:
            context.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


@pytest.mark.parametrize("toward", list(Toward))
@pytest.mark.parametrize("kind", [FaultKind.FLIP, FaultKind.REPEAT, FaultKind.RESET])
def test_a_damaged_link_comes_back(ends: Ends, kind: FaultKind, toward: Toward) -> None:
    """Guards a worker for which one flipped bit ended the link: libzmq does not dial again after a fault of the
    protocol, and each changed byte of an encrypted link is one."""
    ends.talk()
    for _ in range(2):
        ends.board.set_fault(ends.board.links(), LinkFault(kind, toward, 1.0))
        if kind is not FaultKind.RESET:
            hits = ends.board.num_hits()
            ends.until(lambda hits=hits: ends.board.num_hits() > hits)  # type: ignore[misc]
        ends.board.set_fault(ends.board.links(), None)
        ends.talk()


@pytest.mark.parametrize(
    ("server_keys", "client_keys"),
    [(KEYS, OTHER_KEYS), (KEYS, None), (None, KEYS)],
    ids=["another secret", "client in the clear", "server in the clear"],
)
def test_both_ends_say_why_there_is_no_link(
    server_keys: Keys | None,
    client_keys: Keys | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards users who mistook one file of a secret for another: the log of each node says what to look for."""
    monkeypatch.setattr(watch, "HANDSHAKE_S", 0.5)
    ends = Ends(server_keys, client_keys)
    ends.until(lambda: {"peer_refused", "link_refused"} <= {record.message.split()[0] for record in caplog.records})
    assert caplog.text.count("another secret, or none") >= 2
    ends.close()


def test_links_that_are_closed_while_they_are_dialed_stop_no_other(ends: Ends) -> None:
    """Guards a whole node: libzmq's I/O thread waits for ever to report an event to a monitor that has been closed."""
    ends.talk()
    for number in range(300):
        ends.client.connect(f"other-{number}", ends.server.address, "proxy")
        ends.client.disconnect(f"other-{number}")
    ends.talk()


def test_reports_that_are_not_read_stop_no_link() -> None:
    """Guards a node whose owner is at a long step while a stranger opens connections: libzmq's I/O thread waits where
    a report finds no room."""
    context = Context(Credentials("proxy", KEYS))
    server = Endpoint(context, "proxy", "tcp://127.0.0.1:0")
    port = int(server.address.rpartition(":")[2])
    for _ in range(3000):
        socket.create_connection(("127.0.0.1", port), timeout=WAIT_S).close()
    other = Context(Credentials("decode", KEYS))
    client = Endpoint(other, "d/1", None)
    client.connect("proxy", server.address, "proxy")
    heard: list[str] = []
    deadline = time.monotonic() + WAIT_S
    while not heard:
        assert time.monotonic() < deadline
        client.send("proxy", BEAT)
        client.receive(0.01)
        heard += [name for name, _ in server.receive(0.01)]
    for endpoint, made in ((client, other), (server, context)):
        endpoint.close()
        made.close()
