"""When a rank counts as lost, and what follows."""

from queue import SimpleQueue

import pytest

from baton.node.errors import PeerLost
from baton.worker.io_thread import RankLost
from baton.worker.ranks.links import pair
from baton.worker.ranks.members import LOST_S, Beats, MemberWatch
from baton.worker.ranks.messages import BEAT_S


def test_a_rank_without_beats_is_lost_within_three_seconds():
    """Guards against a frozen rank that holds up its worker for ever."""
    beats, now = Beats(["rank 1", "rank 2"], 100.0), 100.0
    while not (wrong := beats.missing(now)):
        beats.heard("rank 1", now)
        now += BEAT_S
    assert wrong == "rank 2 does not answer" and LOST_S < now - 100.0 <= 3.0


def test_a_process_that_stood_still_blames_no_other():
    """Guards against the end of a worker whose host was suspended."""
    beats = Beats(["rank 1"], 100.0)
    assert not beats.missing(100.5)
    assert not beats.missing(900.0)
    assert beats.missing(900.5) == beats.missing(901.0) == beats.missing(901.5) == ""
    assert beats.missing(902.1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loss_is_known_to_all_even_if_a_device_fails() -> None:
    """Guards against a worker that waits for ever, and ranks that go on waiting, where a broken GPU takes no more
    calls."""
    (dead, gone), (control, other), (link, peer) = pair(0, 1), pair(0, 2), pair(0, 2)
    delivered: SimpleQueue[RankLost] = SimpleQueue()

    def give_up() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    watch = MemberWatch([dead, control], [link], give_up)
    gone.close()
    watch.begin(delivered.put)
    assert delivered.get(timeout=60.0) == RankLost("rank 1 has ended")
    watch.join()
    for end in (other, peer):
        with pytest.raises(PeerLost, match="has ended"):
            end.receive(60.0)
    for end in (dead, control, other, link, peer):
        end.close()
