"""kvtransfer.protocol.receiver: digests that the plane computed during a transfer, and reported times."""

from __future__ import annotations

from baton.kvtransfer.planes.base import ChunkKey
from baton.kvtransfer.protocol.receiver import Incoming, Landings, Receiver
from baton.kvtransfer.protocol.transfer import Action, Arrived, PostReceive, SendMessage, State, Timing
from baton.node.leg import LegKey
from baton.node.messages.transfer import Abort, Accept, Finish, Offer, Renew, Renewed, Valid, Validate

ID, RIGHT, WRONG = b"t" * 16, b"right digest...!", b"wrong digest...!"


def receiver(digests: list[bytes], landings: Landings | None = None) -> tuple[Receiver, list[list[int]]]:
    """A receiver that has accepted a chunk of two blocks; its digest requests are answered from `digests`."""
    asked: list[list[int]] = []

    def digests_of(chunks: object) -> list[bytes]:
        asked.extend([*chunk] for chunk in chunks)  # type: ignore[attr-defined]
        return [digests.pop(0)]

    incoming = Incoming(ID, LegKey("r", 0), "p/1", first_block=0, blocks=(4, 5), deadline=9.0)
    machine = Receiver(incoming, digests_of, landings or Landings(), pulls=True, window=8, timing=Timing())
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


def beat(machine: Receiver) -> list[object]:
    """The next renewal, at the time that the machine asks for."""
    messages: list[object] = []
    while not any(isinstance(message, Renew | Abort) for message in messages):
        messages = messages_of(machine.on_timer(machine.wake_at))
    return messages


def test_a_sender_that_is_not_heard_is_given_up_after_a_few_renewals() -> None:
    """Guards against a wait until the request's deadline where the sender's messages do not arrive."""
    machine, _ = receiver([])
    beats = [beat(machine) for _ in range(Timing().stall_renewals)]
    assert any(isinstance(message, Abort) for message in beats[-1]) and machine.state is State.STOPPING


def test_a_sender_that_answers_is_kept_while_it_computes() -> None:
    machine, _ = receiver([RIGHT])
    machine.on_io_done(ChunkKey(ID, 0, 0), True, 0.0, RIGHT)
    machine.on_message(Valid(transfer_id=ID, seq=0, retry=0), 0.0)
    for _ in range(3 * Timing().stall_renewals):
        beat(machine)
        machine.on_message(Renewed(transfer_id=ID), 0.0)
        if machine.wake_at >= 8.0:
            break
    assert machine.state is State.OPEN


def test_a_receiver_that_stood_still_blames_no_peer() -> None:
    """Guards against failed transfers after a pause of this process: the answers of the peer are still to be read."""
    machine, _ = receiver([])
    machine.on_timer(8.0)
    assert machine.state is State.OPEN


def test_bytes_that_stop_end_a_transfer_unless_others_of_the_peer_land() -> None:
    """Guards against a link on which only the bytes stand still, and against giving up on one that is merely slow."""
    for others_land in (False, True):
        landings = Landings(count=1)
        machine, _ = receiver([], landings)
        for _ in range(Timing().stall_renewals + 1):
            if machine.state is State.OPEN:
                beat(machine)
                machine.on_message(Renewed(transfer_id=ID), 0.0)
                landings.count += others_land
        assert (machine.state is State.OPEN) is others_land
