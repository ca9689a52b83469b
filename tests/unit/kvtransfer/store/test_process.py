"""The store as a process with real sockets, shared memory, disk and signals; workers' client threads in the test."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from baton.kvtransfer.blocks.copies import Copies, HostCopies
from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.store.client import StoreClient
from baton.kvtransfer.store.events import StoreClientDied, StoreEvent, StoreFound, StoreLoaded, StoreWritten
from baton.launch.local import free_port
from baton.node.credentials import Credentials, Keys
from baton.node.leg import LegKey
from baton.node.messages.store import DISK, PEER, RAM
from baton.node.secret_file import read_secret, write_secret
from baton.node.sockets import Context
from baton.tests.unit.kvtransfer.store.bench import BLOCK_BYTES, SPACE, content, names
from baton.tests.unit.kvtransfer.store.late_copies import LateCopies

ROOT = Path(__file__).resolve().parents[4]
PATIENCE_S = 60.0
ATTEMPTS = 5


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.01)


class Store:
    """A store process that can be killed and restarted at the same address."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self._log = log
        self.secret_file = log.parent / "secret"
        if not self.secret_file.exists():
            write_secret(self.secret_file)
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self._arguments = arguments
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-P", "-m", "baton.kvtransfer", "--bind", self.address]
        command += ["--secret-file", str(self.secret_file), *self._arguments]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log)

    def wait_for(self, event: str) -> None:
        """Wait until this incarnation of the store has logged `text`."""
        wait_until(lambda: event.encode() in self._log.read_bytes(), event)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


class Client:
    """A worker's store client with a pool of 16 blocks; `ask` waits for the answer."""

    def __init__(self, store: Store, name: str, make_copies: Callable[[HostMemory], Copies] = HostCopies) -> None:
        self.pool = HostMemory(16, BLOCK_BYTES)
        self.copies = make_copies(self.pool)
        self.events: queue.SimpleQueue[StoreEvent] = queue.SimpleQueue()
        self.stores: list[str] = []
        self._asked = 0
        self._context = Context(Credentials("decode", Keys(read_secret(store.secret_file))))
        self.client = StoreClient(
            self._context, f"{name}/1", store.address, SPACE, self.copies, self.events.put, self.stores.append
        )
        self.wait_attached()

    def wait_attached(self, attached: bool = True) -> None:
        wait_until(
            lambda: self.client.attached == attached, f"a client whose store is {'there' if attached else 'gone'}"
        )

    def next(self) -> StoreEvent:
        return self.events.get(timeout=PATIENCE_S)

    def put(self, *numbers: int) -> int:
        for block, number in enumerate(numbers):
            self.pool.block(block)[:] = content(number)
        self.client.put(b"put", names(*numbers), range(len(numbers)))
        event = self.next()
        assert isinstance(event, StoreWritten)
        return event.num_blocks

    def find(self, *numbers: int) -> tuple[int, ...]:
        self._asked += 1
        self.client.lookup(LegKey("r", self._asked), names(*numbers), 0)
        event = self.next()
        assert isinstance(event, StoreFound)
        return event.tiers

    def load(self, *numbers: int) -> list[bool]:
        """Find and load; for each loaded block, whether it is correct.

        On a busy machine a store may be silent so long that its client takes it for lost: it then tries again.
        """
        for _ in range(ATTEMPTS):
            self.wait_attached()
            self.find(*numbers)
            self.client.load(LegKey("r", self._asked), 0, range(8, 8 + len(numbers)))
            event = self.next()
            assert isinstance(event, StoreLoaded)
            if event.num_blocks:
                return [bytes(self.pool.block(8 + n)) == content(numbers[n]) for n in range(event.num_blocks)]
        return []

    def let_go(self) -> None:
        self.client.stop(LegKey("r", self._asked))

    def close(self) -> None:
        self.client.close()
        self.pool.close()
        self._context.close()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Start stores, and end all of them afterwards."""
    stores: list[Store] = []

    def start(*arguments: str) -> Store:
        stores.append(Store(tmp_path / f"store-{len(stores)}.log", *arguments))
        return stores[-1]

    yield start
    for store in stores:
        store.process.kill()
        store.process.wait(PATIENCE_S)


@pytest.fixture
def joined() -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def join(store: Store, name: str, make_copies: Callable[[HostMemory], Copies] = HostCopies) -> Client:
        clients.append(Client(store, name, make_copies))
        return clients[-1]

    yield join
    for client in clients:
        client.close()


SMALL = ("--ram-gib", "0.002")  # 16 regions of 32 blocks of 4 KiB


def test_ram_is_shared_and_disk_survives_the_store(started, joined, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Guards the whole path: a hit of another worker, a second use, SIGKILL, a restart, a hit on disk."""
    store = started(*SMALL, "--disk-gib", "0.01", "--path", str(tmp_path / "kv"))
    a, b = joined(store, "a"), joined(store, "b")
    store.wait_for("disk_opened")
    assert a.put(1, 2, 3) == 3
    assert b.load(1, 2, 3) == [True] * 3
    store.end(signal.SIGTERM)  # in order, so that all writes reach the disk
    b.wait_attached(False)
    assert b.find(1) == () and b.put(9) == 0
    store.start()
    a.wait_attached()
    b.wait_attached()
    store.wait_for("disk_opened")
    assert b.find(1, 2, 3, 4) == (DISK, DISK, DISK)
    b.let_go()
    store.end(signal.SIGKILL)
    b.wait_attached(False)
    store.start()
    b.wait_attached()
    store.wait_for("disk_opened")
    assert b.load(1, 2, 3) == [True] * 3
    assert len(set(b.stores) - {""}) == 3  # three incarnations of the store, each reported


def test_garbage_on_the_socket_is_ignored(started, joined) -> None:  # type: ignore[no-untyped-def]
    """Guards the store against untrusted connections."""
    store = started(*SMALL)
    a = joined(store, "a")
    context = zmq.Context()
    with context.socket(zmq.DEALER) as client:
        client.setsockopt(zmq.LINGER, 0)
        client.connect(store.address)
        for frames in ([b""], [b"garbage"], [b"\x81\xa1t\xa6Attach"], [b"a", b"b", b"c"], [os.urandom(300)]):
            client.send_multipart(frames)
        host, port = store.address.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(2000))
        assert a.put(1) == 1 and a.load(1) == [True]
    context.destroy(0)
    assert store.end() == 0


def test_a_store_without_a_proxy_is_ready_once_it_serves(started) -> None:  # type: ignore[no-untyped-def]
    """Guards a host's store behind probes: it need join no proxy, and one that is not ready is never used."""
    port = free_port()
    store = started(*SMALL, "--probe-port", str(port))
    store.wait_for("store_started")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=PATIENCE_S) as answer:
        assert answer.status == 200
    assert store.end() == 0


def test_a_store_fetches_blocks_from_another_store(started, joined) -> None:  # type: ignore[no-untyped-def]
    """Guards reuse across hosts: with two stores, fetched blocks stay in the RAM of the requesting one."""
    far = started(*SMALL)
    near = started(*SMALL, "--peer", far.address)
    a, b = joined(far, "a"), joined(near, "b")
    a.put(1, 2, 3)
    wait_until(lambda: b.find(1, 2, 3, 4) == (PEER, PEER, PEER) or bool(b.let_go()), "the peer's answer")
    b.let_go()
    assert b.load(1, 2, 3) == [True] * 3
    assert b.find(1, 2, 3) == (RAM, RAM, RAM)
    b.let_go()
    far.end(signal.SIGKILL)
    assert b.load(1, 2, 3) == [True] * 3 and b.find(1, 2, 3, 4) == (RAM, RAM, RAM)


def test_asynchronous_copies_end_and_their_failure_is_reported(started, joined) -> None:  # type: ignore[no-untyped-def]
    """Guards GPU copies: the thread polls them by itself, and their errors reach the worker's loop."""
    store = started(*SMALL)
    a = joined(store, "a", lambda pool: LateCopies(pool, polls=5))
    assert a.put(1, 2, 3) == 3 and a.load(1, 2, 3) == [True] * 3
    a.copies.broken = True
    a.find(1)
    a.client.load(LegKey("r", a._asked), 0, range(1))
    assert isinstance(a.next(), StoreClientDied)
    wait_until(lambda: a.copies.closed, "the copies let go")
