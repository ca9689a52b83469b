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

from baton.models.batch import Draw, Row
from baton.node.messages.control import SamplingSpec

LEAST_MATCH, LONGEST_MATCH = 2, 16
"""Tokens of an end that are compared."""
SEARCHED = 32768
"""Newest tokens among which an end is looked for."""


class Drafts(NamedTuple):
    token_ids: tuple[int, ...]
    predicted: bool = False
    """They come from the client's prediction."""


NO_DRAFTS = Drafts(())


class Drafter(Protocol):
    """What proposes drafts."""

    def propose(self, draw: Draw, most: int) -> Drafts:
        """Up to `most` tokens that may follow draw.history."""
        ...


class NgramDrafter:
    """Proposes what followed the sequence's last tokens before, in itself or in the client's prediction."""

    def propose(self, draw: Draw, most: int) -> Drafts:
        return propose(draw.history, draw.prediction, most)


def propose(known: Sequence[int], prediction: Sequence[int], most: int) -> Drafts:
    """Drafts behind `known`. The longest match wins; of equals one in the prediction, then the last.

    A match of n tokens gives up to drafts_of(n): a short one says little of what follows. Where a sequence repeats
    itself, its drafts do.
    """
    own = np.asarray(known[-SEARCHED:], dtype=np.int64)
    tokens = np.concatenate((np.asarray(prediction, dtype=np.int64), own))
    num_predicted = len(tokens) - len(own)
    end = len(tokens)
    most_compared = min(LONGEST_MATCH, len(own))
    places = np.flatnonzero(tokens[: end - 1] == tokens[end - 1]) + 1 if most_compared else np.empty(0, np.int64)
    lengths = np.ones_like(places)
    for back in range(2, most_compared + 1):
        going = (lengths == back - 1) & (places >= back)
        going[going] = tokens[places[going] - back] == tokens[end - back]
        lengths[going] = back
    if not len(places) or lengths.max() < LEAST_MATCH:
        return NO_DRAFTS
    longest = places[lengths == lengths.max()]
    inside = longest[longest < num_predicted]
    place = int((inside if len(inside) else longest)[-1])
    count = min(most, drafts_of(int(lengths.max())))
    if len(inside):
        return Drafts(tuple(tokens[place : min(place + count, num_predicted)].tolist()), predicted=True)
    return Drafts(tuple(tokens[place + np.arange(count) % (end - place)].tolist()))


def drafts_of(match_length: int) -> int:
    """Drafts that a match of so many tokens is worth."""
    return 2 * (match_length - 1)


def may_draft(sampling: SamplingSpec) -> bool:
    """Whether a draw by these parameters needs nothing of the tokens drawn just before it but their logits."""
    penalised = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
    return not (penalised or sampling.bad_words or sampling.logprobs or sampling.grammar is not None)


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
