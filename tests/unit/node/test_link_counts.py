"""node.link_counts: every lost message is noticed, and nothing else is taken for one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.node.link_counts import LinkCounts


@given(
    before=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    copies=st.lists(st.sampled_from(["1", "1", "1", "0", "2", "count"]), max_size=60),
)
def test_losses_are_counted_once(before: tuple[int, int], copies: list[str]) -> None:
    """Guards requests whose message was lost, whatever was sent and lost before the link was joined."""
    sender, receiver = LinkCounts(sent=before[0]), LinkCounts(received=before[1])
    receiver.join(sender.sent)
    lost = doubled = 0
    for each in [*copies, "count"]:
        if each == "count":  # a message that carries the count, and arrives
            found = receiver.lost(sender.sent)
            assert found == max(0, lost - doubled)
            lost = doubled = 0
        lost += each == "0"
        doubled += each == "2"
        sender.sent += 1
        receiver.received += {"0": 0, "2": 2}.get(each, 1)


def test_a_peer_that_counts_nothing_loses_nothing() -> None:
    """Guards stand-ins of a peer, which count no messages."""
    counts = LinkCounts()
    counts.join(0)
    for _ in range(3):
        counts.received += 1
        assert counts.lost(0) == 0
