"""The slots of adapters of all ranks on GPUs as one: each has its part of an adapter, in the slot of the same number.

Rank 0's process prepares the parts of all and fills their slots, whose memory it maps, as it does with pools. So a slot
is filled when all ranks have it, and no step needs to say more than the slot's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.models.adapters.adapter import Adapter
from baton.models.adapters.cut import share_of
from baton.models.adapters.fills import Fill, PreparedAdapter
from baton.models.adapters.slots import AdapterSlots
from baton.models.config import ModelConfig
from baton.models.partition import Rank
from baton.node.errors import InvariantBroken


@dataclass(frozen=True, slots=True)
class RankParts:
    """A PreparedAdapter: of each rank its own."""

    parts: tuple[PreparedAdapter, ...]

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class RankFills:
    """A Fill of all ranks."""

    fills: tuple[Fill, ...]

    @property
    def done(self) -> bool:
        return all(fill.done for fill in self.fills)


class RankSlots:
    """AdapterSlots of a group; `ranks`: of each rank, in order, with as many slots."""

    def __init__(self, config: ModelConfig, ranks: Sequence[AdapterSlots]) -> None:
        self.num_slots = ranks[0].num_slots
        self._config, self._ranks = config, ranks

    def prepare(self, adapter: Adapter) -> RankParts:
        count = len(self._ranks)
        parts = (share_of(adapter, self._config, Rank(index, count)) for index in range(count))
        return RankParts(tuple(slots.prepare(part) for slots, part in zip(self._ranks, parts, strict=True)))

    def fill(self, slot: int, adapter: PreparedAdapter) -> RankFills:
        if not isinstance(adapter, RankParts):
            raise InvariantBroken(f"slot {slot} is to be filled with {type(adapter).__name__}")
        pairs = zip(self._ranks, adapter.parts, strict=True)
        return RankFills(tuple(slots.fill(slot, part) for slots, part in pairs))
