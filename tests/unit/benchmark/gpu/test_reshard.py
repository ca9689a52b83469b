"""The benchmark of resharding moves what it says, and notices what is wrong."""

from baton.benchmark.gpu.pools import HOST
from baton.benchmark.gpu.reshard import NAMES, GroupEnd, receive


def test_units_of_unequal_groups_are_compared():
    """Guards against figures of copies that went nowhere."""
    sender, receiver = GroupEnd(HOST, NAMES[0], 2, 2), GroupEnd(HOST, NAMES[1], 4, 2)
    sender.fill(7)
    receiver.fill(8)
    receiver.connect(NAMES[0], sender.address())
    assert receiver.count_wrong(7) == 2 * 8
    receive(receiver, [range(1)], 1)
    assert receiver.count_wrong(7) == 8
    receive(receiver, [range(1, 2)], 2)
    assert receiver.count_wrong(7) == 0
    sender.close()
    receiver.close()
