"""A worker's use of the host's store: prompts' prefixes are loaded from it, and finished blocks are written behind.

It belongs to the worker's loop and is called by it alone; the store's thread answers with events. The life of a leg:

    waits ──► asked  ── StoreFound, or patience over ──► settled ── begin ──► loading ── StoreLoaded ──► (gone)
                                                           └── begin: the gate says compute ──► (gone)

While a load or a put is in progress its blocks are leased in the block manager, whatever becomes of the leg, because
the store's thread touches them. A step never waits for any of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.manager import BlockManager
from baton.kvtransfer.store.client import Store
from baton.kvtransfer.store.events import StoreEvent, StoreFound, StoreLoaded, StoreWritten
from baton.kvtransfer.store.gate import Decision, LoadGate
from baton.node.counters import PrefixCounters, StoreClientCounters
from baton.node.leg import LegKey
from baton.node.messages.store import DISK, PEER, RAM, TIER_NAMES
from baton.worker.sequence import Sequence

MAX_WRITING_PART = 8
"""Writing behind holds at most this part of the pool, 1/8; further blocks wait until others were written."""
MAX_PUT_BLOCKS = 1024


@dataclass(slots=True)
class _Lookup:
    first: int
    """The block that the lookup began with."""
    until: float
    tiers: tuple[int, ...] | None = None
    """Of the blocks found; None: no answer yet."""
    decision: Decision | None = None
    """Loading since it was made."""
    num_blocks: int = 0
    stop_at: float = 0.0
    alone: bool = False
    """No other load was in progress when it began."""


@dataclass(frozen=True, slots=True)
class LoadedPrefix:
    """So many blocks of the leg, behind those that it had, are in the pool now."""

    leg: LegKey
    num_blocks: int
    tiers: tuple[int, ...]
    """Of each block, as an index of TIER_NAMES."""
    load_s: float

    def tokens(self, block_tokens: int) -> tuple[int, ...]:
        """Loaded tokens from each tier."""
        return tuple(block_tokens * self.tiers.count(tier) for tier in range(len(TIER_NAMES)))


class PrefixLoader:
    """Loads prefixes from the store, writes blocks to it. `now` is the loop's clock; `always` opens the gate."""

    def __init__(self, store: Store, manager: BlockManager, layout: KVLayout, *, always: bool) -> None:
        self.gate = LoadGate(layout.block_bytes, layout.block_tokens, always=always)
        self._block_tokens = layout.block_tokens
        self._store = store
        self._manager = manager
        self._lookups: dict[LegKey, _Lookup] = {}
        self._writing: dict[bytes, int] = {}  # blocks of each put
        self._max_writing = max(1, manager.num_blocks // MAX_WRITING_PART)
        self._puts = 0
        self._counters = PrefixCounters()

    # -- reading

    def waits(self, sequence: Sequence, now: float) -> bool:
        """Ask for what the pool has not, once; whether the answer, or the end of an earlier load, may come in time."""
        if not sequence.store_asked:
            sequence.store_asked = True
            self._ask(sequence, now)
        lookup = self._lookups.get(sequence.leg)
        if lookup is None or (lookup.tiers is not None and lookup.decision is None):
            return False
        if lookup.decision is not None or now < lookup.until:
            return True
        self._counters.store_lookups_late += 1
        self.drop(sequence.leg)
        return False

    def begin(self, sequence: Sequence, now: float) -> None:
        """The table has its blocks, and KV up to `num_computed`: load behind that, if it pays."""
        leg, table, have = sequence.leg, sequence.table, sequence.num_computed // self._block_tokens
        sequence.stored_blocks = have
        lookup = self._lookups.get(leg)
        if lookup is None:
            return
        skip = have - lookup.first
        tiers = (lookup.tiers or ())[max(skip, 0) :]
        queued = sum(each.num_blocks for each in self._lookups.values())
        decision = self.gate.decide(tiers, queued, now)
        if skip < 0 or not decision.num_blocks:
            self._counters.store_gate_refused += bool(tiers)
            self.drop(leg)
            return
        blocks = table.blocks[have : have + decision.num_blocks]
        self._manager.lease(blocks, _load_key(leg))
        lookup.decision, lookup.num_blocks, lookup.stop_at = decision, len(blocks), now + decision.stop_after_s
        lookup.alone = not queued
        self._counters.store_loads += 1
        self._store.load(leg, skip, blocks)

    def take_in(self, sequence: Sequence, loaded: LoadedPrefix) -> int:
        """A cache had so many tokens more, which are returned."""
        num_tokens = loaded.num_blocks * self._block_tokens
        sequence.restart(sequence.num_computed + num_tokens)
        sequence.stored_blocks += loaded.num_blocks
        sequence.table.publish(sequence.token_ids, sequence.num_computed)
        return num_tokens

    def loading(self, leg: LegKey) -> bool:
        lookup = self._lookups.get(leg)
        return lookup is not None and lookup.decision is not None

    def drop(self, leg: LegKey) -> None:
        """The leg is over, or goes on without: end its lookup. A load goes on until StoreLoaded says that it ended."""
        lookup = self._lookups.get(leg)
        if lookup is None:
            return
        if lookup.decision is None:
            del self._lookups[leg]
        self._store.stop(leg)

    def tick(self, now: float) -> None:
        """Stop loads that take longer than computing would have."""
        for leg, lookup in self._lookups.items():
            if lookup.decision is not None and now >= lookup.stop_at:
                lookup.stop_at = float("inf")
                self._counters.store_loads_stopped += 1
                self._store.stop(leg)

    def wake_in_s(self, now: float, longest_s: float) -> float:
        """How long the loop may wait for its inbox."""
        due = [each.stop_at if each.decision is not None else each.until for each in self._lookups.values()]
        return min([longest_s, *(max(0.0, at - now) for at in due if at > now)])

    # -- writing

    def write_behind(self, sequence: Sequence) -> None:
        """Offer the store the blocks that were completed and are not offered yet, the first ones first."""
        first, last = sequence.stored_blocks, sequence.num_computed // self._block_tokens
        if last <= first:
            return
        if not self._store.attached:
            sequence.stored_blocks = last
        last = min(last, first + self._max_writing - sum(self._writing.values()), first + MAX_PUT_BLOCKS)
        if last <= sequence.stored_blocks:
            return
        hashes, blocks = sequence.table.names()[first:last], sequence.table.blocks[first:last]
        sequence.stored_blocks = last
        self._puts += 1
        key = b"put %d" % self._puts
        self._manager.lease(blocks, key)
        self._writing[key] = len(blocks)
        self._store.put(key, hashes, blocks)

    def used(self, sequence: Sequence) -> None:
        """The sequence has ended: its blocks are the most recently used, their head last. What is not offered yet
        never will be."""
        if self._store.attached and (hashes := sequence.table.names()):
            self._store.touch(hashes)
            self._counters.store_dropped_blocks += sequence.num_computed // self._block_tokens - sequence.stored_blocks

    # -- events

    def on_event(self, event: StoreEvent, now: float) -> LoadedPrefix | None:
        """Take in an event of the store's thread; returns a LoadedPrefix if a load has ended."""
        match event:
            case StoreFound():
                lookup = self._lookups.get(event.key)
                if lookup is not None:
                    lookup.tiers = event.tiers
                    if not event.tiers:
                        del self._lookups[event.key]
            case StoreLoaded():
                return self._on_loaded(event, now)
            case StoreWritten():
                self._manager.end_lease(event.key)
                self._counters.store_written_blocks += event.num_blocks
                del self._writing[event.key]
        return None

    def _on_loaded(self, event: StoreLoaded, now: float) -> LoadedPrefix:
        lookup = self._lookups.pop(event.key)
        self._manager.end_lease(_load_key(event.key))
        self.gate.loaded(event.tiers, event.load_s, event.copy_s, now, alone=lookup.alone)
        self._counters.prompt_tokens_ram += event.tiers.count(RAM) * self._block_tokens
        self._counters.prompt_tokens_disk += event.tiers.count(DISK) * self._block_tokens
        self._counters.prompt_tokens_peer += event.tiers.count(PEER) * self._block_tokens
        if lookup.decision is not None and event.num_blocks == lookup.num_blocks:
            self._counters.store_predicted_seconds += lookup.decision.load_s
            self._counters.store_actual_seconds += event.load_s
        return LoadedPrefix(event.key, event.num_blocks, event.tiers, event.load_s)

    # -- inside

    def _ask(self, sequence: Sequence, now: float) -> None:
        hashes = sequence.table.names(sequence.num_cacheable)
        first = self._manager.peek(hashes)
        if first == len(hashes) or sequence.leg in self._lookups or not self._store.attached:
            return
        patience_s = self.gate.patience_s((len(hashes) - first) * self._block_tokens, now)
        self._lookups[sequence.leg] = _Lookup(first, now + patience_s)
        self._store.lookup(sequence.leg, hashes, first)

    # -- state

    @property
    def idle(self) -> bool:
        """Whether the store's thread touches no block of the pool."""
        return not self._writing and not any(each.decision for each in self._lookups.values())

    @property
    def counters(self) -> tuple[PrefixCounters, StoreClientCounters] | tuple[()]:
        """None without a store."""
        client = self._store.counters
        if client is None:
            return ()
        self._counters.store_attached = int(self._store.attached)
        return self._counters, client


def _load_key(leg: LegKey) -> bytes:
    return f"load {leg.request_id}/{leg.attempt}".encode()
