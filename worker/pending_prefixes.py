"""Which blocks of the pool sequences are about to complete, so that others with the same prefix wait for them. Pure.

It is made anew for each plan from the sequences that compute, in the order in which they are served. So a sequence
waits only as long as another computes its next block: where that one is cancelled, preempted or fails, the next plan no
longer finds the block, and the sequence computes it itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from baton.kvtransfer.blocks.manager import BlockManager
from baton.worker.sequence import Sequence


class PendingPrefixes:
    """Names of full blocks that are not in the pool of `manager` yet, but will be."""

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager
        self._priorities: dict[bytes, int] = {}  # of the first sequence that computes the block

    def add(self, sequence: Sequence) -> None:
        """The sequence computes all its known tokens from `num_computed` on. Higher priorities come first."""
        block_tokens = sequence.table.block_tokens
        first = sequence.num_computed // block_tokens
        if sequence.num_tokens // block_tokens > first:
            for name in sequence.table.names(sequence.num_tokens)[first:]:
                self._priorities.setdefault(name, sequence.priority)

    def awaited_by(self, sequence: Sequence) -> bool:
        """Whether the first block that the sequence lacks is one of them; no sequence waits for a lower priority."""
        if not self._priorities:
            return False
        names = cacheable_names(sequence)
        first = self._manager.peek(names)
        if first == len(names):
            return False
        priority = self._priorities.get(names[first])
        return priority is not None and priority >= sequence.priority

    def own_work(self, sequence: Sequence) -> int:
        """The tokens of a sequence without blocks that neither the pool has nor another sequence computes."""
        names = cacheable_names(sequence)
        shared = self._manager.peek(names)
        while shared < len(names) and names[shared] in self._priorities:
            shared += 1
        return sequence.num_tokens - shared * sequence.table.block_tokens


def work_left(manager: BlockManager, started: Iterable[Sequence], waiting: Iterable[Sequence]) -> int:
    """Tokens that all of them together will compute: what several have in common counts once."""
    pending, total = PendingPrefixes(manager), 0
    for sequence in started:
        total += sequence.num_tokens - sequence.num_computed
        pending.add(sequence)
    for sequence in waiting:
        total += pending.own_work(sequence)
        pending.add(sequence)
    return total


def cacheable_names(sequence: Sequence) -> tuple[bytes, ...]:
    """The names of the blocks that a cache may give."""
    return sequence.table.names(sequence.num_cacheable)
