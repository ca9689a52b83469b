"""A step that was launched and not read yet: which sequences it computes, and what must rest until it has ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from baton.decode.sequence import Sequence
from baton.models.batch import Launched


class Part(NamedTuple):
    """`length` tokens of a sequence, in its stay number `stay`."""

    sequence: Sequence
    length: int
    stay: int


@dataclass(frozen=True, slots=True)
class Flight:
    """See the module's docstring."""

    launched: Launched
    parts: list[Part]
    began_at: float
    behind: bool
    """Launched while another was under way."""
    left: list[list[int]] = field(default_factory=list)
    """Blocks, tail first, of sequences that ended or were preempted meanwhile: the step may still write into them."""

    def computes(self, sequence: Sequence) -> bool:
        return any(part.sequence is sequence for part in self.parts)
