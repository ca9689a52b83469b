"""Guards the policy over storages (kvtransfer/store/disk/tier.py) with scripted failures and delays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from baton.kvtransfer.store.disk.base import Miss, Refusal
from baton.kvtransfer.store.disk.records import Block, RecordFault, StorageBroken, WriteFault
from baton.kvtransfer.store.disk.tier import PAUSE_S, REOPEN_AFTER_S, SAVE_AT, RecordTier
from baton.node.errors import SettingsError
from baton.testing.memory_records import MemoryRecords
from baton.tests.unit.kvtransfer.store.disk.tier_checks import (
    BLOCK_BYTES,
    Changes,
    Clock,
    fill,
    held,
    key,
    put,
    read,
)

PATIENCE_S = 60.0


class Gate:
    """Stops each thread that comes until it is opened."""

    def __init__(self) -> None:
        self._arrived, self._go = threading.Event(), threading.Event()
        self.stopped: list[str] = []

    def stop(self) -> None:
        self.stopped.append(threading.current_thread().name)
        self._arrived.set()
        assert self._go.wait(PATIENCE_S)

    def wait_for_one(self) -> None:
        assert self._arrived.wait(PATIENCE_S)

    def open(self) -> None:
        self._go.set()


class Scripted(MemoryRecords):
    """Records in memory. `fail[call]` is raised by that call, every time; `stop[call]` stops it before it begins.

    `kept` outlives it, as a disk does; `calls` are the calls that ended it, over all that were opened.
    """

    def __init__(self, blocks: int, kept: dict[bytes, int], calls: list[str]) -> None:
        super().__init__(blocks * BLOCK_BYTES, BLOCK_BYTES)
        self.fail: dict[str, Exception] = {}
        self.stop: dict[str, Gate] = {}
        self.kept = kept
        self.calls = calls

    def _enter(self, call: str) -> None:
        if call in self.stop:
            self.stop[call].stop()
        if call in self.fail:
            raise self.fail[call]

    def load(self) -> list[tuple[bytes, int]]:
        self._enter("load")
        return list(self.kept.items())

    def read(self, key: bytes, into: memoryview) -> bytes:
        self._enter("read")
        return super().read(key, into)

    def write(self, key: bytes, block: Block, tick: int, victims: Sequence[bytes], ticks: Mapping[bytes, int]) -> None:
        self._enter("write")
        super().write(key, block, tick, victims, ticks)
        self.kept.update({**ticks, key: tick})

    def remove(self, keys: Sequence[bytes]) -> None:
        self._enter("remove")
        super().remove(keys)
        for each in keys:
            self.kept.pop(each, None)

    def note(self, ticks: Mapping[bytes, int]) -> None:
        self._enter("note")
        self.kept.update(ticks)

    def close(self) -> None:
        self._enter("close")
        self.calls.append("close")

    def abandon(self) -> None:
        self.calls.append("abandon")

    def discard(self) -> None:
        self.calls.append("discard")
        self.kept.clear()


class World:
    """A tier of `blocks` blocks, and all that it stands on."""

    def __init__(self, blocks: int = 4, first: Mapping[str, Exception] | None = None) -> None:
        """`first`: how the first storage fails."""
        self.clock, self.changes = Clock(), Changes()
        self.kept: dict[bytes, int] = {}
        self.calls: list[str] = []
        self.opened: list[Scripted] = []
        self.blocks = blocks
        self.cannot_open: Exception | None = None
        self._first = dict(first or {})
        self.tier = RecordTier("scripted", BLOCK_BYTES, self._open, self.changes, self.clock)

    def _open(self) -> Scripted:
        if self.cannot_open is not None:
            raise self.cannot_open
        self.opened.append(Scripted(self.blocks, self.kept, self.calls))
        if len(self.opened) == 1:
            self.opened[0].fail.update(self._first)
        return self.opened[-1]

    @property
    def records(self) -> Scripted:
        return self.opened[-1]

    def refusals(self) -> dict[str, int]:
        return {reason.value: count for reason, count in self.tier.stats().refusals.items() if count}

    def misses(self) -> dict[str, int]:
        return {reason.value: count for reason, count in self.tier.stats().misses.items() if count}

    def evictions(self) -> dict[str, int]:
        return {reason.value: count for reason, count in self.tier.stats().evictions.items() if count}


class Running:
    """A call in a thread of its own."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.result: object = None

        def run() -> None:
            self.result = function(*arguments)

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def end(self) -> Any:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        return self.result


def wait_until(condition: Callable[[], bool]) -> None:
    """For another thread to have come to a place where it cannot tell."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.001)


def full_of(faults: str) -> WriteFault:
    return WriteFault(Refusal(faults), "a test")


# ---- writes that fail


def test_after_a_failed_write_writing_pauses_and_reading_goes_on() -> None:
    """Guards against asking a full disk for every block, and against reads that fail for its sake."""
    world = World()
    fill(world.tier, range(4))
    world.records.fail["write"] = full_of("io_error")
    assert not put(world.tier, 9)
    assert not put(world.tier, 8)
    assert world.refusals() == {"io_error": 1, "paused": 1}
    assert held(world.tier) == set(range(4)), "the victims of a write that failed are held on"
    world.records.fail.clear()
    assert not put(world.tier, 9)
    world.clock.now_s += PAUSE_S
    fill(world.tier, [9])
    assert world.changes.held() == set(world.tier.keys()) == {key(number) for number in (1, 2, 3, 9)}


def test_a_full_storage_gets_more_room_once() -> None:
    """Guards against a refusal where old blocks could go, and against an empty cache after many."""
    world = World(blocks=40)
    fill(world.tier, range(30))
    world.records.fail["write"] = full_of("full")
    for _ in range(3):
        assert not put(world.tier, 99)
    assert world.refusals() == {"full": 1, "paused": 2}
    assert world.evictions() == {"quota": 1}
    assert world.changes.held() == set(world.tier.keys())
    assert len(world.tier.keys()) == 29


def test_uses_that_a_write_could_not_save_are_saved_later() -> None:
    """Guards the order of use over a restart after a fault."""
    world = World()
    fill(world.tier, range(3))
    assert read(world.tier, 0)
    world.records.fail["write"] = full_of("io_error")
    assert not put(world.tier, 9)
    world.records.fail.clear()
    world.tier.close()
    assert sorted(world.kept, key=lambda each: world.kept[each]) == [key(1), key(2), key(0)]


def test_many_uses_are_saved_without_a_write() -> None:
    """Guards a tier that is only read against a restart."""
    world = World(blocks=SAVE_AT)
    fill(world.tier, range(SAVE_AT))
    before = dict(world.kept)
    for number in range(SAVE_AT - 1):
        assert read(world.tier, number)
    assert world.kept == before
    assert read(world.tier, SAVE_AT - 1)
    assert set(world.kept) == set(before) and min(world.kept.values()) > max(before.values())


def test_a_removal_that_fails_is_a_removal() -> None:
    """Guards against serving what was dropped because the disk did not hear of it."""
    world = World()
    fill(world.tier, range(2))
    world.records.fail["remove"] = full_of("io_error")
    world.tier.drop([key(0)])
    assert not read(world.tier, 0) and world.misses() == {"absent": 1}


# ---- records that cannot be read


@pytest.mark.parametrize("miss", [Miss.CORRUPT, Miss.TRUNCATED, Miss.FOREIGN, Miss.IO_ERROR])
def test_a_record_that_cannot_be_read_goes(miss: Miss) -> None:
    """Guards against reading a bad record at every turn of a conversation."""
    world = World()
    fill(world.tier, range(2))
    world.records.fail["read"] = RecordFault(miss)
    assert not read(world.tier, 0)
    world.records.fail.clear()
    assert not read(world.tier, 0) and read(world.tier, 1)
    assert world.misses() == {miss.value: 1, "absent": 1}
    assert world.evictions() == {"fault": 1} and set(world.kept) == {key(1)}


# ---- a storage that breaks


@pytest.mark.parametrize("call", ["read", "write", "remove", "note"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_broken_storage_is_opened_anew(call: str, keep: bool) -> None:
    """Guards against a tier that is out of service for ever, or that keeps what is broken, or loses what is good."""
    world = World()
    fill(world.tier, range(3))
    world.records.fail[call] = StorageBroken(Miss.TRUNCATED, "a test", keep=keep)
    if call == "read":
        assert not read(world.tier, 0)
        assert world.misses() == {"truncated": 1}
    elif call == "write":
        assert not put(world.tier, 3)
        assert world.refusals() == {"io_error": 1}
    elif call == "remove":
        world.tier.drop([key(2)])
    else:
        world.tier._change(world.records, lambda: world.records.note({}))
    assert world.tier.stats().capacity_blocks == 0 and world.changes.held() == set()
    assert world.evictions().get("discarded", 0) == (0 if keep else 3 - (call == "remove"))
    before = world.misses().get("io_error", 0)
    assert not read(world.tier, 1) and world.misses()["io_error"] == before + 1
    assert not put(world.tier, 5), "not so soon"
    world.clock.now_s += max(PAUSE_S, REOPEN_AFTER_S)
    fill(world.tier, [5])
    assert world.calls == ["abandon" if keep else "discard"] and len(world.opened) == 2
    assert world.tier.contains([key(1)]) == [keep]
    assert world.changes.held() == set(world.tier.keys())


def test_a_storage_that_broke_in_a_write_is_opened_as_soon_as_another() -> None:
    """Guards against the longer pause after a write that failed, where a storage was lost."""
    world = World()
    world.records.fail["write"] = StorageBroken(Miss.IO_ERROR, "gone")
    assert not put(world.tier, 1)
    world.clock.now_s += REOPEN_AFTER_S
    world.tier.maintain()
    assert len(world.opened) == 2 and put(world.tier, 1)


def test_victims_of_a_write_that_broke_the_storage_are_told_of() -> None:
    """Guards the listener against blocks that are said to be held and are not."""
    world = World(blocks=2)
    fill(world.tier, range(2))
    world.records.fail["write"] = StorageBroken(Miss.CORRUPT, "a test")
    assert not put(world.tier, 2)
    assert world.changes.held() == set() and world.evictions() == {"discarded": 2}


def test_reopening_is_tried_again() -> None:
    """Guards against giving up after a disk that was away for a while."""
    world = World()
    fill(world.tier, range(2))
    world.records.fail["read"] = StorageBroken(Miss.IO_ERROR, "a test", keep=True)
    assert not read(world.tier, 0)
    world.cannot_open = SettingsError("no disk")
    for _ in range(3):
        world.clock.now_s += max(PAUSE_S, REOPEN_AFTER_S)
        assert not put(world.tier, 3)
    assert world.calls == ["abandon"], "what is broken is ended once"
    world.cannot_open = None
    world.clock.now_s += max(PAUSE_S, REOPEN_AFTER_S)
    fill(world.tier, [3])
    assert {key(0), key(1), key(3)} == set(world.tier.keys())


def test_what_cannot_be_loaded_is_begun_anew() -> None:
    """Guards the opening against a storage that breaks when it is first read."""
    world = World(first={"load": StorageBroken(Miss.CORRUPT, "a test")})
    assert world.calls == ["discard"] and len(world.opened) == 2
    fill(world.tier, range(4))
    assert held(world.tier) == set(range(4))


def test_what_can_never_be_opened_is_an_error_of_the_settings() -> None:
    """Guards against a store that starts and says that it has a disk."""

    def cannot_open() -> MemoryRecords:
        raise SettingsError("no disk")

    with pytest.raises(SettingsError, match="no disk"):
        RecordTier("scripted", BLOCK_BYTES, cannot_open)


@pytest.mark.parametrize("call", ["note", "close"])
def test_closing_a_storage_that_fails(call: str) -> None:
    """Guards the end of a process: what cannot be synced is let go, and not said to be whole."""
    world = World()
    fill(world.tier, range(2))
    world.records.fail[call] = full_of("io_error")
    world.tier.close()
    assert world.calls == ["abandon"]


# ---- threads: each step waits for the one before it


def test_what_is_read_is_not_evicted() -> None:
    """Guards against a slot that is overwritten under a reader: the next in the order goes instead."""
    world = World(blocks=2)
    fill(world.tier, range(2))
    world.records.stop["read"] = gate = Gate()
    reading = Running(read, world.tier, 0)
    gate.wait_for_one()
    fill(world.tier, [2])
    assert set(world.kept) == {key(0), key(2)}
    gate.open()
    assert reading.end() is True
    assert world.evictions() == {"quota": 1}


def test_when_all_is_read_a_put_is_refused() -> None:
    """Guards against waiting for readers, and against more blocks than the quota holds."""
    world = World(blocks=1)
    fill(world.tier, [0])
    world.records.stop["read"] = gate = Gate()
    reading = Running(read, world.tier, 0)
    gate.wait_for_one()
    assert not put(world.tier, 1) and world.refusals() == {"busy": 1}
    gate.open()
    assert reading.end() is True
    fill(world.tier, [1])


def test_what_is_dropped_while_it_is_read_goes_with_its_last_reader() -> None:
    """Guards against a record that is removed under a reader, or never."""
    world = World(blocks=2)
    fill(world.tier, range(2))
    world.records.stop["read"] = gate = Gate()
    readings = [Running(read, world.tier, 0) for _ in range(2)]
    wait_until(lambda: len(gate.stopped) == 2)
    world.tier.drop([key(0)])
    assert world.tier.contains([key(0)]) == [False] and key(0) in world.kept
    assert not put(world.tier, 0) and world.refusals() == {"busy": 1}
    fill(world.tier, [2])
    assert set(world.kept) == {key(0), key(2)}, "it counts against the capacity until it is gone"
    gate.open()
    assert [reading.end() for reading in readings] == [True, True]
    fill(world.tier, [3])
    assert set(world.kept) == {key(2), key(3)}


def test_what_no_reader_could_remove_goes_with_the_next_write() -> None:
    """Guards against a key that is refused for ever, since a write was under way when its last reader ended."""
    world = World(blocks=3)
    fill(world.tier, range(2))
    world.records.stop.update(read=(reads := Gate()), write=(writes := Gate()))
    reading = Running(read, world.tier, 0)
    reads.wait_for_one()
    world.tier.drop([key(0)])
    writing = Running(put, world.tier, 2)
    writes.wait_for_one()
    reads.open()
    assert reading.end() is True, "it does not wait for the write"
    assert key(0) in world.kept
    writes.open()
    assert writing.end() is True
    fill(world.tier, [0])
    assert set(world.kept) == {key(0), key(1), key(2)}


def test_a_broken_storage_is_ended_when_nobody_reads_from_it() -> None:
    """Guards against unmapping memory that a thread copies from: that would be the end of the process."""
    world = World()
    fill(world.tier, range(2))
    world.records.stop["read"] = gate = Gate()
    reading = Running(read, world.tier, 0)
    gate.wait_for_one()
    world.records.fail["write"] = StorageBroken(Miss.CORRUPT, "a test")
    assert not put(world.tier, 3)
    world.clock.now_s += max(PAUSE_S, REOPEN_AFTER_S)
    assert not put(world.tier, 3) and world.calls == []
    gate.open()
    assert reading.end() is True
    world.clock.now_s += max(PAUSE_S, REOPEN_AFTER_S)
    fill(world.tier, [3])
    assert world.calls == ["discard"] and world.changes.held() == {key(3)}


def test_a_write_that_ends_after_its_storage_broke_holds_nothing() -> None:
    """Guards against a block that is said to be held in a storage that is gone."""
    world = World(blocks=2)
    fill(world.tier, range(2))
    world.records.stop["write"] = gate = Gate()
    writing = Running(put, world.tier, 2)
    gate.wait_for_one()
    world.records.fail["read"] = StorageBroken(Miss.CORRUPT, "a test")
    assert not read(world.tier, 1)
    gate.open()
    writing.end()
    assert world.tier.keys() == [] and world.changes.held() == set()
    stats = world.tier.stats()
    assert stats.stored - sum(stats.evictions.values()) == stats.blocks == 0, world.evictions()


def test_closing_waits_for_readers() -> None:
    """Guards against unmapping memory under a reader."""
    world = World()
    fill(world.tier, range(2))
    world.records.stop["read"] = gate = Gate()
    reading = Running(read, world.tier, 0)
    gate.wait_for_one()
    closing = Running(world.tier.close)
    wait_until(lambda: world.tier.keys() == [])
    assert world.calls == []
    gate.open()
    assert reading.end() is True
    closing.end()
    assert world.calls == ["close"]
