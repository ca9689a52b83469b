"""Guards testing.loopback: scripted outcomes happen as scripted, since other tests depend on them."""

from __future__ import annotations

import pytest

from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.planes.base import ChunkKey, IoDone
from baton.node.errors import InvariantBroken
from baton.testing.loopback import Fate, LoopbackFabric, LoopbackPlane, Movement, Outcome, Script, deliver

KEY = ChunkKey(b"x" * 16, 0, 0)


def pair(script: Script, polls_to_stop: int = 0) -> tuple[LoopbackFabric, LoopbackPlane, LoopbackPlane]:
    """Sender "p" with blocks of 1s, receiver "d" with zeros; both of 4 blocks of 8 bytes."""
    fabric = LoopbackFabric(script, polls_to_stop)
    sender, receiver = fabric.plane("p", HostMemory(4, 8)), fabric.plane("d", HostMemory(4, 8))
    for index in range(4):
        sender.memory.block(index)[:] = b"\1" * 8
    sender.connect("d", receiver.describe())
    receiver.connect("p", sender.describe())
    receiver.post_receive("p", KEY, [0, 1], [2, 3])
    sender.post_send("d", KEY, [0, 1])
    return fabric, sender, receiver


def content(plane: LoopbackPlane) -> bytes:
    return bytes(plane.memory.block(2)) + bytes(plane.memory.block(3))


def test_delivery_takes_the_scripted_number_of_polls() -> None:
    _, sender, receiver = pair(lambda m: Fate(after_polls=3))
    assert receiver.poll() == receiver.poll() == sender.poll() == []
    assert content(receiver) == bytes(16) and not sender.idle(KEY.transfer_id)
    assert receiver.poll() == [IoDone(KEY, sending=False, ok=True)]
    assert sender.poll() == [IoDone(KEY, sending=True, ok=True)]
    assert content(receiver) == b"\1" * 16 and sender.idle(KEY.transfer_id)


def test_bytes_are_read_when_they_arrive() -> None:
    """Guards fidelity: as on a real plane, changing blocks during a send corrupts the transfer."""
    _, sender, receiver = pair(deliver)
    sender.memory.block(0)[:] = b"\2" * 8
    receiver.poll()
    assert content(receiver) == b"\2" * 8 + b"\1" * 8


@pytest.mark.parametrize("corrupt_at", [0, 9, 31])
def test_corruption_flips_one_bit_of_the_receiver_only(corrupt_at: int) -> None:
    _, sender, receiver = pair(lambda m: Fate(Outcome.CORRUPT, corrupt_at=corrupt_at))
    assert [done.ok for done in receiver.poll()] == [True]
    expected = bytearray(b"\1" * 16)
    expected[corrupt_at % 16] ^= 1
    assert content(receiver) == expected
    assert bytes(sender.memory.block(0)) == bytes(sender.memory.block(1)) == b"\1" * 8


def test_a_loss_is_reported_to_neither_end() -> None:
    _, sender, receiver = pair(lambda m: Fate(Outcome.LOSE))
    assert receiver.poll() == []
    assert sender.poll() == [IoDone(KEY, sending=True, ok=True)]
    assert content(receiver) == bytes(16) and not receiver.idle(KEY.transfer_id)


def test_a_failure_is_reported_to_both_ends_and_writes_nothing() -> None:
    _, sender, receiver = pair(lambda m: Fate(Outcome.FAIL))
    assert [(done.sending, done.ok) for done in receiver.poll() + sender.poll()] == [(False, False), (True, False)]
    assert content(receiver) == bytes(16)


def test_the_script_is_called_once_a_movement_with_its_key() -> None:
    movements: list[Movement] = []

    def script(movement: Movement) -> Fate:
        movements.append(movement)
        return Fate()

    _, sender, receiver = pair(script)
    sender.post_send("d", KEY._replace(retry=1), [0, 1])
    receiver.poll()
    assert movements == [Movement("p", "d", KEY), Movement("p", "d", KEY._replace(retry=1))]
    assert receiver.dropped["unknown"] == 1


def test_a_cancelled_receive_stays_busy_for_polls_to_stop_and_writes_nothing() -> None:
    """Models NCCL, whose stream must drain first; tests of the blocks' quarantine depend on it."""
    _, _, receiver = pair(deliver, polls_to_stop=2)
    receiver.cancel(KEY.transfer_id)
    busy = []
    for _ in range(3):
        busy.append(not receiver.idle(KEY.transfer_id))
        assert receiver.poll() == []
    assert busy == [True, True, False]
    assert content(receiver) == bytes(16)
    receiver.cancel(b"never seen 16 by")
    assert receiver.idle(b"never seen 16 by")


@pytest.mark.parametrize("identity", ["p", "d"])
def test_closing_an_end_discards_its_movements(identity: str) -> None:
    fabric, sender, receiver = pair(lambda m: Fate(after_polls=2))
    end = fabric.end(identity)
    assert end is not None
    end.close()
    assert receiver.poll() == receiver.poll() == []
    assert content(receiver) == bytes(16)
    assert not (receiver if identity == "p" else sender).reaches(end.describe())
    sender.post_send("d", KEY._replace(seq=1), [0])
    assert fabric.end(identity) is None


def test_identities_are_unique_in_a_fabric() -> None:
    fabric, *_ = pair(deliver)
    with pytest.raises(InvariantBroken):
        fabric.plane("p", HostMemory(1, 1))
