"""The benchmark of resharding moves what it says, notices what is wrong, and times nothing but the movements."""

from unittest.mock import patch

from baton.benchmark.gpu.pools import HOST
from baton.benchmark.gpu.reshard import RECEIVER, GroupEnd, receive, sender_name
from baton.kvtransfer.planes import shm


def test_units_of_unequal_groups_are_compared():
    """Guards against figures of copies that went nowhere."""
    sender, receiver = GroupEnd(HOST, sender_name(2), 2, 2), GroupEnd(HOST, RECEIVER, 4, 2)
    sender.fill(7)
    receiver.fill(8)
    receiver.connect(sender_name(2), sender.address())
    assert receiver.count_wrong(7) == 2 * 8
    receive(receiver, sender_name(2), [range(1)], 1)
    assert receiver.count_wrong(7) == 8
    receive(receiver, sender_name(2), [range(1, 2)], 2)
    assert receiver.count_wrong(7) == 0
    sender.close()
    receiver.close()


def test_memory_is_mapped_in_the_first_round_alone():
    """Guards against figures of mapping, where groups of several sizes send to one in turn."""
    senders = {ranks: GroupEnd(HOST, sender_name(ranks), ranks, 1) for ranks in (1, 2)}
    receiver = GroupEnd(HOST, RECEIVER, 2, 1)
    for ranks, sender in senders.items():
        receiver.connect(sender_name(ranks), sender.address())
    with patch.object(shm, "_open", wraps=shm._open) as opened:
        for number in range(3):
            for ranks, sender in senders.items():
                sender.fill(10 * number + ranks)
                receive(receiver, sender_name(ranks), [range(1)], 10 * number + ranks)
                assert receiver.count_wrong(10 * number + ranks) == 0
    assert opened.call_count == 2 + 2, "one for each pair of ranks"
    for end in (*senders.values(), receiver):
        end.close()
