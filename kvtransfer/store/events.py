"""Events of a worker's store client for the worker's loop."""

from __future__ import annotations

from dataclasses import dataclass

from baton.node.leg import LegKey


@dataclass(frozen=True, slots=True)
class StoreFound:
    """The blocks that the store can give, from the first that was asked for on, by the tier of each."""

    key: LegKey
    tiers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoreLoaded:
    """So many blocks of the load, from its first on, are in the pool, verified; none is written any more."""

    key: LegKey
    num_blocks: int
    tiers: tuple[int, ...]
    """Of those blocks."""
    load_s: float
    """Since the load began."""
    copy_s: float
    """Of that, spent copying."""


@dataclass(frozen=True, slots=True)
class StoreWritten:
    """The blocks of this put are not read any more; so many are in the store now that were not."""

    key: bytes
    num_blocks: int


@dataclass(frozen=True, slots=True)
class StoreClientDied:
    """A bug: the worker cannot go on."""

    error: BaseException


StoreEvent = StoreFound | StoreLoaded | StoreWritten | StoreClientDied
