"""Files that are removed, replaced, cut short or overwritten while a tier has them open, and disks that stop to work.

Every fault is a counted miss or refusal, none ends the process (so each runs in one of its own), and the tier is in use
again afterwards without a restart.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.kvtransfer.store.disk.tier import PAUSE_S, REOPEN_AFTER_S, RecordTier
from baton.tests.unit.kvtransfer.store.disk.tier_checks import (
    DISKS,
    Changes,
    Clock,
    fill,
    held,
    open_disk,
    put,
    run_child,
)

NUM_BLOCKS = 20
MEANWHILE = range(40, 44)
AFTERWARDS = range(60, 70)


def remove(path: Path) -> None:
    path.unlink()


def remove_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


def move_away(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def replace_by_garbage(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(random.Random(1).randbytes(path.stat().st_size))
    new.replace(path)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero(path: Path) -> None:
    size_bytes = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size_bytes)


def zero_beyond_the_first_pages(path: Path) -> None:
    size_bytes = path.stat().st_size
    os.truncate(path, 2 * 4096)
    os.truncate(path, size_bytes)


def overwrite_by_garbage(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(random.Random(2).randbytes(path.stat().st_size))


def overwrite_by_ones(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)


DAMAGES: dict[str, Callable[[Path], None]] = {
    damage.__name__: damage
    for damage in (
        *(remove, remove_folder, move_away, replace_by_garbage, cut_to_nothing, cut_in_half),
        *(zero, zero_beyond_the_first_pages, overwrite_by_garbage, overwrite_by_ones),
    )
}


def look_after(tier: RecordTier, clock: Clock) -> None:
    """As the store does every few seconds, until a pause and a time out of service are over."""
    for _ in range(2):
        tier.maintain()
        clock.now_s += max(REOPEN_AFTER_S, PAUSE_S)
    tier.maintain()


def survive(kind: str, file: str, damage: str, folder: Path) -> None:
    """Damage a file of a tier that is in use: it must serve again, and keep what it is given from then on."""
    clock, changes = Clock(), Changes()
    tier = open_disk(kind, folder, NUM_BLOCKS, clock=clock, on_change=changes)
    fill(tier, range(NUM_BLOCKS))
    DAMAGES[damage](folder / getattr(DISKS[kind], file))
    held(tier)
    for number in MEANWHILE:
        put(tier, number)
    look_after(tier, clock)
    assert tier.stats().capacity_blocks >= NUM_BLOCKS, "it is out of service"
    fill(tier, AFTERWARDS)
    assert held(tier) >= set(AFTERWARDS)
    held(tier)
    assert changes.held() == set(tier.keys())
    stats = tier.stats()
    assert stats.queries == stats.hits + sum(stats.misses.values())
    tier.close()
    tier = open_disk(kind, folder, NUM_BLOCKS)
    assert held(tier) >= set(AFTERWARDS)
    tier.close()


@pytest.mark.parametrize(("kind", "file"), [("lmdb", "index"), ("slab", "index"), ("slab", "blocks")])
def test_a_file_that_is_damaged_in_use(kind: str, file: str, tmp_path: Path) -> None:
    """Guards against SIGBUS, against a tier that is out of service for ever, and against blocks written to a file that
    is not there any more."""
    run_child(
        """
        from baton.tests.unit.kvtransfer.store.disk.test_damage_in_use import DAMAGES, survive
        kind, file, folder = sys.argv[1:]
        for damage in DAMAGES:
            print(damage, file=sys.stderr)
            survive(kind, file, damage, Path(folder) / damage)
        """,
        *(kind, file, tmp_path),
    )


@pytest.mark.parametrize("kind", list(DISKS))
def test_a_folder_that_cannot_be_used_for_a_while(kind: str, tmp_path: Path) -> None:
    """Guards a tier whose disk went away, and comes back: it misses and refuses meanwhile, then serves again."""
    clock, folder = Clock(), tmp_path / "folder"
    tier = open_disk(kind, folder, NUM_BLOCKS, clock=clock)
    fill(tier, range(NUM_BLOCKS))
    shutil.rmtree(folder)
    folder.touch()
    for _ in range(3):
        look_after(tier, clock)
        assert held(tier) == set() and not put(tier, 0)
    folder.unlink()
    look_after(tier, clock)
    fill(tier, range(NUM_BLOCKS))
    tier.close()
    tier = open_disk(kind, folder, NUM_BLOCKS)
    assert held(tier) == set(range(NUM_BLOCKS))
    tier.close()


@pytest.mark.parametrize("damage", ["remove", "cut_to_nothing"])
@pytest.mark.parametrize(("kind", "file"), [("lmdb", "data/data.mdb"), ("slab", "data/slots")])
def test_damage_is_found_without_a_read_or_write(kind: str, file: str, damage: str, tmp_path: Path) -> None:
    """Guards a store that has no requests for the disk against a disk that is not there when they come."""
    clock = Clock()
    tier = open_disk(kind, tmp_path, NUM_BLOCKS, clock=clock)
    fill(tier, range(NUM_BLOCKS))
    DAMAGES[damage](tmp_path / file)
    tier.maintain()
    assert tier.stats().capacity_blocks == 0 and tier.keys() == []
    clock.now_s += REOPEN_AFTER_S
    tier.maintain()
    fill(tier, range(NUM_BLOCKS))
    assert held(tier) >= set(range(NUM_BLOCKS))
    tier.close()


def test_a_lost_index_loses_no_block(tmp_path: Path) -> None:
    """Guards a cache of terabytes against the loss of its smallest file: the slots say what they hold."""
    clock = Clock()
    tier = open_disk("slab", tmp_path, NUM_BLOCKS, clock=clock)
    fill(tier, range(NUM_BLOCKS))
    remove(tmp_path / DISKS["slab"].index)
    look_after(tier, clock)
    assert held(tier) == set(range(NUM_BLOCKS))
    tier.close()


def test_the_table_of_readers_is_removed_or_cut(tmp_path: Path) -> None:
    """Guards LMDB's second file, which it maps too."""
    for number, damage in enumerate((remove, cut_to_nothing)):
        clock = Clock()
        tier = open_disk("lmdb", tmp_path / str(number), NUM_BLOCKS, clock=clock)
        fill(tier, range(NUM_BLOCKS))
        damage(tmp_path / str(number) / "data" / "lock.mdb")
        assert held(tier) == set()
        look_after(tier, clock)
        fill(tier, AFTERWARDS)
        assert held(tier) >= set(AFTERWARDS)
        tier.close()
