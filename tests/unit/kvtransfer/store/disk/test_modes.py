"""KV and the state of a store are their owner's alone, whatever umask the process was started with."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.kvtransfer.store.disk.folder import Boot, Contents, TierFolder
from baton.node.private_files import private_opener
from baton.tests.unit.kvtransfer.store.disk.tier_checks import Opener


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


def test_files_of_a_tier_are_private(open_tier: Opener, tmp_path: Path) -> None:
    """Guards prompts, which KV gives away, against other users of the host."""
    open_tier(4)
    for path, mode in modes(tmp_path).items():
        assert mode == (0o700 if (tmp_path / path).is_dir() else 0o600), path


def test_the_state_of_a_folder_is_private(tmp_path: Path) -> None:
    """Guards the record of what is to be trusted."""
    folder = TierFolder(tmp_path / "a", Contents("slab", bytes(32), 4096, 1 << 20), Boot("run", 1.0))
    folder.begin()
    folder.end()
    folder.close()
    found = modes(tmp_path / "a")
    assert found.pop("data") == 0o700 and set(found.values()) == {0o600} and "state.json" in found


def test_a_private_file_is_private(tmp_path: Path) -> None:
    """Guards logs, which name requests, and state."""
    with open(tmp_path / "log", "ab", opener=private_opener):
        pass
    assert modes(tmp_path) == {"log": 0o600}
