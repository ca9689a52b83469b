"""kvtransfer.protocol.receiver: digests that the plane computed during a transfer, and reported times."""

from __future__ import annotations

from baton.kvtransfer.planes.base import ChunkKey
from baton.kvtransfer.protocol.receiver import Incoming, Receiver
from baton.kvtransfer.protocol.transfer import Action, Arrived, PostReceive, SendMessage, Timing
from baton.node.leg import LegKey
from baton.node.messages.transfer import Accept, Finish, Offer, Valid, Validate

ID, RIGHT, WRONG = b"t" * 16, b"right digest...!", b"wrong digest...!"


def receiver(digests: list[bytes]) -> tuple[Receiver, list[list[int]]]:
    """A receiver that has accepted a chunk of two blocks; its digest requests are answered from `digests`."""
    asked: list[list[int]] = []

    def digests_of(chunks: object) -> list[bytes]:
        asked.extend([*chunk] for chunk in chunks)  # type: ignore[attr-defined]
        return [digests.pop(0)]

    incoming = Incoming(ID, LegKey("r", 0), "p/1", first_block=0, blocks=(4, 5), deadline=9.0)
    machine = Receiver(incoming, digests_of, pulls=True, window=8, timing=Timing())
    machine.start(0.0)
    machine.on_message(Offer(transfer_id=ID, seq=0, first_block=0, source=(1, 2), digest=RIGHT), 0.0)
    return machine, asked


def messages_of(actions: list[Action]) -> list[object]:
    return [action.message for action in actions if isinstance(action, SendMessage)]


def test_a_digest_of_the_plane_is_not_computed_again() -> None:
    machine, asked = receiver([])
    actions = machine.on_io_done(ChunkKey(ID, 0, 0), True, 0.0, RIGHT)
    assert messages_of(actions) == [Validate(transfer_id=ID, seq=0, retry=0)] and not asked


def test_a_digest_of_the_plane_is_compared() -> None:
    """Guards against accepting bytes because the plane has read them."""
    machine, _ = receiver([])
    actions = machine.on_io_done(ChunkKey(ID, 0, 0), True, 0.0, WRONG)
    assert PostReceive(ChunkKey(ID, 0, 1), (1, 2), (4, 5)) in actions
    assert messages_of(actions) == [Accept(transfer_id=ID, seq=0, retry=1)]


def test_without_a_digest_of_the_plane_the_blocks_are_read() -> None:
    for digest, retry in ((RIGHT, 0), (WRONG, 1)):
        machine, asked = receiver([digest])
        actions = machine.on_io_done(ChunkKey(ID, 0, 0), True, 0.0)
        assert asked == [[4, 5]]
        (message,) = messages_of(actions)
        assert isinstance(message, Accept if retry else Validate) and message.retry == retry


def test_a_movement_that_failed_has_no_digest() -> None:
    machine, asked = receiver([])
    (message,) = messages_of(machine.on_io_done(ChunkKey(ID, 0, 0), False, 0.0))
    assert isinstance(message, Accept) and not asked


def test_the_wait_ends_when_bytes_move_after_the_finish() -> None:
    """Guards the timeline: a repeated Finish or a later chunk must not restart the time that bytes take."""
    machine, _ = receiver([])
    finish = Finish(transfer_id=ID, num_chunks=1, token_id=7, logprob=None, waited_s=0.5)
    machine.on_message(finish, 1.0)
    machine.on_message(finish, 2.0)
    machine.on_io_done(ChunkKey(ID, 0, 0), True, 3.0, RIGHT)
    arrived, _ = machine.on_message(Valid(transfer_id=ID, seq=0, retry=0), 4.0)
    assert arrived == Arrived(7, None, wait_s=0.5, transfer_s=3.0)
