"""Real damage to the tiers on disk: every fault is a counted miss or refusal, and what is good stays or comes back."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kvtransfer.store.disk.base import Eviction, Miss, Refusal
from baton.kvtransfer.store.disk.folder import CRASH_LOOP, Boot
from baton.kvtransfer.store.disk.lmdb_environment import PAGE_BYTES
from baton.kvtransfer.store.disk.lmdb_records import SIDE_BYTES, LmdbGeometry
from baton.kvtransfer.store.disk.record import HEADER_BYTES
from baton.kvtransfer.store.disk.tier import PAUSE_S, REOPEN_AFTER_S, RecordTier
from baton.node.errors import SettingsError
from baton.tests.unit.kvtransfer.store.disk.tier_checks import (
    BLOCK_BYTES,
    DISKS,
    NAMESPACE,
    Changes,
    Clock,
    block,
    child,
    fill,
    held,
    key,
    kill_after_filling,
    open_disk,
    put,
    read,
    run_child,
)


@pytest.fixture(params=list(DISKS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def offset_of(path: Path, number: int) -> int:
    """Where the bytes of block `number` lie in the file."""
    offset = path.read_bytes().find(block(number))
    assert offset >= 0
    return offset


def test_a_disk_without_room_for_a_larger_quota_keeps_what_it_has(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards good blocks, and the disk's last room, against a store that tries again and again to grow: openings that
    fail were taken for a crash loop, and all data was discarded."""
    tier = open_disk(kind, tmp_path, 4)
    fill(tier, range(4))
    kept = held(tier)
    tier.close()
    path = tmp_path / DISKS[kind].blocks
    size_bytes = path.stat().st_size

    def full(fd: int, offset: int, length: int) -> None:
        os.ftruncate(fd, length)  # a part of it, as some file systems do
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        for _ in range(CRASH_LOOP + 1):
            with pytest.raises(SettingsError, match="No space left"):
                open_disk(kind, tmp_path, 400)
        assert path.stat().st_size == size_bytes
    tier = open_disk(kind, tmp_path, 4)
    assert held(tier) == kept
    tier.close()


def serves(tier: RecordTier, numbers: range) -> None:
    """It works: new blocks are stored, and read."""
    fill(tier, numbers)
    assert all(read(tier, number) for number in numbers)


# ---- restarts


def test_a_restart_keeps_blocks_and_their_order(kind: str, tmp_path: Path) -> None:
    """Guards against a cold cache after each restart, and against evicting what was used last before it."""
    tier = open_disk(kind, tmp_path, 6)
    fill(tier, range(5))
    assert read(tier, 0) and read(tier, 2)
    tier.close()
    changes = Changes()
    tier = open_disk(kind, tmp_path, 6, on_change=changes)
    assert tier.keys() == [key(number) for number in (1, 3, 4, 0, 2)]
    assert changes.held() == set(tier.keys())
    assert held(tier) == set(range(5))
    tier.close()


def test_uses_are_saved_with_the_writes_that_follow(kind: str, tmp_path: Path) -> None:
    """Guards the order of use over a crash: a hit must not need a write of its own, nor be forgotten for ever."""
    tier = open_disk(kind, tmp_path, 4)
    fill(tier, range(3))
    assert read(tier, 0)
    fill(tier, [3])
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "data", copy / "data")  # as a process that dies now would leave it
    shutil.copy(tmp_path / "state.json", copy)
    tier.close()
    tier = open_disk(kind, copy, 4)
    assert tier.keys() == [key(number) for number in (1, 2, 0, 3)]
    tier.close()


def test_a_killed_process_loses_nothing(kind: str, tmp_path: Path) -> None:
    """Guards against a cache that is thrown away whenever the store is killed."""
    kill_after_filling(kind, tmp_path, 8, Boot.now().boot_id)
    tier = open_disk(kind, tmp_path, 8)
    assert held(tier) == set(range(8))
    serves(tier, range(20, 24))
    tier.close()


def test_after_a_crash_of_the_machine_only_what_can_be_checked_is_kept(kind: str, tmp_path: Path) -> None:
    """Guards against trusting pages of LMDB that were never synced; a slot is checked by itself, so slots stay."""
    kill_after_filling(kind, tmp_path, 8, "the run before")
    tier = open_disk(kind, tmp_path, 8)
    assert held(tier) == (set() if kind == "lmdb" else set(range(8)))
    assert tier.stats().misses[Miss.ABSENT] == tier.stats().queries - tier.stats().hits
    serves(tier, range(20, 24))
    tier.close()
    assert [entry.name for entry in tmp_path.glob("quarantine*")] == []


def test_after_an_end_in_order_another_run_of_the_machine_keeps_all(kind: str, tmp_path: Path) -> None:
    """Guards against a cold cache after each reboot."""
    tier = open_disk(kind, tmp_path, 4, boot=lambda: Boot("the run before", 1.0))
    fill(tier, range(4))
    tier.close()
    tier = open_disk(kind, tmp_path, 4)
    assert held(tier) == set(range(4))
    tier.close()


def test_data_that_kills_its_process_is_given_up(kind: str, tmp_path: Path) -> None:
    """Guards against a store that dies at every start, for ever, of what lies on its disk."""
    for age_s in (1.0, 2.0, 3.0):
        tier = open_disk(kind, tmp_path, 4, boot=lambda age_s=age_s: Boot("one run", age_s))
        fill(tier, range(4))
        assert tier._records is not None
        tier._records.abandon()  # as a death of the process
    tier = open_disk(kind, tmp_path, 4, boot=lambda: Boot("one run", 10.0))
    assert held(tier) == set()
    serves(tier, range(4))
    tier.close()


def test_one_process_at_a_time(kind: str, tmp_path: Path) -> None:
    """Guards against two stores that overwrite each other's slots."""
    tier = open_disk(kind, tmp_path, 4)
    with pytest.raises(SettingsError, match="used by another process"):
        open_disk(kind, tmp_path, 4)
    tier.close()
    open_disk(kind, tmp_path, 4).close()


def test_a_larger_quota_keeps_a_smaller_one_begins_anew(kind: str, tmp_path: Path) -> None:
    """Guards against losing the cache when it may grow, and against a file that is larger than its new quota."""
    tier = open_disk(kind, tmp_path, 4)
    fill(tier, range(4))
    tier.close()
    tier = open_disk(kind, tmp_path, 12)
    assert held(tier) == set(range(4))
    fill(tier, range(12))
    assert held(tier) == set(range(12))
    tier.close()
    tier = open_disk(kind, tmp_path, 3)
    assert held(tier) == set()
    assert usage(tmp_path) <= DISKS[kind].quota(3)
    tier.close()


def test_settings_that_cannot_work_are_refused(kind: str, tmp_path: Path) -> None:
    """Guards against a tier that silently stores nothing."""
    disk = DISKS[kind]
    with pytest.raises(SettingsError, match="too small"):
        disk.open(tmp_path, NAMESPACE, BLOCK_BYTES, disk.quota(1) - 4096)
    with pytest.raises(SettingsError, match="a namespace has 32 bytes"):
        disk.open(tmp_path, NAMESPACE[:31], BLOCK_BYTES, disk.quota(1))
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot use"):
        disk.open(tmp_path / "file" / "x", NAMESPACE, BLOCK_BYTES, disk.quota(1))


# ---- the quota


def usage(folder: Path) -> int:
    """Bytes of all files, as they look or as they lie on the disk, whichever is more."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(max(stat.st_size, stat.st_blocks * 512) for stat in stats)


@pytest.mark.parametrize(("block_bytes", "share"), [(4096, 0.3), (5000, 0.3), (65536, 0.7)])
def test_the_quota_holds_on_the_disk(kind: str, block_bytes: int, share: float, tmp_path: Path) -> None:
    """Guards against files that grow past the quota, and against a tier that is full before it: random order of
    eviction over three turnovers, no refusal."""
    quota_bytes = 3 << 20
    tier = DISKS[kind].open(tmp_path, NAMESPACE, block_bytes, quota_bytes)
    capacity = tier.stats().capacity_blocks
    assert share * quota_bytes < capacity * block_bytes <= quota_bytes * (0.85 if kind == "lmdb" else 1.0)
    choose = random.Random(7)
    for number in range(4 * capacity):
        if number % 3 == 0:
            tier.drop([key(choose.randrange(number + 1))])
        read(tier, choose.randrange(number + 1))
        assert put(tier, number)
        if number % 64 == 0:
            assert usage(tmp_path) <= quota_bytes
    assert usage(tmp_path) <= quota_bytes
    stats = tier.stats()
    assert sum(stats.refusals.values()) == 0
    assert stats.misses[Miss.ABSENT] == stats.queries - stats.hits > 0
    tier.close()


def test_the_whole_quota_is_taken_at_the_opening(kind: str, tmp_path: Path) -> None:
    """Guards against a disk that others fill, when blocks would be written."""
    quota_bytes = 4 << 20
    tier = DISKS[kind].open(tmp_path, NAMESPACE, BLOCK_BYTES, quota_bytes)
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if path.is_file()) > 0.9 * quota_bytes
    tier.close()


@given(st.integers(0, 1 << 42), st.integers(1, 1 << 26))
def test_lmdb_keeps_a_part_of_its_quota_free(quota_bytes: int, block_bytes: int) -> None:
    """Guards the room that LMDB needs to change what it holds: 15 %, and three records if that is more."""
    try:
        geometry = LmdbGeometry.of(quota_bytes, block_bytes)
    except SettingsError:
        return
    assert geometry.map_bytes + SIDE_BYTES <= quota_bytes
    record_bytes = -(-(16 + HEADER_BYTES + block_bytes) // PAGE_BYTES) * PAGE_BYTES
    taken_bytes = geometry.capacity_blocks * record_bytes
    assert 0 < taken_bytes <= 0.85 * geometry.map_bytes
    assert geometry.map_bytes - taken_bytes >= 3 * record_bytes + 32 * PAGE_BYTES


# ---- damage


def test_a_flipped_bit_is_a_miss(kind: str, tmp_path: Path) -> None:
    """Guards against wrong KV in a request's context: anywhere in the block, while the tier is in use."""
    tier = open_disk(kind, tmp_path, 8)
    fill(tier, range(8))
    path = tmp_path / DISKS[kind].blocks
    for number, where in enumerate((0, 1, BLOCK_BYTES // 2, BLOCK_BYTES - 1)):
        flip(path, offset_of(path, number) + where, bit=number)
    assert held(tier) == {4, 5, 6, 7}
    stats = tier.stats()
    assert (stats.misses[Miss.CORRUPT], stats.evictions[Eviction.FAULT]) == (4, 4)
    serves(tier, range(4))
    tier.close()


def test_a_flipped_bit_in_a_header_is_a_miss(kind: str, tmp_path: Path) -> None:
    """Guards the header: its digest covers it, and no field of it is believed."""
    tier = open_disk(kind, tmp_path, 3)
    fill(tier, range(3))
    tier.close()
    path = tmp_path / DISKS[kind].blocks
    at = path.read_bytes().find(b"BKV1")
    assert at >= 0
    flip(path, at + 70)  # in the tick
    tier = open_disk(kind, tmp_path, 3)
    assert len(held(tier)) == 2
    assert tier.stats().misses[Miss.CORRUPT] == 1
    tier.close()


def test_a_file_that_is_cut_short_while_in_use(kind: str, tmp_path: Path) -> None:
    """Guards against SIGBUS, which would end the store, and against a tier that stays out of service for ever."""
    clock, changes = Clock(), Changes()
    tier = open_disk(kind, tmp_path, 20, clock=clock, on_change=changes)
    fill(tier, range(20))
    path = tmp_path / DISKS[kind].blocks
    os.truncate(path, 5 * BLOCK_BYTES)
    assert not read(tier, 19)
    assert tier.stats().misses[Miss.TRUNCATED] == 1
    put(tier, 30)
    clock.now_s += max(REOPEN_AFTER_S, PAUSE_S)
    serves(tier, range(30, 40))
    for number in range(20):
        read(tier, number)
    assert changes.held() == set(tier.keys())
    misses = tier.stats().misses  # where later writes made the file longer again, there are zeros: corrupt
    assert misses[Miss.TRUNCATED] + misses[Miss.CORRUPT] + misses[Miss.ABSENT] == sum(misses.values())
    tier.close()


@pytest.mark.parametrize("size", [0, 1, 4096, 3 * BLOCK_BYTES, 30 * BLOCK_BYTES])
@pytest.mark.parametrize("file", ["blocks", "index"])
def test_a_file_that_was_cut_short(kind: str, file: str, size: int, tmp_path: Path) -> None:
    """Guards the opening: no size of file may end the process, nor make the folder useless."""
    tier = open_disk(kind, tmp_path, 60)
    fill(tier, range(60))
    tier.close()
    os.truncate(tmp_path / getattr(DISKS[kind], file), size)
    tier = open_disk(kind, tmp_path, 60)
    found = held(tier)
    if kind == "slab" and file == "index":
        assert found == set(range(60))
    serves(tier, range(60))
    tier.close()


@pytest.mark.parametrize("file", ["blocks", "index"])
def test_a_file_full_of_garbage(kind: str, file: str, tmp_path: Path) -> None:
    """Guards the opening against what is no data of ours at all."""
    tier = open_disk(kind, tmp_path, 8)
    fill(tier, range(8))
    tier.close()
    path = tmp_path / getattr(DISKS[kind], file)
    path.write_bytes(random.Random(3).randbytes(path.stat().st_size))
    tier = open_disk(kind, tmp_path, 8)
    assert held(tier) == (set(range(8)) if kind == "slab" and file == "index" else set())
    serves(tier, range(8))
    tier.close()


@pytest.mark.parametrize("text", [b"", b"{", b"null", b'{"format": 1}', b"\xff" * 100])
def test_an_unreadable_state_begins_anew(kind: str, text: bytes, tmp_path: Path) -> None:
    """Guards against trusting data of which nothing is known."""
    tier = open_disk(kind, tmp_path, 4)
    fill(tier, range(4))
    tier.close()
    (tmp_path / "state.json").write_bytes(text)
    tier = open_disk(kind, tmp_path, 4)
    assert held(tier) == set()
    serves(tier, range(4))
    tier.close()


def test_the_folder_of_another_namespace_begins_anew(kind: str, tmp_path: Path) -> None:
    """Guards against one model's KV in another's context, when folders are mixed up."""
    tier = open_disk(kind, tmp_path, 4)
    fill(tier, range(4))
    tier.close()
    disk = DISKS[kind]
    tier = disk.open(tmp_path, bytes(32), BLOCK_BYTES, disk.quota(4))
    assert held(tier) == set()
    tier.close()


def test_data_of_another_namespace_is_a_miss(kind: str, tmp_path: Path) -> None:
    """Guards the records themselves: the files were exchanged, and the folder does not know."""
    disk = DISKS[kind]
    for name, namespace in (("ours", NAMESPACE), ("theirs", bytes(32))):
        tier = disk.open(tmp_path / name, namespace, BLOCK_BYTES, disk.quota(4))
        fill(tier, range(4))
        tier.close()
    shutil.rmtree(tmp_path / "ours" / "data")
    shutil.copytree(tmp_path / "theirs" / "data", tmp_path / "ours" / "data")
    tier = open_disk(kind, tmp_path / "ours", 4)
    assert held(tier) == set()
    assert tier.stats().misses[Miss.FOREIGN] == 4
    serves(tier, range(4))
    tier.close()


def test_a_full_disk(kind: str, tmp_path: Path) -> None:
    """Guards against an error, a lost read, or a tier that never writes again: the system refuses to write any byte."""
    run_child(
        """
        import resource
        from baton.kvtransfer.store.disk.tier import PAUSE_S
        def allow(size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        clock = Clock()
        tier = open_disk(sys.argv[1], Path(sys.argv[2]), 8, clock=clock)
        fill(tier, range(8))
        for size in (0, 16384):
            allow(size)
            assert not put(tier, 20)
            assert not put(tier, 21)
            assert held(tier) <= set(range(8)) and len(held(tier)) >= 6, held(tier)
            assert tier.drop([key(7)]) is None
            allow(resource.RLIM_INFINITY)
            assert not put(tier, 22)
            clock.now_s += PAUSE_S
            fill(tier, range(30, 34))
            assert held(tier) >= set(range(30, 34))
            fill(tier, range(8))
        stats = tier.stats()
        refusals = {reason.value: count for reason, count in stats.refusals.items() if count}
        assert refusals.pop("paused") == 4 and sum(refusals.values()) == 2, refusals
        assert sum(stats.misses.values()) == stats.misses["absent"], stats.misses
        tier.close()
        """,
        *(kind, tmp_path),
    )
    tier = open_disk(kind, tmp_path, 8)
    assert set(range(8)) <= held(tier) | {7}
    tier.close()


def test_a_disk_without_room_for_the_quota(kind: str, tmp_path: Path) -> None:
    """Guards against a quota that is only found to be impossible when the disk is full."""
    run_child(
        """
        import resource
        from baton.node.errors import SettingsError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        try:
            DISKS[sys.argv[1]].open(Path(sys.argv[2]), NAMESPACE, BLOCK_BYTES, 8 << 20)
        except SettingsError as error:
            assert "too large" in str(error), error
        else:
            raise SystemExit("it opened")
        """,
        *(kind, tmp_path),
    )
    tier = open_disk(kind, tmp_path, 8)
    serves(tier, range(8))
    tier.close()


def test_a_reader_from_outside_that_is_killed(kind: str, tmp_path: Path) -> None:
    """Guards against a snapshot that is never ended: its pages are wanted back when the reader is dead, and while it
    lives nothing worse happens than refusals."""
    clock = Clock()
    tier = open_disk(kind, tmp_path, 30, clock=clock)
    fill(tier, range(30))
    reader = child(
        """
        import lmdb
        environment = lmdb.open(sys.argv[1], readonly=True, max_dbs=2)
        txn = environment.begin()
        print(txn.id(), flush=True)
        sys.stdin.read()
        """,
        (tmp_path / DISKS[kind].index).parent,
    )
    assert reader.stdout is not None and reader.stdout.readline()
    for number in range(100, 180):
        put(tier, number)
    stats = tier.stats()
    assert stats.refusals[Refusal.FULL] > 0
    assert stats.refusals[Refusal.IO_ERROR] == 0
    held_before = tier.keys()
    assert all(tier.get(held_key, memoryview(bytearray(BLOCK_BYTES))) for held_key in held_before)
    reader.kill()
    reader.wait(60)
    clock.now_s += PAUSE_S
    fill(tier, range(200, 300))
    tier.close()
