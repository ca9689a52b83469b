"""What became of all drafts of a worker, counted at little cost a step, and as counters when these are sent."""

from __future__ import annotations

from collections import Counter

from baton.models.batch import DraftSource
from baton.node.counters import DRAFT_SOURCES, MOST_DRAFTS, DecodeCounters


class DraftCounts:
    def __init__(self) -> None:
        self._num_accepted: Counter[int] = Counter()  # of rows that had drafts
        self._by_source: Counter[str] = Counter()

    def verified(self, num_accepted: int, source: DraftSource) -> None:
        """Of one row."""
        self._num_accepted[num_accepted] += 1
        self._by_source[source] += num_accepted

    def fill(self, counters: DecodeCounters) -> None:
        """Bring the counters by source and by place up to date."""
        for source in DRAFT_SOURCES:
            setattr(counters, f"spec_decode_accepted_{source}", self._by_source[source])
        behind = 0
        for place in reversed(range(MOST_DRAFTS)):
            behind += self._num_accepted[place + 1]
            setattr(counters, f"spec_decode_accepted_at_{place}", behind)
