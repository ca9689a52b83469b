"""Drafts: tokens that may follow a sequence, which one step computes together and verifies by drawing. Pure; no torch.

A step draws the token behind each draft with that position's own noise. Drafts stay as far as they equal what is drawn,
so the tokens are those of steps without drafts, whatever proposes them.

    tokens    ... a b c | x y z ...            a b c | ?         the longest end that was there before, and
    drafts                                     x y z             what followed it there

(A. Saxena, Prompt Lookup Decoding, 2023.) Places are looked for in what the client predicts as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from baton.models.batch import DraftSource, Draw, Row

LEAST_MATCH, LONGEST_MATCH = 2, 16
"""Tokens of an end that are compared."""
FOLLOWED_MATCH = 4
"""A match of so many tokens is better than to go on where the last drafts came from."""
SEARCHED = 32768
"""Newest tokens among which an end is looked for."""


MOST_ANSWER_TOKENS = 4096
"""Of past answers, in which an end is looked for as well."""


class Drafts(NamedTuple):
    token_ids: tuple[int, ...]
    source: DraftSource = "history"


NO_DRAFTS = Drafts(())


class Drafter(Protocol):
    """What proposes drafts."""

    def propose(self, draw: Draw, most: int) -> Drafts:
        """Up to `most` tokens that may follow draw.history."""
        ...


class NgramDrafter:
    """Proposes what followed the sequence's last tokens before, in itself or in the client's prediction."""

    def propose(self, draw: Draw, most: int) -> Drafts:
        return propose(draw.history, draw.prediction, most, draw.past_answers)


def propose(
    known: Sequence[int],
    prediction: Sequence[int],
    most: int,
    answers: Sequence[int] = (),
    cursor: int | None = None,
) -> Drafts:
    """Drafts behind `known`. The longest match wins; of equals one in the prediction, then in `known`, then the last.

    A match of n tokens gives up to drafts_of(n): a short one says little of what follows. Where a sequence repeats
    itself, its drafts do. cursor: the place behind the last drafts and as many tokens as were drawn since, in answers,
    prediction and known tokens joined: a token that was drawn in place of another does not end what they follow.
    """
    own = np.asarray(known[-SEARCHED:], dtype=np.int64)
    tokens = np.concatenate([np.asarray(each, dtype=np.int64) for each in (answers, prediction, own)])
    num_answers, num_before = len(answers), len(tokens) - len(own)
    end = len(tokens)
    most_compared = min(LONGEST_MATCH, len(own))
    places = np.flatnonzero(tokens[: end - 1] == tokens[end - 1]) + 1 if most_compared else np.empty(0, np.int64)
    lengths = np.ones_like(places)
    for back in range(2, most_compared + 1):
        going = (lengths == back - 1) & (places >= back)
        going[going] = tokens[places[going] - back] == tokens[end - back]
        lengths[going] = back
    most_matched = int(lengths.max()) if len(places) else 0
    if cursor is not None and most_matched < FOLLOWED_MATCH:
        place, count = cursor, most
    elif most_matched < LEAST_MATCH:
        return NO_DRAFTS
    else:
        longest = places[lengths == most_matched]
        predicted = longest[(longest >= num_answers) & (longest < num_before)]
        known_places = longest[longest >= num_before]
        place = int(next(each for each in (predicted, known_places, longest) if len(each))[-1])
        count = min(most, drafts_of(most_matched))
    if place >= num_before:
        return Drafts(tuple(tokens[place + np.arange(count) % (end - place)].tolist()))
    source: DraftSource = "prediction" if place >= num_answers else "answers"
    return Drafts(tuple(tokens[place : min(place + count, num_before)].tolist()), source)


def drafts_of(match_length: int) -> int:
    """Drafts that a match of so many tokens is worth."""
    return 2 * (match_length - 1)


def led_by(forced: Sequence[int], drafts: Drafts, most: int) -> Drafts:
    """The drafts if they begin with all of up to `most` forced tokens, else these: a grammar allows no others there."""
    first = tuple(forced[:most])
    return drafts if drafts.token_ids[: len(first)] == first else Drafts(first, "grammar")


def num_accepted(drafts: Sequence[int], drawn: Sequence[int]) -> int:
    """Drafts that equal what was drawn in their place; drawn[i] is the token at the place of drafts[i]."""
    count = 0
    while count < len(drafts) and drafts[count] == drawn[count]:
        count += 1
    return count


def rows_of_drafts(row: Row, drafts: Sequence[int]) -> list[Row]:
    """The drafts behind a row of one token that draws, each a row that draws what follows it."""
    draw = row.draw
    assert draw is not None and len(row.token_ids) == 1, "drafts follow one token"
    return [
        Row(
            (token,),
            row.start + number,
            row.blocks,
            draw._replace(history=(*draw.history, *drafts[:number]), num_generated=draw.num_generated + number),
            row.slot,
            adapter=row.adapter,
        )
        for number, token in enumerate(drafts, 1)
    ]
