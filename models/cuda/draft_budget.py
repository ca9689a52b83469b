"""How many tokens the next decode step has places for, drafts included: the number that pays. Pure; no torch, no clock.

    value(tokens) = (rows + expected accepted drafts) / seconds(tokens)

Seconds are measured, at the start without context and at each step with it. What a draft is worth is learnt from steps
that were read: by how many drafts its row had (more follow a longer match) and its number among them, and by what
became of the sequence's own last drafts. A sequence begins with places for few, and has twice as many when all were
accepted. The host is a step late: it knows of how many drafts there were, not how many there are, and learns how well
the one tells the other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

LEAST_GAIN = 0.02
"""Of value, for which a larger step than the rows need is launched."""
PROBE_EVERY = 32
"""Steps with drafts for which there was no place, until one gets some all the same."""
DECAY, RATIO_DECAY = 0.95, 0.9
PRIOR_WEIGHT = 4.0
CHAIN_STEPS, CHAIN_EVERY = 4, 128
"""Where drafts of a model do not pay they are proposed all the same in so many steps of so many: their worth may have
changed."""
FIRST_WINDOW, FIRST_TRUST, TRUST_DECAY = 2, 0.25, 0.5
"""Places that a sequence begins with, and the part of its steps with drafts that are taken to accept one."""


NONE_CERTAIN: Mapping[int, int] = MappingProxyType({})


class DraftResult(NamedTuple):
    """What became of the drafts of a row."""

    num_drawn: int
    """Tokens."""
    num_verified: int
    num_next: int
    """Proposed for the next step."""
    forced: bool = False
    """A grammar allowed no other tokens: says nothing of other drafts."""


@dataclass(frozen=True, slots=True)
class BudgetChoice:
    """What was decided for a step."""

    tokens: int
    """Places, of which a graph has at least as many."""
    expected: float
    """Drafts accepted, by what was known."""
    slots: tuple[int, ...]
    """Of its rows."""
    proposes: bool = True
    """A model proposes drafts for the next step."""


@dataclass(slots=True)
class SlotDrafting:
    """What is known of the drafts of a slot's sequence."""

    number: int = 0
    """After the last step that was read."""
    window: int = FIRST_WINDOW
    """Of them, those that places are meant for."""
    trust: float = FIRST_TRUST
    """The part of its last steps with drafts that accepted some, the latest counting most."""
    by_model: bool = False
    """A model proposes always as many, each time anew: neither window nor trust say what the next are worth."""

    @classmethod
    def of_model(cls, most: int) -> SlotDrafting:
        return cls(window=most, trust=1.0, by_model=True)

    @property
    def coming(self) -> int:
        """Drafts of the step after the one in flight, as far as places are meant for them. A match that goes on has
        become longer by what that step accepts, and has two drafts more for each."""
        if self.trust < 0.5 or self.by_model:
            return min(self.number, self.window)
        return min(self.number + 2 * (1 + min(self.number, self.window)), 2 * self.window)

    def verified(self, num_verified: int, num_accepted: int, most: int) -> None:
        """most: that a sequence ever has."""
        if self.by_model:
            return
        self.trust = TRUST_DECAY * self.trust + (1 - TRUST_DECAY) * (num_accepted > 0)
        if num_accepted < num_verified:
            self.window = max(1, min(self.window, num_accepted + 1))
        elif num_verified >= min(self.window, self.number):
            self.window = min(2 * self.window, most)


class DraftBudget:
    """`sizes`: tokens of the steps that there are graphs for, smallest first."""

    def __init__(self, sizes: Sequence[int], most_drafts: int, *, by_model: bool = False) -> None:
        """by_model: a model proposes, which takes time of its own."""
        self.sizes, self._by_model = tuple(sizes), by_model
        self._chain_s: dict[int, float] = {}
        self._pays, self._step = True, 0
        self._most = most_drafts
        self._base_s: dict[int, float] = {}
        self._ratios: dict[int, float] = {}  # of seconds measured in a step to those at the start
        self._ratio = 1.0  # the last one
        wide = (most_drafts + 1, most_drafts)
        self._offered = np.full(wide, PRIOR_WEIGHT)
        likely = np.minimum(0.9, 0.2 + 0.1 * np.arange(most_drafts + 1))
        self._accepted = PRIOR_WEIGHT * np.repeat(likely[:, None], most_drafts, axis=1)
        self._slots: dict[int, SlotDrafting] = {}
        self._foreseen = self._came = 1.0  # accepted drafts: expected, and counted
        self._num_unserved = 0

    def measure(self, steps: Iterable[tuple[int, float]], chains: Iterable[tuple[int, float]]) -> None:
        """Tokens of steps without context, and rows that a model proposes for, each with the seconds that it takes."""
        for tokens, seconds in steps:
            self.measured(tokens, seconds)
        for rows, seconds in chains:
            self.measured_chain(rows, seconds)

    def measured(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens without context took so long. What was measured before was of other steps."""
        self._base_s[tokens] = seconds
        self._ratios.clear()
        self._ratio = 1.0

    def measured_chain(self, rows: int, seconds: float) -> None:
        """A model took so long to propose drafts for so many rows."""
        self._chain_s[rows] = seconds

    def begin(self, slot: int) -> None:
        """The slot has another sequence."""
        self._slots.pop(slot, None)

    def choose(self, rows: Iterable[tuple[int, int]], certain: Mapping[int, int] = NONE_CERTAIN) -> BudgetChoice:
        """For rows given as slot, and drafts that it may have; certain: of slots, how many will surely be accepted."""
        choice = self._choose(list(rows), certain)
        self._step += 1
        return choice if self._pays or self._is_probing or not self._by_model else replace(choice, proposes=False)

    @property
    def _is_probing(self) -> bool:
        """Drafts of a model are proposed, and some verified, whatever is known of them."""
        return self._step % CHAIN_EVERY < CHAIN_STEPS

    def _choose(self, given: Sequence[tuple[int, int]], certain: Mapping[int, int]) -> BudgetChoice:
        count, slots = len(given), tuple(slot for slot, _ in given)
        num_certain = sum(min(certain.get(slot, 0), most) for slot, most in given)
        known = [(self._slots[slot], most) for slot, most in given if slot in self._slots and not certain.get(slot)]
        wanted = [(each, min(each.coming, most)) for each, most in known if min(each.number, most)]
        least = self.sizes[bisect_left(self.sizes, count)]
        if not (wanted or num_certain):
            return BudgetChoice(least, 0.0, slots)
        survival = (self._accepted / self._offered).cumprod(axis=1)
        worths = [each.trust * survival[each.number, :places] for each, places in wanted]
        others = np.sort(np.concatenate([np.empty(0), *worths]))[::-1] * min(1.0, self._came / self._foreseen)
        worth = np.concatenate((np.ones(num_certain), others))
        gained = np.concatenate(([0.0], worth.cumsum()))

        def expected(tokens: int) -> float:
            return float(gained[min(tokens - count, len(worth))])

        def value(tokens: int) -> float:
            chain_s = self._chain_of(count) if tokens > least else 0.0
            return (count + expected(tokens)) / (self._seconds(tokens) + chain_s)

        most = bisect_left(self.sizes, min(count + len(worth), self.sizes[-1]))
        larger = [size for size in self.sizes[: most + 1] if size > least]
        best = max((least, *larger), key=value)
        if best != least and value(best) < (1 + LEAST_GAIN) * value(least):
            best = least
        self._pays = best != least
        if best == least and larger:
            self._num_unserved += 1
            if self._num_unserved >= PROBE_EVERY or (self._by_model and self._is_probing):
                best = larger[0]
        if best != least:
            self._num_unserved = 0
        return BudgetChoice(best, expected(best), slots)

    def _chain_of(self, rows: int) -> float:
        return next((seconds for size, seconds in sorted(self._chain_s.items()) if size >= rows), 0.0)

    def _seconds(self, tokens: int) -> float:
        return self._base_s.get(tokens, 1.0) * self._ratios.get(tokens, self._ratio)

    def read(self, choice: BudgetChoice, results: Iterable[DraftResult], busy_s: float | None) -> None:
        """The step has ended, with a result for each row. busy_s: what it took, of a step without parts of prompts."""
        num_accepted = 0
        for slot, (num_drawn, num_verified, num_next, forced) in zip(choice.slots, results, strict=True):
            drafting = self._slots.setdefault(slot, self._new_slot())
            if num_verified:
                num_accepted += num_drawn - 1
            if num_verified and not forced:
                self._learn(drafting.number, num_verified, num_drawn - 1)
                drafting.verified(num_verified, num_drawn - 1, self._most)
            drafting.number = num_next
        if choice.expected:
            self._foreseen = DECAY * self._foreseen + choice.expected
            self._came = DECAY * self._came + num_accepted
        if busy_s and (base_s := self._base_s.get(choice.tokens)):
            chain_s = self._chain_of(len(choice.slots)) if choice.proposes else 0.0
            ratio = max(busy_s - chain_s, base_s / 2) / base_s
            before = self._ratios.get(choice.tokens, ratio)
            self._ratio = self._ratios[choice.tokens] = RATIO_DECAY * before + (1 - RATIO_DECAY) * ratio

    def _new_slot(self) -> SlotDrafting:
        return SlotDrafting.of_model(self._most) if self._by_model else SlotDrafting()

    def _learn(self, number: int, verified: int, accepted: int) -> None:
        """Of a row with `number` drafts."""
        number = max(number, verified)
        tried = min(accepted + 1, verified)  # behind the first that was not accepted, none says anything
        self._offered[number] *= DECAY
        self._accepted[number] *= DECAY
        self._offered[number, :tried] += 1
        self._accepted[number, :accepted] += 1
