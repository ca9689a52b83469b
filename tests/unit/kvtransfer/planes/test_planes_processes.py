"""Guards the planes between two real processes, above all against the sudden death of one end."""

from __future__ import annotations

import json
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.planes.base import ChunkKey, IoDone, Plane
from baton.kvtransfer.planes.shm import ShmPlane
from baton.kvtransfer.planes.zeromq import ZmqPlane
from baton.node.credentials import Credentials
from baton.node.messages.transfer import PlaneAddress
from baton.node.sockets import Context

PATIENCE_S = 60.0
CHILD, PARENT = "prefill/7", "decode/7"
NUM_BLOCKS, BLOCK_BYTES = 8, 200_003
CONTENT = random.Random(CHILD).randbytes(NUM_BLOCKS * BLOCK_BYTES)
ROOT = Path(__file__).parents[3]


class Child:
    """plane_child.py, with bounded waits."""

    def __init__(self, kind: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("plane_child.py"))]
        self.process = subprocess.Popen(
            [*command, kind, CHILD, str(NUM_BLOCKS), str(BLOCK_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE_S)
        assert ready, "the child does not start"
        plane, host, address = json.loads(self.process.stdout.readline())
        self.address = PlaneAddress(plane=plane, host=host, address=address)

    def send(self, **order: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE_S)

    def end(self) -> int:
        """Close its input, and return its exit status."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.stdout.close()


@pytest.fixture
def context() -> Iterator[Context]:
    context = Context(Credentials("decode"))
    yield context
    context.close()


@pytest.fixture
def memory() -> Iterator[HostMemory]:
    memory = HostMemory(NUM_BLOCKS, BLOCK_BYTES)
    yield memory
    memory.close()


def expected(blocks: list[int]) -> bytes:
    return b"".join(CONTENT[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES] for index in blocks)


def content(memory: HostMemory, blocks: list[int]) -> bytes:
    return b"".join(bytes(memory.block(index)) for index in blocks)


def poll_until(plane: Plane, holds: Callable[[list[IoDone]], bool]) -> list[IoDone]:
    done: list[IoDone] = []
    deadline = time.monotonic() + PATIENCE_S
    while not holds(done):
        assert time.monotonic() < deadline, done
        for socket in plane.sockets():
            socket.poll(10)  # type: ignore[attr-defined]
        done += plane.poll()
    return done


def test_zmq_between_processes(context: Context, memory: HostMemory) -> None:
    child, plane = Child("zmq"), ZmqPlane(context, memory, PARENT)
    try:
        assert plane.reaches(child.address)
        plane.connect(CHILD, child.address)
        mine = plane.describe()
        child.send(connect=[PARENT, mine.plane, mine.host, mine.address])
        chunks = [([5, 0], [1, 7]), ([3], [2]), ([7, 6, 4, 1], [6, 0, 3, 4])]
        for seq, (source, blocks) in enumerate(chunks):
            plane.post_receive(CHILD, ChunkKey(b"x" * 16, seq, 0), source, blocks)
            child.send(send=[seq, source])
        poll_until(plane, lambda done: sum(d.ok for d in done) == len(chunks))
        for source, blocks in chunks:
            assert content(memory, blocks) == expected(source)
        assert child.end() == 0
    finally:
        child.process.kill()
        plane.close()


def test_zmq_outlives_a_sender_that_is_killed(context: Context, memory: HostMemory) -> None:
    """Guards against receives that never end, and against blocks held for chunks to the dead peer."""
    child, plane = Child("zmq"), ZmqPlane(context, memory, PARENT)
    plane.connect(CHILD, child.address)
    plane.post_receive(CHILD, ChunkKey(b"x" * 16, 0, 0), [0], [0])
    child.kill()
    plane.post_send(CHILD, ChunkKey(b"y" * 16, 0, 0), [1])
    plane.forget(CHILD)
    done = poll_until(plane, lambda done: any(not d.sending for d in done))
    assert not any(d.ok for d in done if not d.sending)
    plane.cancel(b"y" * 16)
    poll_until(plane, lambda _: plane.idle(b"x" * 16) and plane.idle(b"y" * 16))
    plane.close()
    child.end()


def test_zmq_keeps_blocks_that_a_frozen_peer_has_not_taken_until_it_is_forgotten(
    context: Context, memory: HostMemory
) -> None:
    """Guards against an early `idle`, which would send foreign bytes, and a late one, which leaks blocks."""
    child, plane = Child("zmq"), ZmqPlane(context, memory, PARENT)
    plane.connect(CHILD, child.address)
    plane.post_send(CHILD, ChunkKey(b"x" * 16, 0, 0), [0])
    assert poll_until(plane, lambda done: bool(done))[0].ok
    child.process.send_signal(signal.SIGSTOP)
    every = list(range(NUM_BLOCKS))
    for seq in range(40):  # 64 MB, more than any socket buffer
        plane.post_send(CHILD, ChunkKey(b"y" * 16, seq, 0), every)
    plane.cancel(b"y" * 16)
    assert not plane.idle(b"y" * 16)
    assert plane.poll() == []
    plane.forget(CHILD)
    poll_until(plane, lambda _: plane.idle(b"y" * 16))
    assert plane.poll() == []
    plane.close()
    child.kill()
    child.end()


@pytest.mark.skipif(sys.platform != "linux", reason="memfd and /proc are Linux")
def test_shm_between_processes_and_after_the_owners_death(memory: HostMemory) -> None:
    """Guards reads after the owner's death: the mapping stays valid, and `forget` removes it."""

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("baton-kv")

    child, plane = Child("shm"), ShmPlane(memory)
    before = mapped()
    assert plane.reaches(child.address)
    plane.connect(CHILD, child.address)
    plane.post_receive(CHILD, ChunkKey(b"x" * 16, 0, 0), [5, 0, 3], [1, 7, 2])
    assert [done.ok for done in plane.poll()] == [True]
    assert content(memory, [1, 7, 2]) == expected([5, 0, 3])
    assert mapped() == before + 1

    child.kill()
    plane.post_receive(CHILD, ChunkKey(b"x" * 16, 1, 0), [6], [0])
    assert [done.ok for done in plane.poll()] == [True]
    assert content(memory, [0]) == expected([6])

    assert not plane.reaches(child.address)
    plane.forget(CHILD)
    assert mapped() == before
    plane.connect(CHILD, child.address)
    plane.post_receive(CHILD, ChunkKey(b"x" * 16, 2, 0), [6], [0])
    assert [done.ok for done in plane.poll()] == [False]
    plane.close()
    child.end()
