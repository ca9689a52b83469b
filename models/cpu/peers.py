"""What a rank of a group asks of the others while it computes a step: sums, and the parts of all side by side.

All ranks of a group make the same calls, with tensors of the same number of rows, in the same order. How the parts get
from one to another is not known here: worker.ranks does it between processes, testing.rank_threads between threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from baton.models.adapters.flat import Directory
from baton.models.batch import Row
from baton.models.partition import WHOLE, Rank


class MappableMemory(Protocol):
    """Memory of rank 0's process that the other ranks can map; it lives as long as this or a mapping."""

    @property
    def tensor(self) -> torch.Tensor:
        """uint8."""
        ...


@dataclass(frozen=True, slots=True)
class FilledSlot:
    """Rank 0 has filled a slot with the adapter that lies here; what other ranks learn instead of a step's rows."""

    slot: int
    tensor: torch.Tensor
    directory: Directory


class RankPeers(Protocol):
    """A rank's end of its group. PeerLost out of a call: another rank ended, or did not answer in time."""

    @property
    def rank(self) -> Rank: ...

    def begin(self, rows: Sequence[Row]) -> None:
        """Rank 0 begins a step with these rows, which the others join."""
        ...

    def allocate(self, size_bytes: int) -> MappableMemory:
        """Of rank 0; called by any thread."""
        ...

    def fill(self, slot: int, memory: MappableMemory, directory: Directory) -> None:
        """Rank 0 fills a slot between two steps, and the others do the same."""
        ...

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """Of the parts [N, width] of all ranks; every rank gets the same bits. `part` may be overwritten."""
        ...

    def gather(self, part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """The float32 parts [N, widths[rank]] of all ranks side by side, in the order of ranks."""
        ...


@dataclass(frozen=True, slots=True)
class OwnMemory:
    """MappableMemory that no other process needs."""

    tensor: torch.Tensor

    @classmethod
    def of(cls, size_bytes: int) -> OwnMemory:
        return cls(torch.empty(size_bytes, dtype=torch.uint8))


class NoPeers:
    """Of the only rank of a model."""

    rank = WHOLE

    def begin(self, rows: Sequence[Row]) -> None: ...

    def allocate(self, size_bytes: int) -> MappableMemory:
        return OwnMemory.of(size_bytes)

    def fill(self, slot: int, memory: MappableMemory, directory: Directory) -> None: ...

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        return part

    def gather(self, part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        return part


NO_PEERS: RankPeers = NoPeers()


def sum_in_order(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """From rank 0's part on, added in float32 and rounded once, so that the result is the same wherever it is made."""
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(parts[0].dtype)
