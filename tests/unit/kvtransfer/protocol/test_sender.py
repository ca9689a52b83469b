"""kvtransfer.protocol.sender: chunks and their checksums, the lease, and the wait of the first token."""

from __future__ import annotations

from baton.kvtransfer.blocks.checksum import digest_of_sums
from baton.kvtransfer.protocol.sender import Sender
from baton.kvtransfer.protocol.transfer import Action, CancelIo, SendMessage, Timing
from baton.node.messages.base import MAX_OFFER_BLOCKS
from baton.node.messages.transfer import Abort, Finish, Grant, Offer, Renew, Validate

ID = b"t" * 16
SUMS = {block: bytes([block]) * 8 for block in range(10)}


def sender(chunk_blocks: int = 2) -> tuple[Sender, list[tuple[int, ...]]]:
    """A sender with chunks of a given size, and the chunks for which it requests a digest."""
    asked: list[tuple[int, ...]] = []

    def digests_of(chunks: object) -> list[bytes]:
        asked.extend(chunks)  # type: ignore[call-overload]
        return [b"read %d" % chunk[0] for chunk in chunks]  # type: ignore[attr-defined]

    return Sender(digests_of, chunk_blocks=lambda: chunk_blocks, timing=Timing(), now=0.0, deadline=9.0), asked


def grant(machine: Sender, first_block: int = 0) -> list[Action]:
    message = Grant(transfer_id=ID, request_id="r", attempt=0, first_block=first_block, num_blocks=8, lease_s=3.0)
    return machine.on_message(message, 0.0)


def offered(actions: list[Action]) -> list[tuple[tuple[int, ...], bytes]]:
    messages = [action.message for action in actions if isinstance(action, SendMessage)]
    return [(message.source, message.digest) for message in messages if isinstance(message, Offer)]


def of(*blocks: int) -> tuple[tuple[int, ...], bytes]:
    return blocks, digest_of_sums([SUMS[block] for block in blocks])


def test_blocks_with_a_checksum_are_not_read() -> None:
    machine, asked = sender()
    grant(machine)
    assert offered(machine.on_blocks([5, 6, 7], SUMS, 0.0)) == [of(5, 6), of(7)] and not asked


def test_chunks_end_where_checksums_begin() -> None:
    """Guards against reading more than the prefix that another request computed, which has no checksums."""
    machine, asked = sender()
    grant(machine)
    actions = machine.on_blocks([1, 2, 3, 4, 5, 6], {block: SUMS[block] for block in (4, 5, 6)}, 0.0)
    assert offered(actions) == [((1, 2), b"read 1"), ((3,), b"read 3"), of(4, 5), of(6)]
    assert asked == [(1, 2), (3,)]


def test_checksums_wait_for_the_grant() -> None:
    machine, asked = sender()
    assert machine.on_blocks([1, 2], {1: SUMS[1], 2: SUMS[2]}, 0.0) == []
    assert machine.on_blocks([1, 2, 3, 4], {3: SUMS[3], 4: SUMS[4]}, 0.0) == []
    assert offered(grant(machine, first_block=1)) == [of(2, 3), of(4)] and not asked


def test_an_offer_has_no_more_blocks_than_a_message_may() -> None:
    """Guards long prompts with small blocks: a receiver drops a message out of bounds."""
    machine, _ = sender(chunk_blocks=1 << 20)
    grant(machine)
    offers = offered(machine.on_blocks(range(MAX_OFFER_BLOCKS + 5), {}, 0.0))
    assert [len(blocks) for blocks, _ in offers] == [MAX_OFFER_BLOCKS, 5]


def test_the_receiver_renews_the_lease_of_the_sender() -> None:
    """Guards the blocks: after a silence of the granted lease the sender never says Valid again."""
    machine, _ = sender()
    grant(machine)
    machine.on_message(Renew(transfer_ids=(ID,)), 2.0)
    assert machine.on_timer(5.0) == [] and machine.wake_at == 5.0
    assert machine.on_timer(5.5) == [
        CancelIo(),
        SendMessage(Abort(transfer_id=ID, reason="lease expired", cancelled=False)),
    ]
    validate = Validate(transfer_id=ID, seq=0, retry=0)
    assert machine.on_message(validate, 5.6) == [
        SendMessage(Abort(transfer_id=ID, reason="lease expired", cancelled=False))
    ]


def test_the_finish_says_how_long_the_first_token_waited_for_the_grant() -> None:
    """Guards the timeline: a repeated Finish must say the same."""
    machine, _ = sender()
    machine.on_token(7, None, 1.0)
    machine.on_message(Grant(transfer_id=ID, request_id="r", attempt=0, first_block=0, num_blocks=0, lease_s=3.0), 1.5)
    finish = Finish(transfer_id=ID, num_chunks=0, token_id=7, logprob=None, waited_s=0.5)
    assert machine.on_timer(2.0) == [SendMessage(finish)] == machine.on_timer(3.0)
