"""What the receiving machine does with a digest that the plane made on the way."""

from __future__ import annotations

from baton.kvtransfer.planes.base import ChunkKey
from baton.kvtransfer.protocol.receiver import Receiver
from baton.kvtransfer.protocol.transfer import Action, PostReceive, Tell, Timing
from baton.node.messages.transfer import Accept, Offer, Validate

ID, RIGHT, WRONG = b"t" * 16, b"right digest...!", b"wrong digest...!"


def receiver(digests: list[bytes]) -> tuple[Receiver, list[list[int]]]:
    """One that has accepted a chunk of two blocks, and what it asks to be digested, answered from `digests`."""
    asked: list[list[int]] = []

    def digests_of(chunks: object) -> list[bytes]:
        asked.extend([*chunk] for chunk in chunks)  # type: ignore[attr-defined]
        return [digests.pop(0)]

    machine = Receiver(
        ID,
        "r",
        0,
        first_block=0,
        blocks=(4, 5),
        digests_of=digests_of,
        pulls=True,
        window=8,
        timing=Timing(),
        deadline=9.0,
    )
    machine.start(0.0)
    machine.on_message(Offer(transfer_id=ID, seq=0, first_block=0, source=(1, 2), digest=RIGHT), 0.0)
    return machine, asked


def told(actions: list[Action]) -> list[object]:
    return [action.message for action in actions if isinstance(action, Tell)]


def test_a_digest_of_the_plane_is_not_made_again() -> None:
    machine, asked = receiver([])
    actions = machine.on_io_done(ChunkKey(ID, 0, 0), True, 0.0, RIGHT)
    assert told(actions) == [Validate(transfer_id=ID, seq=0, retry=0)] and not asked


def test_a_digest_of_the_plane_is_compared() -> None:
    """Guards against bytes that are believed because the plane has looked at them."""
    machine, _ = receiver([])
    actions = machine.on_io_done(ChunkKey(ID, 0, 0), True, 0.0, WRONG)
    assert PostReceive(ChunkKey(ID, 0, 1), (1, 2), (4, 5)) in actions
    assert told(actions) == [Accept(transfer_id=ID, seq=0, retry=1)]


def test_where_the_plane_made_none_the_blocks_are_read() -> None:
    for digest, retry in ((RIGHT, 0), (WRONG, 1)):
        machine, asked = receiver([digest])
        actions = machine.on_io_done(ChunkKey(ID, 0, 0), True, 0.0)
        assert asked == [[4, 5]]
        (message,) = told(actions)
        assert isinstance(message, Accept if retry else Validate) and message.retry == retry


def test_a_movement_that_failed_has_no_digest() -> None:
    machine, asked = receiver([])
    (message,) = told(machine.on_io_done(ChunkKey(ID, 0, 0), False, 0.0))
    assert isinstance(message, Accept) and not asked
