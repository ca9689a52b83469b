"""Blocks on their way from disk or a peer into a slot of the arena, and the waiters for each. Decides nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.kvtransfer.store.arena_index import ArenaIndex, Entry, Holder, Key
from baton.kvtransfer.store.lower import LowerTier
from baton.kvtransfer.store.peers import Peers
from baton.node.messages.store import PeerGet

MAX_LOADS = 256
"""On their way at once; a worker asks for fewer, and asks again as they come."""
MAX_WAITERS = 4096
"""For one block; to others it cannot be had. A prompt that many requests begin with may have about as many."""
LOADER = "/"
"""The owner's name of slots that are being loaded into: no endpoint has it."""


@dataclass(frozen=True, slots=True)
class WorkerWaits:
    """A worker's lookup, and the number of the block in it."""

    holder: Holder
    index: int


@dataclass(frozen=True, slots=True)
class PeerWaits:
    """Another store, and what it has asked for."""

    peer: str
    get: PeerGet


Waiter = WorkerWaits | PeerWaits


@dataclass(slots=True)
class _Load:
    entry: Entry
    holder: Holder
    tier: str
    waiters: dict[Waiter, None] = field(default_factory=dict)
    """In their order; each once, however often it asks."""


class Loads:
    """`span` gives the bytes of the arena."""

    def __init__(
        self, index: ArenaIndex, span: Callable[[int, int], memoryview], lower: LowerTier, peers: Peers
    ) -> None:
        self.outcomes: Counter[str] = Counter(disk_ok=0, disk_failed=0, peer_ok=0, peer_failed=0)
        self._index = index
        self._span = span
        self._lower = lower
        self._peers = peers
        self._loads: dict[Key, _Load] = {}
        self._numbers = 0

    def want(self, key: Key, waiter: Waiter, peer: str | None, now: float) -> bool:
        """Bring a block into the arena, from disk or else from that peer; False if it cannot be had.

        True: `end` will name the waiter, once.
        """
        load = self._loads.get(key)
        if load is None:
            load = self._begin(key, peer, now)
        if load is None or (waiter not in load.waiters and len(load.waiters) >= MAX_WAITERS):
            return False
        load.waiters[waiter] = None
        return True

    def end(self, key: Key, digest: bytes) -> list[Waiter]:
        """The block is in its slot, and can be found from now on; without a digest: never. Returns its waiters."""
        load = self._loads.pop(key)
        if digest:
            self._index.commit(key, load.holder, digest)
        self._index.release(load.holder)
        self.outcomes[f"{load.tier}_{'ok' if digest else 'failed'}"] += 1
        return list(load.waiters)

    def span_of(self, key: Key) -> memoryview:
        """The slot that this block is being loaded into."""
        entry = self._loads[key].entry
        return self._span(entry.offset, entry.size_bytes)

    def _begin(self, key: Key, peer: str | None, now: float) -> _Load | None:
        on_disk = self._lower.has(key)
        if len(self._loads) >= MAX_LOADS or not (on_disk or peer):
            return None
        self._numbers += 1
        holder = Holder(LOADER, self._numbers)
        entry = self._index.reserve(key, holder)
        if entry is None:
            return None
        self._loads[key] = load = _Load(entry, holder, "disk" if on_disk else "peer")
        target = self._span(entry.offset, entry.size_bytes)
        if on_disk:
            self._lower.read(key, target)
        elif peer:
            self._peers.pull(key, peer, target, now)
        return load
