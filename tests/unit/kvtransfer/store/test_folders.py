"""kvtransfer.store.folders: a bound on the models with blocks on disk; folders in use are never removed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from baton.kvtransfer.store.disk.base import Tier, ignore_change
from baton.kvtransfer.store.folders import MAX_FOLDERS, Folders
from baton.node.errors import SettingsError

BLOCK_BYTES = 4096
QUOTA_BYTES = 1 << 20


def _space(number: int) -> bytes:
    return bytes([number]) * 32


def _age(path: Path, number: int) -> None:
    """Set the folder's last opening to second `number`."""
    os.utime(path / _space(number).hex() / "state.json", (number, number))


@pytest.mark.parametrize("backend", ["slab", "lmdb"])
def test_the_folder_opened_longest_ago_is_removed_unless_in_use(tmp_path: Path, backend: str) -> None:
    """Guards the disk against models that are no longer served, and served models against removal."""
    (tmp_path / "letters").mkdir()  # not a folder of the store
    folders = Folders(tmp_path, backend, QUOTA_BYTES, ignore_change)
    in_use: Tier = folders.open(_space(1), BLOCK_BYTES)
    _age(tmp_path, 1)
    for number in range(2, MAX_FOLDERS + 1):
        folders.open(_space(number), BLOCK_BYTES).close()
        _age(tmp_path, number)
    folders.open(_space(9), BLOCK_BYTES).close()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"letters", *(_space(number).hex() for number in (1, *range(2, MAX_FOLDERS + 1), 9))}
    in_use.close()
    _age(tmp_path, 1)
    folders.open(_space(10), BLOCK_BYTES).close()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"letters", *(_space(number).hex() for number in (*range(3, MAX_FOLDERS + 1), 9, 10))}


def test_stored_blocks_are_found_after_reopening(tmp_path: Path) -> None:
    """Guards the folder's name: each namespace finds its own blocks and no others."""
    folders = Folders(tmp_path, "slab", QUOTA_BYTES, ignore_change)
    key, data = b"k" * 32, memoryview(os.urandom(BLOCK_BYTES))
    tier = folders.open(_space(1), BLOCK_BYTES)
    assert tier.put(key, data, b"d" * 16)
    tier.close()
    again, other = folders.open(_space(1), BLOCK_BYTES), folders.open(_space(2), BLOCK_BYTES)
    into = memoryview(bytearray(BLOCK_BYTES))
    assert again.get(key, into) and into == data and not other.get(key, into)
    again.close()
    other.close()


def test_a_path_that_is_not_a_folder_is_an_error_at_startup(tmp_path: Path) -> None:
    """Guards against a store that silently runs without its disk."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="--path"):
        Folders(tmp_path / "file", "slab", QUOTA_BYTES, ignore_change)


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    """Guards the thread that opens and mends the tiers of all models: it ended with the first model that came later."""
    path = tmp_path / "store"
    folders = Folders(path, "slab", QUOTA_BYTES, ignore_change)
    path.rmdir()
    folders.open(_space(1), BLOCK_BYTES).close()
    assert (path / _space(1).hex()).is_dir() and path.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(path)
    path.write_text("")
    with pytest.raises(SettingsError, match="--path"):
        folders.open(_space(2), BLOCK_BYTES)
