"""node.names and the links that use it: a name that is looked up for long, or has several addresses, stops no link."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from baton.node.credentials import Credentials
from baton.node.endpoint import Endpoint
from baton.node.errors import SettingsError
from baton.node.messages.control import Drain
from baton.node.names import NameLookup, numbers_of
from baton.node.sockets import Context

PATIENCE_S = 60.0
NAME = "proxy-1.example"


class Ends:
    """A proxy at 127.0.0.1 and a worker without a link."""

    def __init__(self) -> None:
        self.contexts = Context(Credentials("proxy")), Context(Credentials("decode"))
        self.proxy = Endpoint(self.contexts[0], "proxy", "tcp://127.0.0.1:0")
        self.worker = Endpoint(self.contexts[1], "decode/1", None)
        self.port = int(self.proxy.address.rpartition(":")[2])

    def talk(self, link: str) -> None:
        """Until the proxy has heard the worker over this link."""
        wait_for(lambda: self.heard(link))

    def heard(self, link: str) -> bool:
        self.worker.receive(0.01)
        self.worker.send(link, Drain())
        return bool(self.proxy.receive(0.01))

    def close(self) -> None:
        self.proxy.close()
        self.worker.close()
        for context in self.contexts:
            context.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


def test_a_name_server_that_does_not_answer_stops_no_other_link(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a node whose links all stood still, for 20 s and again, while the name of one restarted proxy was asked
    for: the other proxies took it for dead."""
    asked, answer = threading.Event(), threading.Event()

    def ask(host: str, *_: Any, **__: Any) -> list[Any]:
        assert host == NAME
        asked.set()
        answer.wait(PATIENCE_S)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    ends.worker.connect("gone", f"tcp://{NAME}:5570", "proxy")
    ends.worker.connect("proxy", ends.proxy.address, "proxy")
    wait_for(lambda: ends.heard("proxy") and asked.is_set())
    for _ in range(20):
        ends.talk("proxy")
    assert not answer.is_set() and not ends.worker.send("gone", Drain())
    answer.set()


def test_all_addresses_of_a_name_are_dialed(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a name with an address at which nothing listens, as `localhost` has one of IPv6."""

    def ask(host: str, port: int, **_: Any) -> list[Any]:
        return [(0, 0, 0, "", (number, port)) for number in ("127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    ends.worker.connect("proxy", f"tcp://{NAME}:{ends.port}", "proxy")
    for _ in range(3):
        ends.talk("proxy")


def test_a_lookup_at_a_time_and_its_answer_once() -> None:
    """Guards against a thread for each look at a link, while the name server is silent."""
    calls, answer = [], threading.Event()

    def numbers(address: str) -> tuple[str, ...]:
        calls.append(address)
        answer.wait(PATIENCE_S)
        return ("tcp://10.0.0.1:5570",)

    lookup = NameLookup("tcp://a:5570", numbers)
    for _ in range(3):
        lookup.begin()
    assert lookup.take() == () and len(calls) == 1
    answer.set()
    found: list[str] = []
    wait_for(lambda: found.extend(lookup.take()) or bool(found))  # type: ignore[func-returns-value]
    assert found == ["tcp://10.0.0.1:5570"] and lookup.take() == ()


def test_what_is_no_name_has_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the look-up's thread: its death by an exception would leave the link without an address for ever."""
    assert numbers_of(f"tcp://{'x' * 64}.example:5570") == ()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("fd00::1", 5570, 0, 0))])
    assert numbers_of("tcp://a:5570") == ("tcp://[fd00::1]:5570",)


@pytest.mark.parametrize("address", ["tcp://proxy", "tcp://proxy:port", "tcp://pro xy:5570", "tcp://proxy:0"])
def test_a_name_without_a_port_is_an_error(ends: Ends, address: str) -> None:
    """Guards against a link that is looked up in vain, without a word."""
    with pytest.raises(SettingsError):
        ends.worker.connect("proxy", address, "proxy")
