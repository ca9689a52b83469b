"""Verification of drafts on the CPU: each draft is one more row of the step. Knows no tensors.

verified = Verified.of(rows, drafter)      # verified.rows: the given ones, and behind them those of drafts
drawn = verified.accept(drawn)             # one entry a given row again
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.models.batch import Drawn, Row
from baton.models.drafts import NO_DRAFTS, Drafter, Drafts, led_by, num_accepted, rows_of_drafts


@dataclass(frozen=True, slots=True)
class Verified:
    """A step's rows with those of their drafts."""

    rows: list[Row]
    num_given: int
    drafts: dict[int, tuple[int, Drafts]]
    """By number of the row that they follow: number of the first of their own rows, and the drafts."""

    @classmethod
    def of(cls, rows: Sequence[Row], drafter: Drafter) -> Verified:
        """The drafter is asked for each row that may have drafts."""

        def propose(row: Row) -> Drafts:
            return NO_DRAFTS if row.draw is None else drafter.propose(row.draw, row.most_drafts)

        return cls.proposed(rows, propose)

    @classmethod
    def proposed(cls, rows: Sequence[Row], propose: Callable[[Row], Drafts]) -> Verified:
        """propose: called for each row that may have drafts."""
        all_rows, found = list(rows), {}
        for index, row in enumerate(rows):
            if not row.most_drafts or row.draw is None:
                continue
            if (drafts := led_by(row.draw.forced, propose(row), row.most_drafts)).token_ids:
                found[index] = (len(all_rows), drafts)
                all_rows += rows_of_drafts(row, drafts.token_ids)
        return cls(all_rows, len(rows), found)

    @property
    def masked(self) -> list[list[int]]:
        """Of each given row with a masked draw: its number, and those of its drafts."""
        found = []
        for index, row in enumerate(self.rows[: self.num_given]):
            if row.draw is not None and row.draw.is_masked:
                first, drafts = self.drafts.get(index, (0, NO_DRAFTS))
                found.append([index, *range(first, first + len(drafts.token_ids))])
        return found

    def accept(self, drawn: Sequence[Drawn | None]) -> list[Drawn | None]:
        """What the given rows draw, of what all rows drew."""
        result = list(drawn[: self.num_given])
        for index, (first, drafts) in self.drafts.items():
            entries = [entry for entry in (drawn[index], *drawn[first : first + len(drafts.token_ids)]) if entry]
            token_ids = [entry.token_ids[0] for entry in entries]
            kept = entries[: num_accepted(drafts.token_ids, token_ids) + 1]
            result[index] = Drawn(
                tuple(entry.token_ids[0] for entry in kept),
                tuple(logprob for entry in kept for logprob in entry.logprobs),
                len(drafts.token_ids),
                drafts.source,
            )
        return result
