"""worker.prefix_loading with a scripted store: lookups, the gate, loads, write-behind."""

from __future__ import annotations

from collections.abc import Sequence as Blocks

import pytest

from baton.kvtransfer.blocks.manager import BlockManager
from baton.kvtransfer.store.events import StoreFound, StoreLoaded, StoreWritten
from baton.node.counters import StoreClientCounters
from baton.node.leg import LegKey
from baton.node.messages.store import DISK, RAM
from baton.tests.unit.worker.bench import BLOCK, LAYOUT, sequence_of
from baton.worker.prefix_loading import MAX_WRITING_PART, LoadedPrefix, PrefixLoader
from baton.worker.sequence import Sequence

LEG = LegKey("a", 0)


class AskedStore:
    """A store that records its calls."""

    def __init__(self) -> None:
        self.attached = True
        self.counters = StoreClientCounters()
        self.lookups: list[tuple[LegKey, int, int]] = []
        self.loads: list[tuple[LegKey, int, list[int]]] = []
        self.puts: dict[bytes, list[int]] = {}
        self.stopped: list[LegKey] = []
        self.touched = 0

    def lookup(self, key: LegKey, hashes: Blocks[bytes], first: int) -> None:
        self.lookups.append((key, len(hashes), first))

    def load(self, key: LegKey, skip: int, blocks: Blocks[int]) -> None:
        self.loads.append((key, skip, list(blocks)))

    def stop(self, key: LegKey) -> None:
        self.stopped.append(key)

    def put(self, key: bytes, hashes: Blocks[bytes], blocks: Blocks[int]) -> None:
        assert len(hashes) == len(blocks)
        self.puts[key] = list(blocks)

    def touch(self, hashes: Blocks[bytes]) -> None:
        self.touched += len(hashes)

    def close(self) -> None: ...


class Bench:
    """A loader with an open gate, and a sequence of 14 tokens with three full blocks."""

    def __init__(self, num_blocks: int = 32, always: bool = True) -> None:
        self.store, self.manager = AskedStore(), BlockManager(num_blocks)
        self.loader = PrefixLoader(self.store, self.manager, LAYOUT, always=always)
        self.sequence = sequence_of(self.manager, "a", 14)

    def start(self, now: float = 1.0) -> None:
        """Allocate the sequence's blocks and begin its load."""
        self.sequence.table.grow(self.sequence.num_tokens)
        self.loader.begin(self.sequence, now)

    def find(self, *tiers: int) -> None:
        assert self.loader.waits(self.sequence, 0.0)
        assert self.loader.on_event(StoreFound(LEG, tiers), 0.5) is None

    def compute(self, num_tokens: int, sequence: Sequence | None = None) -> None:
        sequence = sequence or self.sequence
        sequence.num_computed = num_tokens
        sequence.table.publish(sequence.token_ids, num_tokens)
        self.loader.write_behind(sequence)


@pytest.fixture
def bench() -> Bench:
    return Bench()


# ---- lookup


def test_blocks_missing_from_the_pool_are_looked_up_once(bench: Bench) -> None:
    """Guards against a lookup each turn, and against one for blocks in the pool."""
    other = sequence_of(bench.manager, "b", 6)
    other.table.grow(6)
    other.table.publish(other.token_ids, 4)
    assert bench.loader.waits(bench.sequence, 0.0) and bench.loader.waits(bench.sequence, 0.1)
    assert bench.store.lookups == [(LEG, 3, 1)]


def test_the_last_token_is_always_computed() -> None:
    """Guards sampling: a prompt whose blocks are all in the store still computes its last token."""
    bench = Bench()
    bench.sequence = sequence_of(bench.manager, "a", 12)
    bench.loader.waits(bench.sequence, 0.0)
    assert bench.store.lookups == [(LEG, 2, 0)]


def test_without_a_store_nothing_waits(bench: Bench) -> None:
    """Guards serving without the store."""
    bench.store.attached = False
    assert not bench.loader.waits(bench.sequence, 0.0) and not bench.store.lookups
    bench.start()
    assert bench.loader.idle and not bench.loader.loading(LEG)


def test_a_miss_ends_the_wait(bench: Bench) -> None:
    """Guards prompts that miss against waiting for the lookup's full timeout."""
    bench.find()
    assert not bench.loader.waits(bench.sequence, 0.6)


def test_a_lookup_times_out(bench: Bench) -> None:
    """Guards prompts against a store that does not answer, or answers late."""
    assert bench.loader.waits(bench.sequence, 0.0)
    assert 0.0 < bench.loader.wake_in_s(0.0, 100.0) < 100.0
    assert not bench.loader.waits(bench.sequence, 1000.0)
    assert bench.store.stopped == [LEG]
    assert bench.loader.on_event(StoreFound(LEG, (RAM,)), 1001.0) is None
    bench.start(1002.0)
    assert not bench.store.loads


# ---- loading


def test_found_blocks_are_loaded_behind_the_cached_prefix(bench: Bench) -> None:
    """Guards the order of blocks: the load fills and leases those behind the sequence's cached prefix."""
    bench.find(RAM, RAM, DISK)
    bench.start()
    assert bench.store.loads == [(LEG, 0, bench.sequence.table.blocks[:3])]
    assert bench.loader.loading(LEG) and not bench.loader.idle
    loaded = bench.loader.on_event(StoreLoaded(LEG, 3, (RAM, RAM, DISK), 0.25, 0.1), 2.0)
    assert loaded == LoadedPrefix(LEG, 3, (RAM, RAM, DISK), 0.25) and loaded.tokens(BLOCK) == (8, 4, 0)
    assert bench.loader.take_in(bench.sequence, loaded) == 12
    assert (bench.sequence.num_computed, bench.sequence.num_launched, bench.sequence.stored_blocks) == (12, 12, 3)
    assert bench.loader.idle and not bench.loader.loading(LEG)


def test_blocks_that_entered_the_pool_meanwhile_are_not_loaded(bench: Bench) -> None:
    """Guards against overwriting blocks that another sequence now shares."""
    bench.find(RAM, RAM, RAM)
    other = sequence_of(bench.manager, "b", 6)
    other.table.grow(6)
    other.table.publish(other.token_ids, 4)
    bench.sequence.restart(bench.sequence.table.take_prefix(13))
    bench.start()
    assert bench.store.loads == [(LEG, 1, bench.sequence.table.blocks[1:3])]


def test_a_closed_gate_computes() -> None:
    """Guards prompts against loads that are slower than computing."""
    bench = Bench(always=False)
    bench.loader.gate.loaded((RAM,), 1e9, 1e9, 0.0, alone=True)
    bench.loader.gate.computed(1000, 0.001, 0.0)
    bench.find(RAM, RAM, RAM)
    bench.start()
    assert not bench.store.loads and not bench.loader.loading(LEG)
    prefix, _ = bench.loader.counters
    assert prefix.store_gate_refused == 1


def test_blocks_of_an_ended_leg_stay_leased_until_the_load_ends(bench: Bench) -> None:
    """Guards against reusing blocks that the store's thread still writes."""
    bench.find(RAM)
    bench.start()
    bench.loader.drop(LEG)
    bench.sequence.table.release()
    assert bench.store.stopped == [LEG] and not bench.loader.idle
    assert bench.manager.usage().leased == 1
    bench.loader.on_event(StoreLoaded(LEG, 0, (), 0.1, 0.0), 2.0)
    assert bench.loader.idle and bench.manager.num_available == 32


def test_a_slow_load_is_stopped_once(bench: Bench) -> None:
    """Guards the deadline of a load, and the store's thread against a stop each turn."""
    bench.find(RAM)
    bench.start(now=1.0)
    due_s = bench.loader.wake_in_s(1.0, 1e6)
    bench.loader.tick(1.0 + due_s / 2)
    assert not bench.store.stopped
    for _ in range(3):
        bench.loader.tick(1.0 + due_s)
    assert bench.store.stopped == [LEG] and bench.loader.wake_in_s(1.0 + due_s, 5.0) == 5.0


def test_the_counters_of_loads(bench: Bench) -> None:
    """Guards the tokens of each tier; predictions are compared only for loads that completed."""
    bench.find(RAM, DISK)
    bench.start()
    bench.loader.on_event(StoreLoaded(LEG, 2, (RAM, DISK), 0.5, 0.1), 2.0)
    prefix, client = bench.loader.counters
    assert (prefix.prompt_tokens_ram, prefix.prompt_tokens_disk, prefix.prompt_tokens_peer) == (4, 4, 0)
    assert (prefix.store_loads, prefix.store_actual_seconds, prefix.store_attached) == (1, 0.5, 1)
    assert client is bench.store.counters


# ---- writing


def test_completed_blocks_are_offered_once_and_in_order(bench: Bench) -> None:
    """Guards against putting a block twice, or before it is full."""
    bench.start()
    for num_tokens in (3, 4, 7, 12):
        bench.compute(num_tokens)
    blocks = bench.sequence.table.blocks
    assert list(bench.store.puts.values()) == [blocks[:1], blocks[1:3]]
    bench.sequence.table.release()
    assert bench.manager.usage().leased == 3 and not bench.loader.idle
    for key in bench.store.puts:
        bench.loader.on_event(StoreWritten(key, 1), 3.0)
    assert bench.loader.idle and bench.manager.num_available == 32
    prefix, _ = bench.loader.counters
    assert prefix.store_written_blocks == 2


def test_write_behind_holds_a_part_of_the_pool_and_catches_up() -> None:
    """Guards prompts against a slow store; waiting blocks are offered when there is room."""
    bench = Bench(num_blocks=2 * MAX_WRITING_PART)
    bench.sequence = sequence_of(bench.manager, "a", 14)
    bench.start()
    bench.compute(12)
    (key,) = bench.store.puts
    assert len(bench.store.puts[key]) == 2
    bench.compute(13)
    assert len(bench.store.puts) == 1
    bench.loader.on_event(StoreWritten(key, 2), 3.0)
    bench.compute(14)
    assert [len(blocks) for blocks in bench.store.puts.values()] == [2, 1]


def test_a_store_that_attaches_later_gets_only_new_blocks(bench: Bench) -> None:
    """Guards against a burst of old blocks when a store appears."""
    bench.store.attached = False
    bench.start()
    bench.compute(8)
    bench.store.attached = True
    bench.compute(12)
    assert list(bench.store.puts.values()) == [bench.sequence.table.blocks[2:3]]


def test_used_blocks_are_touched_and_unwritten_ones_count_as_dropped() -> None:
    """Guards the store's eviction order, and the count of blocks that were never written."""
    bench = Bench(num_blocks=8)
    bench.start()
    bench.compute(12)
    bench.loader.used(bench.sequence)
    prefix, _ = bench.loader.counters
    assert bench.store.touched == 3 and prefix.store_dropped_blocks == 2
