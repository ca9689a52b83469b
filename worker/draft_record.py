"""Which steps of a sequence verify drafts: those of one whose drafts are not accepted become few. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

COOL_AFTER, COOL_EVERY = 16, 8
"""After so many drafts in a row that were not accepted, only every so many steps verify some."""


@dataclass(slots=True)
class DraftRecord:
    """What became of one sequence's drafts."""

    num_missed: int = 0
    """Drafts since one was accepted."""
    num_skipped: int = 0
    """Steps in a row without drafts, while it is cooled."""

    @property
    def is_cooled(self) -> bool:
        return self.num_missed >= COOL_AFTER

    def allows(self) -> bool:
        """Whether the next step may verify drafts. Once a step."""
        if not self.is_cooled:
            return True
        self.num_skipped = (self.num_skipped + 1) % COOL_EVERY
        return self.num_skipped == 0

    def verified(self, num_drafts: int, num_accepted: int) -> None:
        """A step has verified so many."""
        self.num_missed = 0 if num_accepted else self.num_missed + num_drafts
