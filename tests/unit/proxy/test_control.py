"""The proxy's control plane: a member whose messages were lost, or that begins anew, is lost with all its requests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from msgspec import UNSET
from msgspec.structs import replace

from baton.node.messages.base import PROTOCOL_VERSION, Message
from baton.node.messages.control import Cancelled, Drain, Heartbeat, Load, Refused, Register, Registered, Rejoin
from baton.node.messages.versions import OLDEST_VERSION
from baton.proxy.control import ControlPlane
from baton.proxy.routing.cluster import ClusterState
from baton.proxy.routing.kvfeed import KvFeed
from baton.proxy.routing.kvindex import KvIndex

WORKER = "d/1"


class ScriptedSocket:
    """Brings what a test gives it, and keeps what is sent."""

    identity = "proxy/1"
    address = "inproc://proxy"

    def __init__(self) -> None:
        self.inbound: list[tuple[str, Message]] = []
        self.sent: list[Message] = []

    def fileno(self) -> int:
        raise AssertionError("the control plane was not started")

    def receive(self, timeout_s: float) -> list[tuple[str, Message]]:
        inbound, self.inbound = self.inbound, []
        return inbound

    def send(self, peer: str, message: Message) -> bool:
        self.sent.append(message)
        return True

    def close(self) -> None: ...


class Bench:
    """A control plane with one worker, which counts the messages that it sends."""

    def __init__(self) -> None:
        self.socket = ScriptedSocket()
        self.lost: list[str] = []
        self.plane = ControlPlane(
            self.socket,
            ClusterState(30.0, ["m"]),
            KvFeed(KvIndex(100)),
            on_message=lambda worker, message: None,
            on_lost=lambda worker, reason: self.lost.append(reason),
            on_change=lambda: None,
            on_adapter=lambda worker, message: None,
            clock=lambda: 0.0,
        )
        self.num_sent = 0

    def hear(self, message: Message, *, arrives: bool = True) -> None:
        self.num_sent += 1
        if arrives:
            self.socket.inbound.append((WORKER, message))
            self.plane._read()

    def register(self, joins: int = 0, version: int = PROTOCOL_VERSION) -> None:
        self.hear(
            Register(
                worker="d",
                incarnation=1,
                role="decode",
                model="m",
                namespace=b"n" * 32,
                block_tokens=4,
                total_blocks=100,
                max_num_seqs=2,
                max_model_len=64,
                address="tcp://127.0.0.1:1",
                joins=joins,
                version=version,
                sent=self.num_sent,
            )
        )

    def beat(self, **changes: bool) -> None:
        self.hear(Heartbeat(worker="d", incarnation=1, load=Load(), sent=self.num_sent, **changes))  # type: ignore[arg-type]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    bench.register()
    yield bench


def test_a_worker_whose_message_was_lost_is_lost(bench: Bench) -> None:
    """Guards a request whose last token did not arrive: it would wait for its deadline."""
    bench.beat()
    bench.hear(Cancelled(request_id="a", attempt=0))
    bench.beat()
    assert not bench.lost
    bench.hear(Cancelled(request_id="b", attempt=0), arrives=False)
    bench.beat()
    assert bench.lost == ["1 of its messages were lost"]
    assert isinstance(bench.socket.sent[-1], Rejoin)
    bench.register(joins=1)
    bench.beat()
    assert len(bench.lost) == 1 and isinstance(bench.socket.sent[-1], Registered)


def test_a_worker_that_registers_anew_has_dropped_its_requests(bench: Bench) -> None:
    """Guards a request that a worker never heard of, or dropped when it heard nothing of this proxy for a while."""
    bench.beat()
    bench.register(joins=1)
    assert bench.lost == ["it registers again"]
    bench.beat()
    assert len(bench.lost) == 1


def test_a_registration_that_is_repeated_changes_nothing(bench: Bench) -> None:
    """Guards the requests of a worker whose first answer was late."""
    bench.register()
    bench.beat()
    assert not bench.lost


def test_a_worker_of_the_version_before_is_answered_in_its_version() -> None:
    """Guards a proxy that is replaced before its workers, which drop messages with what they do not know."""
    bench = Bench()
    bench.register(version=OLDEST_VERSION)
    (answer,) = bench.socket.sent
    assert isinstance(answer, Registered) and answer.version is UNSET
    bench.register(version=OLDEST_VERSION)
    bench.beat()
    assert not bench.lost


def test_of_two_versions_the_newer_counts(bench: Bench) -> None:
    """Guards the requests of a worker that registers in both versions, as its first registration had no answer."""
    bench.num_sent -= 1
    bench.register(version=OLDEST_VERSION)
    bench.beat()
    (answer, *others) = bench.socket.sent
    assert isinstance(answer, Registered) and answer.version == PROTOCOL_VERSION
    assert not bench.lost and not [each for each in others if isinstance(each, Registered)]


def test_a_worker_of_a_later_version_is_refused_with_that_of_the_proxy() -> None:
    """Guards a worker that speaks this version too, and does not know that the proxy speaks no later one."""
    bench = Bench()
    bench.register(version=PROTOCOL_VERSION + 1)
    (answer,) = bench.socket.sent
    assert isinstance(answer, Refused) and answer.version == PROTOCOL_VERSION


def test_an_orphan_drains_when_one_of_its_name_has_registered(bench: Bench) -> None:
    """Guards the memory of a GPU, which an orphan holds, and workers that are well: a namesake drains no other."""
    bench.beat(orphaned=True)
    bench.beat()
    (first,) = bench.plane._cluster.models["m"].members.values()
    successor = replace(first.register, incarnation=2)
    bench.socket.inbound.append(("d/2", successor))
    bench.plane._read()
    bench.beat()
    assert not any(isinstance(message, Drain) for message in bench.socket.sent)
    bench.beat(orphaned=True)
    assert isinstance(bench.socket.sent[-1], Drain)
    bench.beat(orphaned=True, draining=True)
    assert sum(isinstance(message, Drain) for message in bench.socket.sent) == 1
