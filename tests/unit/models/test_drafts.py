"""models.drafts: proposals against a search of all places, and acceptance against drawing one token after the other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.models.batch import Draw, Drawn, Row
from baton.models.cpu.verify import Verified
from baton.models.drafts import LEAST_MATCH, LONGEST_MATCH, Drafts, drafts_of, led_by, propose
from baton.node.messages.control import SamplingSpec

TOKENS = st.lists(st.integers(0, 2), max_size=40)


def propose_slowly(known: list[int], prediction: list[int], most: int) -> Drafts:
    """Each place is compared token by token."""
    text, begin = [*prediction, *known], len(prediction)

    def match(place: int) -> int:
        longest = min(LONGEST_MATCH, len(known), place)
        return next((n for n in range(longest) if text[place - 1 - n] != text[-1 - n]), longest)

    places = [(match(place), place < begin, place) for place in range(1, len(text))]
    length, predicted, place = max(places, default=(0, False, 0))
    if length < LEAST_MATCH:
        return Drafts(())
    count = min(most, drafts_of(length))
    if predicted:
        return Drafts(tuple(text[place : min(place + count, begin)]), "prediction")
    for _ in range(count):
        text.append(text[place + len(text) - len(known) - begin])
    return Drafts(tuple(text[len(known) + begin :]))


@given(TOKENS, TOKENS, st.integers(0, 15))
def test_proposals_equal_those_of_a_search_of_all_places(known, prediction, most):
    """Guards against a match that is not the longest, not in the prediction or not the last, and against drafts from
    behind what is known."""
    assert propose(known, prediction, most) == propose_slowly(known, prediction, most)


class Given:
    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self._token_ids = token_ids

    def propose(self, draw: Draw, most: int) -> Drafts:
        return Drafts(self._token_ids[:most])


@given(st.integers(0, 10**6), st.lists(st.booleans(), max_size=6), st.integers(0, 6))
def test_accepted_tokens_are_those_of_sequential_drawing(seed, right, most):
    """Guards against the first draft taken unverified, the token behind the drafts lost, and a draft kept behind one
    that was not accepted. A draw is a function of all tokens before it."""

    def draw(history) -> int:
        return hash((seed, *history)) % 5

    known = [1, 2, 3]
    coming = list(known)
    for _ in range(8):
        coming.append(draw(coming))
    drafts = tuple(coming[3 + n] if is_right else (coming[3 + n] + 1) % 5 for n, is_right in enumerate(right))
    row = Row((3,), 2, [0], Draw(SamplingSpec(max_tokens=9), known, 2, 1), most_drafts=most)
    other = Row((9,), 0, [1], None)
    verified = Verified.of([row, other], Given(drafts))
    drawn = [None if each.draw is None else Drawn((draw(each.draw.history),)) for each in verified.rows]
    first, second = verified.accept(drawn)
    accepted = [*right[:most], False].index(False)
    assert first.token_ids == tuple(coming[3 : 3 + accepted + 1])
    assert first.num_drafts == len(drafts[:most]) and second is None
    assert [(each.start, each.draw.num_generated) for each in verified.rows[2:]] == [
        (3 + n, 2 + n) for n in range(first.num_drafts)
    ]


@pytest.mark.parametrize(
    ("forced", "drafts", "led"),
    [((), (5, 6), (5, 6)), ((7, 8), (5, 6), (7, 8)), ((5, 6), (5, 6, 9), (5, 6, 9)), ((5, 6, 1, 2), (5,), (5, 6, 1))],
)
def test_forced_tokens_come_before_other_drafts(forced, drafts, led):
    """Guards against drafts that a grammar does not allow where others are certain, and against the loss of drafts
    that go on behind these."""
    found = led_by(forced, Drafts(drafts), 3)
    assert found == Drafts(led, "history" if led == drafts else "grammar")
