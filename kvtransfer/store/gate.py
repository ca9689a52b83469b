"""Whether, and how far, loading a prefix is faster than computing it. Pure: rates in, a decision out; no clock.

    load(n)     = turn + wait for loads before it + bytes of all n / RAM rate + bytes of each slower tier / its rate
    compute(n)  = tokens of the n blocks / the speed of computing
    chosen      = the n with the least load(n) + compute(all - n)

The turn is what any load takes besides copying: from thread to thread, and until the end of a copy is seen.

Rates are measured: bytes and seconds of what was done, halved every HALF_LIFE_S, beside an assumption that weighs as
much as ASSUMED_S seconds. The assumptions are as fast as good hardware: a tier that was never used is tried, so that it
is measured, and after a bad minute it is tried again. What a wrong guess costs is bounded by `Decision.stop_after_s`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.node.messages.store import DISK, PEER, RAM

HALF_LIFE_S = 30.0
ASSUMED_S = 0.0002
ASSUMED_BYTES_PER_S = {RAM: 50e9, DISK: 10e9, PEER: 10e9}
ASSUMED_TOKENS_PER_S = 1000.0
ASSUMED_TURN_S = 0.0005
SLACK_S = 0.05
"""A load may take so much longer than computing would, before it is stopped: the threads of a busy machine take their
time, and what has begun is mostly done. So a load that goes wrong costs a prompt at most so much, on a GPU too."""


class Rate:
    """Something done per second, as measured, beside an assumption."""

    def __init__(self, assumed: float) -> None:
        self._assumed = assumed
        self._done = 0.0
        self._spent_s = 0.0
        self._at = 0.0

    def add(self, done: float, spent_s: float, now: float) -> None:
        """So much was done in so many seconds."""
        fading = self._fading(now)
        self._done = self._done * fading + done
        self._spent_s = self._spent_s * fading + spent_s
        self._at = now

    def at(self, now: float) -> float:
        """Done per second."""
        fading = self._fading(now)
        return (self._done * fading + self._assumed * ASSUMED_S) / (self._spent_s * fading + ASSUMED_S)

    def _fading(self, now: float) -> float:
        return float(0.5 ** (max(0.0, now - self._at) / HALF_LIFE_S))


@dataclass(frozen=True, slots=True)
class Decision:
    """Load so many blocks, which is expected to take so long; computing them would take the other time."""

    num_blocks: int
    load_s: float
    compute_s: float

    @property
    def stop_after_s(self) -> float:
        """When computing is the better bet after all."""
        return self.compute_s + SLACK_S


class LoadGate:
    """The measured speeds of one worker. `always`: load whatever is found, and wait for it."""

    def __init__(self, block_bytes: int, block_tokens: int, *, always: bool) -> None:
        self._block_bytes = block_bytes
        self._block_tokens = block_tokens
        self._always = always
        self._tiers = {tier: Rate(assumed) for tier, assumed in ASSUMED_BYTES_PER_S.items()}
        self._turns = Rate(1 / ASSUMED_TURN_S)
        self._computing = Rate(ASSUMED_TOKENS_PER_S)

    def computed(self, num_tokens: int, spent_s: float, now: float) -> None:
        """A step took so long for so many prompt tokens."""
        self._computing.add(num_tokens, spent_s, now)

    def loaded(self, tiers: Sequence[int], load_s: float, copy_s: float, now: float, *, alone: bool) -> None:
        """A load ended; copying is RAM's time, and what is left is that of the slower tiers.

        If there are none, and it had not to wait for others (`alone`), it is the turn.
        """
        if not tiers:
            return
        rest_s = max(load_s - copy_s, 0.0)
        self._tiers[RAM].add(len(tiers) * self._block_bytes, copy_s, now)
        for tier in (DISK, PEER):
            if count := tiers.count(tier):
                self._tiers[tier].add(count * self._block_bytes, rest_s, now)
        if alone and tiers.count(RAM) == len(tiers):
            self._turns.add(1, rest_s, now)

    def patience_s(self, num_tokens: int, now: float) -> float:
        """How long an answer may take before computing `num_tokens` would have been the better bet."""
        return 5.0 if self._always else SLACK_S + num_tokens / self._computing.at(now)

    def decide(self, tiers: Sequence[int], queued_blocks: int, now: float) -> Decision:
        """`tiers` of the blocks found, in order; `queued_blocks` are being loaded before them."""
        block_compute_s = self._block_tokens / self._computing.at(now)
        costs = {tier: self._block_bytes / rate.at(now) for tier, rate in self._tiers.items()}
        load_s = queued_blocks * costs[RAM] + 1 / self._turns.at(now)
        best = Decision(0, 0.0, 0.0)
        gain_s = 0.0
        for count, tier in enumerate(tiers, 1):
            load_s += costs[RAM] + (costs[tier] if tier != RAM else 0.0)
            compute_s = count * block_compute_s
            if compute_s - load_s > gain_s or (self._always and count == len(tiers)):
                gain_s = compute_s - load_s
                best = Decision(count, load_s, max(compute_s, 5.0) if self._always else compute_s)
        return best
