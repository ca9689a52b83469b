"""testing.relay and its board: each fault does what its name says, in its direction, and none outlives `set_fault`."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from baton.launch.supervisor import ChildSpec
from baton.testing.relay import FaultKind, LinkFault, Toward
from baton.testing.relay_board import RelayBoard
from baton.testing.relayed_process import ask_for_relay

PATIENCE_S = 60.0


class Echo:
    """A server that sends back what it gets, one connection at a time."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        try:
            while received := connection.recv(65536):
                connection.sendall(received)
        except OSError:
            pass


@pytest.fixture
def board() -> Iterator[RelayBoard]:
    board = RelayBoard()
    yield board
    board.close()


@pytest.fixture
def client(board: RelayBoard) -> Iterator[socket.socket]:
    echo = Echo()
    argv = ("python", "-P", "-m", "baton.proxy", "--control-address", f"tcp://127.0.0.1:{echo.port}")
    board.route(ChildSpec(name="proxy", group="proxy", argv=argv, env={}))
    port = ask_for_relay(board.port, "decode-0", echo.port, data=False)
    assert ask_for_relay(board.port, "decode-0", echo.port, data=False) == port
    assert [link.kind for link in board.links()] == ["proxy-decode"]
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection:
        assert exchange(connection, b"first") == b"first"
        yield connection


def exchange(connection: socket.socket, text: bytes) -> bytes:
    connection.sendall(text)
    return connection.recv(65536)


def is_reset(connection: socket.socket) -> bool:
    try:
        return exchange(connection, b"x" * 100) == b""
    except OSError:
        return True


@pytest.mark.parametrize("toward", list(Toward))
def test_a_stall_holds_back_and_loses_nothing(board: RelayBoard, client: socket.socket, toward: Toward) -> None:
    """Guards the tests of partitions: what stood still goes on where it stopped."""
    board.set_fault(board.links("proxy-decode"), LinkFault(FaultKind.STALL, toward))
    client.sendall(b"later")
    client.settimeout(0.05)
    with pytest.raises(TimeoutError):
        client.recv(10)
    client.settimeout(PATIENCE_S)
    board.set_fault(board.links(), None)
    assert client.recv(10) == b"later"


@pytest.mark.parametrize("kind", [FaultKind.RESET, FaultKind.REFUSE, FaultKind.CUT])
def test_connections_end(board: RelayBoard, client: socket.socket, kind: FaultKind) -> None:
    """Guards the tests of broken connections."""
    board.set_fault(board.links(), LinkFault(kind, amount=10))
    assert is_reset(client)
    (link,) = board.links()
    if kind is FaultKind.RESET:
        with socket.create_connection(
            ("127.0.0.1", ask_for_relay(board.port, link.dialer, link.port, data=False))
        ) as new:
            assert exchange(new, b"again") == b"again"


def test_bits_flip_and_pieces_repeat(board: RelayBoard, client: socket.socket) -> None:
    """Guards the tests of damage: one bit of each piece, or each piece twice, and it is counted."""
    board.set_fault(board.links(), LinkFault(FaultKind.FLIP, Toward.TARGET, 1.0))
    spoilt = exchange(client, bytes(8))
    assert sum(byte.bit_count() for byte in spoilt) == 1
    assert board.num_hits() == 1
    board.set_fault(board.links(), LinkFault(FaultKind.REPEAT, Toward.TARGET, 1.0))
    client.sendall(b"ab")
    client.settimeout(PATIENCE_S)
    received = b""
    while len(received) < 4:
        received += client.recv(10)
    assert received == b"abab"
    board.set_fault(board.links(), None)
    assert exchange(client, b"whole") == b"whole"


def test_other_links_are_undisturbed(board: RelayBoard, client: socket.socket) -> None:
    """Guards a schedule that names one kind of link."""
    board.set_fault(board.links("data"), LinkFault(FaultKind.RESET))
    assert exchange(client, b"still here") == b"still here"
