"""Which sequences of a decode worker run, each in a slot of the runner, and which wait; most senior first."""

from __future__ import annotations

from collections.abc import Mapping

from baton.node.leg import LegKey
from baton.worker.sequence import Sequence


class Queues:
    """`sequences`: all of the worker, in the order of their arrival."""

    def __init__(self, sequences: Mapping[LegKey, Sequence], num_slots: int) -> None:
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self._sequences = sequences
        self.free_slots = list(range(num_slots))  # those of the runner that no running sequence has

    @property
    def num_promised(self) -> int:
        """Rows that running sequences have, and those that prompts for others will have."""
        return len(self.running) + sum(each.hands_over for each in self.waiting)

    @property
    def num_handing_over(self) -> int:
        """Prompts for others."""
        return sum(each.hands_over for each in (*self.running, *self.waiting))

    def wait(self, sequence: Sequence) -> None:
        """Let a sequence without a slot wait."""
        self._insert(self.waiting, sequence)

    def run(self, sequence: Sequence) -> None:
        """Give a sequence that does not wait a slot. Raises IndexError where none is free."""
        sequence.slot = self.free_slots.pop()
        self._insert(self.running, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take it out of its row or from among the waiting; it keeps its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.free_slots.append(sequence.slot)
        else:
            self.waiting.remove(sequence)

    def _insert(self, group: list[Sequence], sequence: Sequence) -> None:
        """Keep the order of seniority: prompts for others, then priority, then the order of arrival."""
        seniority = {leg: index for index, leg in enumerate(self._sequences)}
        seniority.setdefault(sequence.leg, len(seniority))
        group.append(sequence)
        group.sort(key=lambda s: (not s.hands_over, -s.priority, seniority[s.leg]))
