"""The tables of transfers: what is found by which name, for how long, and early grants."""

from __future__ import annotations

from baton.kvtransfer.protocol import tables
from baton.kvtransfer.protocol.receiver import Incoming, Landings, Receiver
from baton.kvtransfer.protocol.sender import Sender
from baton.kvtransfer.protocol.tables import ReceiverTable, Receiving, SenderTable, Sending
from baton.kvtransfer.protocol.transfer import Timing
from baton.node.leg import LegKey
from baton.node.messages.transfer import Grant
from baton.testing.loopback import LoopbackFabric


def leg(number: int) -> LegKey:
    return LegKey(f"r{number}", 0)


def grant(number: int) -> Grant:
    transfer_id = b"%016d" % number
    return Grant(transfer_id=transfer_id, request_id=f"r{number}", attempt=0, first_block=0, num_blocks=1, lease_s=3.0)


def sending(number: int) -> Sending:
    machine = Sender(lambda chunks: [], chunk_blocks=lambda: 1, timing=Timing(), now=0.0, deadline=9.0)
    return Sending(leg(number), "d/1", machine)


def incoming(number: int, deadline: float = 9.0) -> Incoming:
    return Incoming(b"%016d" % number, leg(number), "p/1", 0, (number,), deadline)


def receiving(number: int) -> Receiving:
    machine = Receiver(incoming(number), lambda chunks: [], Landings(), pulls=True, window=8, timing=Timing())
    return Receiving("p/1", machine, LoopbackFabric().plane("d/1", None))  # type: ignore[arg-type]


def test_an_ended_sender_is_found_until_it_is_forgotten() -> None:
    """Guards late messages: they are answered as long as they may come, and no table grows for ever."""
    table, first, second = SenderTable(), sending(1), sending(2)
    for each, number in ((first, 1), (second, 2)):
        table.add(each)
        table.bind(grant(number).transfer_id, each)
        each.machine.on_message(grant(number), 0.0)
    table.end(first, forget_at=5.0)
    table.forget_ended(4.9)
    assert list(table.live) == [leg(2)]
    assert table.of_leg(leg(1)) is first and table.of_transfer(grant(1).transfer_id) is first
    table.forget_ended(5.0)
    assert table.of_leg(leg(1)) is None and table.of_transfer(grant(1).transfer_id) is None
    assert table.of_leg(leg(2)) is second and table.of_transfer(grant(2).transfer_id) is second


def test_a_transfer_id_keeps_the_sender_that_had_it_first() -> None:
    """Guards against a grant that takes over the transfer of another leg."""
    table, first, second = SenderTable(), sending(1), sending(2)
    table.bind(b"t" * 16, first)
    table.bind(b"t" * 16, second)
    assert table.of_transfer(b"t" * 16) is first


def test_an_early_grant_is_taken_once_and_only_for_its_peer() -> None:
    """Guards against a grant of another decode worker for the same leg, which may have failed meanwhile."""
    table = SenderTable()
    table.keep_grant(leg(1), "d/1", grant(1), 0.0)
    assert table.take_grant(leg(1), "d/1") == grant(1)
    assert table.take_grant(leg(1), "d/1") is None
    table.keep_grant(leg(1), "d/2", grant(1), 0.0)
    assert table.take_grant(leg(1), "d/1") is None


def test_of_too_many_early_grants_the_oldest_is_dropped(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Guards the bound: grants for prompts that never come must not fill the memory."""
    monkeypatch.setattr(tables, "MAX_EARLY_GRANTS", 2)
    table = SenderTable()
    for number in range(3):
        table.keep_grant(leg(number), "d/1", grant(number), 0.0)
    assert [table.take_grant(leg(number), "d/1") for number in range(3)] == [None, grant(1), grant(2)]


def test_a_grant_awaits_its_prompt_for_a_bounded_time() -> None:
    """Guards against aborting a transfer whose prompt is late, and against one that is renewed for ever."""
    table = SenderTable()
    table.keep_grant(leg(1), "d/1", grant(1), 0.0)
    table.keep_grant(leg(1), "d/1", grant(1), 50.0)  # repeated
    transfer_id = grant(1).transfer_id
    assert table.awaits_prompt(transfer_id, "d/1", 59.0) and not table.awaits_prompt(transfer_id, "d/2", 59.0)
    assert not table.awaits_prompt(transfer_id, "d/1", 61.0)
    table.take_grant(leg(1), "d/1")
    assert not table.awaits_prompt(transfer_id, "d/1", 1.0)


def test_an_ended_receiver_is_found_until_it_is_forgotten() -> None:
    """Guards the answer to a repeated Finish after the Ack was lost."""
    table, first, second = ReceiverTable(), receiving(1), receiving(2)
    table.add(first)
    table.add(second)
    table.end(first, forget_at=5.0)
    table.forget_ended(4.9)
    assert list(table.live.values()) == [second] and table.of_transfer(first.machine.transfer_id) is first
    table.forget_ended(5.0)
    assert table.of_transfer(first.machine.transfer_id) is None
    assert table.of_transfer(second.machine.transfer_id) is second


def test_receivers_wait_for_their_peer_until_their_deadline() -> None:
    """Guards blocks held for a prefill worker that never says Hello."""
    table = ReceiverTable()
    for each in (incoming(1, deadline=2.0), incoming(2)):
        table.waiting[each.transfer_id] = each
    assert table.overdue(1.9) == [] and table.overdue(2.0) == [incoming(1, deadline=2.0)]
    assert table.waiting_for("p/1") == [incoming(1, deadline=2.0), incoming(2)] and table.waiting_for("p/2") == []
