"""Guards the plane `nccl` on CPU, over pipes that match by order alone: the contract of every plane, and its own rules:
equal order at both ends, no movement without agreement, aborts in bounded time, a new connection afterwards."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.planes.base import ChunkKey, Plane
from baton.kvtransfer.planes.channel import Close, Open, SendGranted, SendRefused, SendRequest, StorePut
from baton.kvtransfer.planes.nccl import PACK_BELOW_BYTES, NcclPlane
from baton.node.messages.transfer import PlaneAddress


def _load(name: str):
    """Load a file beside this one."""
    spec = importlib.util.spec_from_file_location(f"nccl_plane_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


contract = _load("test_planes")
fake = _load("nccl_fake")
SENDER, RECEIVER, OTHER, X, Y = contract.SENDER, contract.RECEIVER, contract.OTHER, contract.X, contract.Y

test_bytes_arrive = contract.test_bytes_arrive_bit_for_bit_and_nowhere_else
test_several_transfers_interleave = contract.test_several_transfers_interleave
test_a_receive_is_reported_once = contract.test_a_receive_is_reported_once
test_a_cancelled_transfer = contract.test_a_cancelled_transfer_is_not_reported_and_soon_idle
test_a_receive_that_is_never_sent = contract.test_a_receive_that_is_never_sent_can_be_cancelled
test_late_data = contract.test_late_data_of_a_cancelled_transfer_is_ignored
test_late_retry = contract.test_late_data_of_an_old_retry_is_ignored
test_another_peer = contract.test_another_peer_cannot_fill_a_posted_receive
test_another_length = contract.test_a_chunk_of_another_length_is_not_written
test_another_size = contract.test_blocks_of_another_size_are_not_written
test_forgetting = contract.test_forgetting_a_peer_fails_only_its_operations
test_connected_anew = contract.test_a_forgotten_peer_can_be_connected_again
test_without_a_connection = contract.test_without_a_connection_an_operation_fails_and_does_not_hang
test_connecting_again = contract.test_connecting_again_changes_nothing
test_impossible_receive = contract.test_an_impossible_receive_is_a_bug
test_impossible_send = contract.test_an_impossible_send_is_a_bug
test_descriptions = contract.test_ends_reach_each_other_by_their_descriptions
test_nonsense = contract.test_an_invalid_address_is_not_reached_and_raises_nothing


class NcclRig(contract.Rig):
    def __init__(self, **options: object) -> None:
        super().__init__("nccl")
        self.pipes = fake.Fabric()
        self.now = 0.0
        self._options = options

    def _plane(self, name: str, memory: HostMemory) -> Plane:
        connector = fake.FakeConnector(self.pipes, memory, f"gpu{len(self.ends)}:nccl-2")
        return NcclPlane(self.context, connector, name, clock=lambda: self.now, **self._options)  # type: ignore[arg-type]

    def close(self) -> None:
        super().close()
        assert self.pipes.violations == []


@pytest.fixture
def rig() -> Iterator[NcclRig]:
    rig = NcclRig()
    yield rig
    rig.close()


@pytest.fixture
def two_sided(rig: NcclRig) -> NcclRig:
    return rig


@pytest.fixture
def pair(rig: NcclRig):
    """Two ends with an open connection."""
    sender, receiver = rig.end(SENDER, 12, 4096), rig.end(RECEIVER, 12, 4096)
    rig.move(sender, receiver, ChunkKey(Y, 0, 0), [0], [0])
    rig.until(lambda: bool(rig.received(receiver)) and bool(rig.sent(sender)))
    return rig, sender, receiver


def test_sends_are_issued_in_the_order_of_the_receives(pair) -> None:
    """Guards against mixed-up chunks: receives are posted in another order than sends, and one is cancelled."""
    rig, sender, receiver = pair
    for seq in (3, 1, 2, 4):
        receiver.plane.post_receive(SENDER, ChunkKey(X, seq, 0), [seq], [seq + 5])
    receiver.plane.post_receive(SENDER, ChunkKey(b"z" * 16, 0, 0), [9], [1])
    receiver.plane.cancel(b"z" * 16)
    sender.plane.post_send(RECEIVER, ChunkKey(b"z" * 16, 0, 0), [9])
    for seq in (1, 2, 3, 4):
        sender.plane.post_send(RECEIVER, ChunkKey(X, seq, 0), [seq])
    rig.until(lambda: len(rig.received(receiver)) == 5)
    assert receiver.content([6, 7, 8, 9]) == sender.content([1, 2, 3, 4])
    assert rig.pipes.violations == []


@pytest.mark.parametrize("block_bytes", [64, PACK_BELOW_BYTES])
def test_pieces_are_consecutive_at_both_ends_or_packed(rig: NcclRig, block_bytes: int) -> None:
    sender, receiver = rig.end(SENDER, 12, block_bytes), rig.end(RECEIVER, 12, block_bytes)
    source, blocks = [0, 1, 2, 5, 6, 9], [4, 5, 7, 8, 9, 0]
    rig.move(sender, receiver, ChunkKey(X, 0, 0), source, blocks)
    rig.until(lambda: len(rig.received(receiver)) == len(rig.sent(sender)) == 1)
    assert receiver.content(blocks) == sender.content(source)
    (found,) = rig.pipes.pairs.values()
    assert found.sends[0].packed is (block_bytes < PACK_BELOW_BYTES)
    assert found.receives[0].pieces == [(4, 2), (7, 1), (8, 2), (0, 1)]


def test_a_stalled_receive_is_aborted_and_holds_its_blocks_until_then(pair) -> None:
    """Guards against freeing blocks while the receive kernel waits for a frozen peer."""
    rig, sender, receiver = pair
    rig.pipes.frozen, rig.pipes.abort_asks = True, 5
    rig.move(sender, receiver, ChunkKey(X, 0, 0), [1], [1])
    rig.until(lambda: any(found.receives[1:] for found in rig.pipes.pairs.values()))
    receiver.plane.cancel(X)
    rig.now = 1.9
    receiver.plane.poll()
    assert not receiver.plane.idle(X)
    rig.now = 2.1
    receiver.plane.poll()
    assert not receiver.plane.idle(X)
    rig.until(lambda: receiver.plane.idle(X))
    assert not any(done.key.transfer_id == X for done in rig.done[RECEIVER])


def test_issued_operations_of_a_forgotten_peer_fail_after_the_abort(pair) -> None:
    """Guards the blocks: the protocol retries into the same ones as soon as the failure is reported."""
    rig, sender, receiver = pair
    rig.pipes.frozen, rig.pipes.abort_asks = True, 3
    rig.move(sender, receiver, ChunkKey(X, 0, 0), [1], [1])
    rig.until(lambda: any(found.receives[1:] for found in rig.pipes.pairs.values()))
    receiver.plane.forget(SENDER)
    assert receiver.plane.poll() == [] and not receiver.plane.idle(X)
    rig.until(lambda: rig.received(receiver, ok=False) == {ChunkKey(X, 0, 0)})
    assert receiver.plane.idle(X)
    rig.until(lambda: rig.sent(sender, ok=False) == {ChunkKey(X, 0, 0)})


def test_after_a_stall_the_next_send_opens_a_new_connection(pair) -> None:
    rig, sender, receiver = pair
    rig.pipes.frozen = True
    rig.move(sender, receiver, ChunkKey(X, 0, 0), [1], [1])
    rig.until(lambda: any(found.receives[1:] for found in rig.pipes.pairs.values()))
    rig.now += 2.1
    rig.until(lambda: rig.received(receiver, ok=False) == rig.sent(sender, ok=False) == {ChunkKey(X, 0, 0)})
    rig.pipes.frozen = False
    rig.move(sender, receiver, ChunkKey(X, 0, 1), [1], [1])
    rig.until(lambda: ChunkKey(X, 0, 1) in rig.received(receiver))
    assert receiver.content([1]) == sender.content([1]) and len(rig.pipes.pairs) == 2


def test_a_connection_that_does_not_open_fails_its_sends_in_time(rig: NcclRig) -> None:
    sender = rig.end(SENDER)
    silent = rig.context.zmq.socket(11)  # zmq.STREAM: accepts the connection and never sends
    port = silent.bind_to_random_port("tcp://127.0.0.1")
    address = PlaneAddress(
        plane="nccl", host=sender.plane.describe().host, address=f"tcp://127.0.0.1:{port}|gpu9:nccl-2"
    )
    sender.plane.connect(RECEIVER, address)
    sender.plane.post_send(RECEIVER, ChunkKey(X, 0, 0), [0])
    rig.turn()
    assert rig.done[SENDER] == [] and not sender.plane.idle(X)
    rig.now = 20.1
    rig.turn()
    assert rig.sent(sender, ok=False) == {ChunkKey(X, 0, 0)} and sender.plane.idle(X)
    silent.close(0)


def test_a_warm_plane_opens_its_communicator_on_connect() -> None:
    rig = NcclRig(warm=True)
    rig.end(SENDER), rig.end(RECEIVER)
    assert len(rig.pipes.pairs) == 2
    rig.close()


@pytest.mark.parametrize("device", ["gpu0:nccl-2", "gpu1:nccl-3", "gpu1", "", ":nccl-2"])
def test_one_gpu_or_another_nccl_is_not_reached(rig: NcclRig, device: str) -> None:
    """Guards against pairs for which NCCL hangs or fails at set-up: two ranks on one GPU, or different versions."""
    end = rig.end(SENDER)
    described = end.plane.describe()
    text = described.address.partition("|")[0] + "|"
    assert end.plane.reaches(PlaneAddress(plane="nccl", host=described.host, address=text + "gpu1:nccl-2"))
    assert not end.plane.reaches(PlaneAddress(plane="nccl", host=described.host, address=text + device))


def test_a_peer_of_another_host_is_not_reached_over_loopback(rig: NcclRig) -> None:
    end = rig.end(SENDER)
    text = end.plane.describe().address.replace("gpu0", "gpu1")
    assert not end.plane.reaches(PlaneAddress(plane="nccl", host="elsewhere", address=text))


CONNECTION = b"w" * 16
WRONG_WORDS = [
    SendGranted(CONNECTION, 7, (1,), False),
    SendRefused(CONNECTION, 0),
    SendGranted(CONNECTION, 0, (5,), False),
    SendGranted(CONNECTION, 0, (1, 1), False),
    SendRequest(CONNECTION, 0, X, 0, 0, 1, 4096),
]


@pytest.mark.parametrize(
    "message", WRONG_WORDS, ids=lambda message: f"{type(message).__name__}-{getattr(message, 'number', '')}"
)
def test_an_invalid_message_of_a_peer_closes_the_connection_only(pair, message) -> None:
    """Guards the order and sizes of NCCL calls, which depend on the peer's messages."""
    rig, sender, receiver = pair
    (connection_id,) = sender.plane._connections
    sender.plane._on_message(
        RECEIVER, type(message)(connection_id, *[getattr(message, name) for name in message.__struct_fields__[1:]])
    )
    assert connection_id not in sender.plane._connections
    rig.move(sender, receiver, ChunkKey(X, 0, 0), [2], [2])
    rig.until(lambda: ChunkKey(X, 0, 0) in rig.received(receiver))
    assert receiver.content([2]) == sender.content([2])


@pytest.mark.parametrize(
    "message",
    [
        StorePut(CONNECTION, "k", b"v"),
        SendRequest(CONNECTION, 0, X, 0, 0, 1, 4096),
        Close(CONNECTION),
        SendRefused(CONNECTION, 0),
    ],
)
def test_messages_about_unknown_connections_are_ignored(pair, message) -> None:
    rig, sender, receiver = pair
    receiver.plane._on_message(SENDER, message)
    rig.move(sender, receiver, ChunkKey(X, 0, 0), [2], [2])
    rig.until(lambda: ChunkKey(X, 0, 0) in rig.received(receiver))


def test_a_second_open_replaces_the_first_connection(pair) -> None:
    """Guards GPU memory against a peer that opens one communicator after the other."""
    _, _, receiver = pair
    for number in range(5):
        receiver.plane._on_message(SENDER, Open(bytes([number]) * 16))
    assert [connection.sending for connection in receiver.plane._connections.values()] == [False]
