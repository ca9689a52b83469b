"""Guards the zmq plane's port: an untrusted peer cannot write blocks, raise exceptions or hold resources."""

from __future__ import annotations

import random
import re
import socket
import struct
import time
from collections.abc import Iterator

import pytest
import zmq

from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.planes.base import ChunkKey
from baton.kvtransfer.planes.zeromq import PIECE_BYTES, ZmqPlane
from baton.node.addresses import ListenHost, is_address
from baton.node.credentials import Credentials
from baton.node.errors import SettingsError
from baton.node.messages.transfer import PlaneAddress
from baton.node.sockets import Context

PATIENCE_S = 60.0
HEADER = struct.Struct("<4sH16sQHIQ")
KEY = ChunkKey(b"x" * 16, 0, 0)
BLOCK = 64


@pytest.fixture
def context() -> Iterator[Context]:
    context = Context(Credentials("decode"))
    yield context
    context.close()


@pytest.fixture
def memory() -> Iterator[HostMemory]:
    memory = HostMemory(4, BLOCK)
    yield memory
    memory.close()


@pytest.fixture
def plane(context: Context, memory: HostMemory) -> Iterator[ZmqPlane]:
    """A receiver with a posted receive of blocks 1 and 2 from prefill/1."""
    plane = ZmqPlane(context, memory, "decode/1")
    plane.post_receive("prefill/1", KEY, [0, 1], [1, 2])
    yield plane
    plane.close()


def header(key: ChunkKey = KEY, magic: bytes = b"BKVX", version: int = 1, blocks: int = 2, size: int = BLOCK) -> bytes:
    return HEADER.pack(magic, version, *key, blocks, size)


def dealer(context: Context, plane: ZmqPlane, identity: bytes | None = b"prefill/1") -> zmq.Socket[bytes]:
    """A raw socket that acts as a sender."""
    sender = context.zmq.socket(zmq.DEALER)
    sender.setsockopt(zmq.LINGER, 0)
    sender.setsockopt(zmq.SNDTIMEO, int(PATIENCE_S * 1000))
    if identity is not None:
        sender.setsockopt(zmq.IDENTITY, identity)
    sender.connect(plane.describe().address)
    return sender


def poll_until_dropped(plane: ZmqPlane, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while plane.dropped.total() < count:
        assert time.monotonic() < deadline, plane.dropped
        plane.sockets()[0].poll(10)  # type: ignore[attr-defined]
        assert plane.poll() == []


def receive(plane: ZmqPlane) -> bool:
    """Poll until the posted receive has ended; its result."""
    deadline = time.monotonic() + PATIENCE_S
    while not (done := plane.poll()):
        assert time.monotonic() < deadline, plane.dropped
        plane.sockets()[0].poll(10)  # type: ignore[attr-defined]
    return done[0].ok


FULL = [b"a" * BLOCK, b"b" * BLOCK]
HOSTILE: list[tuple[str, list[bytes]]] = [
    ("header", [b""]),
    ("header", [b"garbage"]),
    ("header", [b"\xff" * HEADER.size]),
    ("header", [header()[:-1], *FULL]),
    ("header", [header() + b"\0", *FULL]),
    ("header", [header(magic=b"BKVY"), *FULL]),
    ("header", [header(version=2), *FULL]),
    ("unknown", [header(KEY._replace(transfer_id=b"y" * 16)), *FULL]),
    ("unknown", [header(KEY._replace(seq=2**64 - 1)), *FULL]),
    ("unknown", [header(KEY._replace(retry=1)), *FULL]),
    ("size", [header(blocks=3), *FULL, b"c" * BLOCK]),
    ("size", [header(blocks=2**32 - 1, size=2**64 - 1), *FULL]),
    ("size", [header(size=BLOCK - 1), *FULL]),
    ("size", [header()]),
    ("size", [header(), FULL[0]]),
    ("size", [header(), *FULL, b""]),
    ("size", [header(), *FULL, FULL[0]]),
    ("size", [header(), FULL[0] + FULL[1]]),
    ("size", [header(), FULL[0] + b"x", FULL[1][1:]]),
    ("size", [header(), FULL[0], FULL[1][1:]]),
    ("size", [header(), *([b""] * 2000)]),
]


@pytest.mark.parametrize(("reason", "frames"), HOSTILE)
def test_invalid_messages_are_counted_and_write_nothing(
    context: Context, plane: ZmqPlane, memory: HostMemory, reason: str, frames: list[bytes]
) -> None:
    sender = dealer(context, plane)
    sender.send_multipart(frames)
    poll_until_dropped(plane, 1)
    assert plane.dropped == {reason: 1}
    assert not any(memory.view) and not plane.idle(KEY.transfer_id)
    sender.send_multipart([header(), *FULL])
    assert receive(plane)
    assert bytes(memory.view) == bytes(BLOCK) + FULL[0] + FULL[1] + bytes(BLOCK)


@pytest.mark.parametrize("identity", [None, b"prefill/2", b"\xff\xfe", b"prefill/1\n"])
def test_a_valid_message_from_the_wrong_peer_is_rejected(
    context: Context, plane: ZmqPlane, memory: HostMemory, identity: bytes | None
) -> None:
    sender = dealer(context, plane, identity)
    sender.send_multipart([header(), *FULL])
    poll_until_dropped(plane, 1)
    assert plane.dropped == {"wrong_peer": 1} and not any(memory.view)


def test_a_message_is_accepted_once(context: Context, plane: ZmqPlane, memory: HostMemory) -> None:
    sender = dealer(context, plane)
    sender.send_multipart([header(), *FULL])
    assert receive(plane)
    sender.send_multipart([header(), b"c" * BLOCK, b"d" * BLOCK])
    poll_until_dropped(plane, 1)
    assert plane.dropped == {"unknown": 1} and bytes(memory.block(1)) == FULL[0]


def test_an_oversize_frame_never_arrives(context: Context, plane: ZmqPlane) -> None:
    """Guards memory: without MAXMSGSIZE, libzmq allocates whatever a frame header announces."""
    hostile, sender = dealer(context, plane, b"prefill/2"), dealer(context, plane)
    hostile.send_multipart([header(), b"x" * (PIECE_BYTES + 1)])
    deadline = time.monotonic() + PATIENCE_S
    while not plane.dropped:  # the connection is closed, and libzmq reconnects
        assert time.monotonic() < deadline
        hostile.send(b"afterwards")
        plane.sockets()[0].poll(10)  # type: ignore[attr-defined]
        plane.poll()
    assert set(plane.dropped) == {"header"}
    sender.send_multipart([header(), *FULL])
    assert receive(plane)


def test_non_zmtp_bytes_are_ignored(context: Context, plane: ZmqPlane, memory: HostMemory) -> None:
    port = int(plane.describe().address.rpartition(":")[2])
    noise = random.Random(3)
    connections = []
    for size in (0, 1, 64, 5000):
        connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        connection.sendall(noise.randbytes(size))
        connections.append(connection)
    sender = dealer(context, plane)
    sender.send_multipart([header(), *FULL])
    assert receive(plane)
    for connection in connections:
        connection.close()
    assert set(plane.dropped) <= {"header"}  # ZMTP 1.0 had no greeting, so some of the noise looks like messages
    assert bytes(memory.block(2)) == FULL[1]


def test_a_flood_does_not_block_poll(context: Context, plane: ZmqPlane) -> None:
    """Guards the owner's timers: one poll handles a bounded number of messages."""
    sender = dealer(context, plane)
    for _ in range(100):
        sender.send_multipart([b"flood"])
    poll_until_dropped(plane, 1)
    most, before = 0, plane.dropped.total()
    while before < 100:
        plane.sockets()[0].poll(10)  # type: ignore[attr-defined]
        plane.poll()
        most, before = max(most, plane.dropped.total() - before), plane.dropped.total()
    assert most <= 32


def test_a_send_to_a_closed_port_can_be_cancelled(context: Context, memory: HostMemory) -> None:
    """Guards against blocks that are held while the socket tries to connect."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but not listening
        port = unused.getsockname()[1]
        plane = ZmqPlane(context, memory, "prefill/1")
        plane.connect("decode/1", PlaneAddress(plane="zmq", host="elsewhere", address=f"tcp://127.0.0.1:{port}"))
        plane.post_send("decode/1", KEY, [0])
        assert plane.poll() == [] and not plane.idle(KEY.transfer_id)
        plane.cancel(KEY.transfer_id)
        assert plane.idle(KEY.transfer_id)
        plane.post_send("decode/1", KEY, [0])
        plane.forget("decode/1")
        assert [(done.key, done.sending, done.ok) for done in plane.poll()] == [(KEY, True, False)]
        assert plane.idle(KEY.transfer_id)
        plane.close()


def test_a_loopback_address_of_another_host_is_not_reached(context: Context, memory: HostMemory) -> None:
    """Guards against connecting to an unrelated port of this host, and KV that is waited for until it is late, as a
    sender on another host looks for this one's address there."""
    plane = ZmqPlane(context, memory, "prefill/1", ListenHost("127.0.0.1", "10.1.2.4"))
    local = ZmqPlane(context, memory, "prefill/2")

    def reached(host: str, address: str) -> bool:
        return plane.reaches(PlaneAddress(plane="zmq", host=host, address=address))

    here = local.describe()
    assert reached(here.host, here.address)
    assert not local.reaches(PlaneAddress(plane="zmq", host="elsewhere", address="tcp://10.1.2.3:5000"))
    assert not reached("elsewhere", here.address)
    assert not reached("elsewhere", "tcp://[::1]:5000") and not reached("elsewhere", "tcp://localhost:5000")
    assert reached("elsewhere", "tcp://10.1.2.3:5000") and reached("elsewhere", "tcp://[fd00::1]:5000")
    for nonsense in ("tcp://10.1.2.3:0", "tcp://10.1.2.3:65536", "tcp://10.1.2.3", "tcp://a;b:1", "inproc://x:1"):
        assert not reached("elsewhere", nonsense), nonsense
    plane.close()
    local.close()


@pytest.mark.parametrize("host", ["256.1.1.1", "203.0.113.7"])
def test_a_host_that_cannot_be_bound_is_a_settings_error(context: Context, memory: HostMemory, host: str) -> None:
    with pytest.raises(SettingsError):
        ZmqPlane(context, memory, "decode/1", ListenHost(host, host))


def test_a_plane_describes_the_host_that_its_peers_reach(context: Context, memory: HostMemory) -> None:
    """Guards workers behind the network of a container: the bound address makes sense inside it only."""
    plane = ZmqPlane(context, memory, "decode/1", ListenHost("127.0.0.1", "decode-0.example"))
    address = plane.describe().address
    assert re.fullmatch(r"tcp://decode-0\.example:[0-9]+", address) and is_address(address)
    plane.close()


@pytest.mark.parametrize("identity", ["", "\0x", "x" * 256])
def test_an_invalid_identity_is_a_settings_error(context: Context, memory: HostMemory, identity: str) -> None:
    with pytest.raises(SettingsError):
        ZmqPlane(context, memory, identity)
