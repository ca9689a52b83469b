"""Guards what only the slab does: its file, with direct I/O or without, and an index made again from headers."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kvtransfer.store.disk.base import Miss
from baton.kvtransfer.store.disk.folder import Boot
from baton.kvtransfer.store.disk.record import HEADER_BYTES
from baton.kvtransfer.store.disk.records import RecordFault
from baton.kvtransfer.store.disk.slab_index import SlabIndex, SlotPlace, index_bytes
from baton.kvtransfer.store.disk.slab_records import SCAN_WITHIN_S, SIDE_BYTES, num_slots_of
from baton.kvtransfer.store.disk.slot_file import PAGE_BYTES, SlotFile, slot_bytes
from baton.kvtransfer.store.disk.tier import PAUSE_S
from baton.node.errors import SettingsError
from baton.tests.unit.kvtransfer.store.disk.tier_checks import (
    BLOCK_BYTES,
    Clock,
    block,
    fill,
    held,
    key,
    kill_after_filling,
    open_disk,
    put,
    read,
    refuse_direct,
)

# ---- the file


def test_direct_io_is_asked_for_first(tmp_path: Path) -> None:
    """Guards against a slab that fills the page cache with what the arena holds already."""
    asked: list[bool] = []

    def open_file(path: Path, flags: int, mode: int) -> int:
        asked.append(bool(flags & os.O_DIRECT))
        return refuse_direct(path, flags, mode)

    slots = SlotFile(tmp_path / "slots", 2, BLOCK_BYTES, open_file)
    assert asked == [True, False] and not slots.direct
    slots.close()


def test_other_errors_of_opening_are_not_taken_for_a_refusal(tmp_path: Path) -> None:
    """Guards against a second try that hides the cause."""

    def forbid(path: Path, flags: int, mode: int) -> int:
        raise OSError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        SlotFile(tmp_path / "slots", 2, BLOCK_BYTES, forbid)


@pytest.mark.parametrize("block_bytes", [1, 4095, 4096, 4097, 12288])
@pytest.mark.parametrize("aligned", [True, False])
def test_slots_keep_header_and_block_apart_from_their_neighbours(
    block_bytes: int, aligned: bool, tmp_path: Path
) -> None:
    """Guards the arithmetic of pages: no size and no address of a buffer reaches into another slot."""
    slots = SlotFile(tmp_path / "slots", 3, block_bytes)

    def buffer() -> memoryview:
        offset = 0 if aligned else 3
        return memoryview(mmap.mmap(-1, block_bytes + offset))[offset:]

    for slot in (1, 0, 2, 1):
        data = buffer()
        data[:] = block(slot, block_bytes)
        slots.write(slot, bytes([slot]) * HEADER_BYTES, data)
    for slot in range(3):
        into = buffer()
        assert slots.read(slot, into) == slots.read_header(slot) == bytes([slot]) * HEADER_BYTES
        assert into == block(slot, block_bytes)
    with pytest.raises(RecordFault) as caught:
        slots.read(3, buffer())
    assert caught.value.miss is Miss.TRUNCATED
    slots.close()
    assert (tmp_path / "slots").stat().st_size == 3 * slot_bytes(block_bytes)


@given(st.integers(0, 1 << 42), st.integers(1, 1 << 26))
def test_what_a_quota_gives_is_within_it(quota_bytes: int, block_bytes: int) -> None:
    """Guards the quota for any sizes: slots, index and side files together."""
    try:
        num_slots = num_slots_of(quota_bytes, block_bytes)
    except SettingsError:
        return
    assert num_slots >= 2
    assert num_slots * slot_bytes(block_bytes) + index_bytes(num_slots) + SIDE_BYTES <= quota_bytes


# ---- the index, made again


def crash(path: Path, num_blocks: int = 8) -> None:
    """Blocks 0 to num_blocks - 1, and then the machine goes down."""
    kill_after_filling("slab", path, num_blocks, "the run before")


def test_a_torn_slot_is_a_miss_after_a_crash(tmp_path: Path) -> None:
    """Guards the slots that were being written when the machine went down: half of a block is there."""
    crash(tmp_path)
    path = tmp_path / "data" / "slots"
    with path.open("r+b") as file:
        file.seek(path.read_bytes().find(block(3)) + PAGE_BYTES)
        file.write(bytes(BLOCK_BYTES - PAGE_BYTES))
    tier = open_disk("slab", tmp_path, 8)
    assert held(tier) == {0, 1, 2, 4, 5, 6, 7}
    assert tier.stats().misses[Miss.CORRUPT] == 1
    tier.close()


def test_the_order_of_writing_survives_the_index(tmp_path: Path) -> None:
    """Guards against evicting the newest first after a crash; there may be one block more than fits."""
    crash(tmp_path)
    tier = open_disk("slab", tmp_path, 8)
    fill(tier, [20])
    assert tier.keys() == [key(number) for number in (*range(1, 8), 20)]
    tier.close()


def test_of_two_slots_under_one_key_the_later_counts(tmp_path: Path) -> None:
    """Guards against going back to a record that was removed because it was bad."""
    tier = open_disk("slab", tmp_path, 4)
    fill(tier, range(4))
    tier.drop([key(0), key(1)])
    fill(tier, [0])
    tier.close()
    path = tmp_path / "data" / "slots"
    content = path.read_bytes()
    earlier = content.find(block(0))
    assert content.find(block(0), earlier + 1) > 0, "there are two"
    with path.open("r+b") as file:
        file.seek(earlier)
        file.write(bytes(BLOCK_BYTES))
    shutil.rmtree(tmp_path / "data" / "index")
    tier = open_disk("slab", tmp_path, 4)
    assert held(tier) == {0, 2, 3}
    assert tier.stats().misses[Miss.CORRUPT] == 0
    fill(tier, range(30, 34))
    assert held(tier) == set(range(30, 34))
    tier.close()


def test_an_index_that_went_in_use_is_made_again(tmp_path: Path) -> None:
    """Guards against losing all blocks for a damaged index."""

    clock = Clock()
    tier = open_disk("slab", tmp_path, 8, clock=clock)
    fill(tier, range(6))
    os.truncate(tmp_path / "data" / "index" / "data.mdb", 4096)
    assert read(tier, 0), "reading needs no index"
    assert not put(tier, 7) and tier.keys() == []
    clock.now_s += PAUSE_S
    fill(tier, [7])
    assert held(tier) == {*range(6), 7}
    tier.close()


def test_an_old_index_is_checked_by_the_slots(tmp_path: Path) -> None:
    """Guards against a block under another's key: the index of yesterday, the slots of today."""
    tier = open_disk("slab", tmp_path, 4)
    fill(tier, range(4))
    tier.close()
    shutil.copytree(tmp_path / "data" / "index", tmp_path / "old")
    tier = open_disk("slab", tmp_path, 4)
    fill(tier, range(10, 14))
    tier.close()
    shutil.rmtree(tmp_path / "data" / "index")
    (tmp_path / "old").rename(tmp_path / "data" / "index")
    tier = open_disk("slab", tmp_path, 4)
    assert len(tier.keys()) == 4
    found = held(tier)
    assert found <= set(range(4)) and len(found) <= 1
    stats = tier.stats()
    assert stats.misses[Miss.CORRUPT] == 4 - len(found)
    fill(tier, range(20, 24))
    assert held(tier) == set(range(20, 24))
    tier.close()


def test_a_slot_that_two_keys_claim_goes_to_one(tmp_path: Path) -> None:
    """Guards against two records in one place, each overwriting the other, for as long as the index lives."""
    tier = open_disk("slab", tmp_path, 4)
    fill(tier, range(4))
    tier.close()
    index = SlabIndex(tmp_path / "data" / "index", 5)
    (slot,) = (place.slot for entry, place in index.entries() if entry == key(3))
    index.change((), {key(7): SlotPlace(slot, 99), key(8): SlotPlace(77, 100)})
    index.close()
    tier = open_disk("slab", tmp_path, 4)
    assert tier.keys() == [key(number) for number in (0, 1, 2, 7)]
    assert held(tier) == {0, 1, 2} and tier.stats().misses[Miss.CORRUPT] == 1
    fill(tier, range(20, 24))
    assert held(tier) == set(range(20, 24))
    tier.close()


def test_the_scan_ends(tmp_path: Path) -> None:
    """Guards the start of a store against hours of reading headers."""
    crash(tmp_path)
    times = iter(range(1000))
    tier = open_disk("slab", tmp_path, 8, clock=lambda: next(times) * SCAN_WITHIN_S / 5)
    assert 0 < len(tier.keys()) < 8
    fill(tier, range(20, 24))
    tier.close()


def test_a_clean_start_does_not_scan(tmp_path: Path) -> None:
    """Guards the start of a store with a good index: the slots are not looked at."""
    tier = open_disk("slab", tmp_path, 4)
    fill(tier, range(4))
    tier.close()
    os.truncate(tmp_path / "data" / "slots", 0)
    tier = open_disk("slab", tmp_path, 4, boot=Boot.now)
    assert len(tier.keys()) == 4 and held(tier) == set()
    tier.close()
