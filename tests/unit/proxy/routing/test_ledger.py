"""proxy.routing.ledger: no token lost, doubled or late, whatever order messages come in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.node.messages.control import Logprob, Tokens
from baton.proxy.routing.ledger import Gap, Ledger


def _tokens(index: int, *ids: int, attempt: int = 0, finish: str = "") -> Tokens:
    return Tokens(request_id="r", attempt=attempt, index=index, ids=ids, finish=finish)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.data())
def test_repeats_and_overlaps_change_nothing(ids: list[int], data: st.DataObject) -> None:
    """Guards exactly-once: messages that repeat any part of what is known add only what is new."""
    ledger, given_out = Ledger((1, 2)), []
    while len(given_out) < len(ids):
        begin = data.draw(st.integers(0, len(given_out)))
        end = data.draw(st.integers(begin + 1, len(ids)))
        new, _ = ledger.accept(_tokens(begin, *ids[begin:end]))
        given_out += new
    assert given_out == ids
    assert ledger.token_ids() == (1, 2, *ids)


def test_a_gap_is_noticed() -> None:
    """Guards against a lost message: its successor must not be taken."""
    ledger = Ledger((1,))
    ledger.accept(_tokens(0, 5))
    with pytest.raises(Gap):
        ledger.accept(_tokens(2, 7))


def test_a_different_repetition_is_noticed() -> None:
    """Guards against two workers that disagree on a token the client already has."""
    ledger = Ledger((1,))
    ledger.accept(_tokens(0, 5))
    with pytest.raises(Gap):
        ledger.accept(_tokens(0, 6, 7))


def test_other_attempts_and_late_messages_are_ignored() -> None:
    """Guards fencing: a frozen worker of an old attempt wakes up and talks; nothing follows a finish."""
    ledger = Ledger((1,))
    ledger.accept(_tokens(0, 5))
    assert ledger.next_attempt() == 1
    assert ledger.accept(_tokens(1, 9, attempt=0)) == ((), ())
    assert ledger.accept(_tokens(1, 6, attempt=1, finish="stop")) == ((6,), ())
    assert ledger.accept(_tokens(2, 7, attempt=1)) == ((), ())
    assert ledger.accepted == [5, 6] and ledger.finish == "stop"


def test_logprobs_stay_with_their_tokens() -> None:
    """Guards alignment: the logprob of a repeated token is not given to the next one."""
    ledger = Ledger((1,))
    ledger.accept(_tokens(0, 5))
    logprobs = (Logprob(-0.5), Logprob(-1.5))
    message = Tokens(request_id="r", attempt=0, index=0, ids=(5, 6), logprobs=logprobs)
    assert ledger.accept(message) == ((6,), (Logprob(-1.5),))
