"""When a rank counts as lost."""

from baton.worker.ranks.members import LOST_S, Beats
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
