"""Guards the judgement of what lies in a folder: what may be trusted, and that what may not is gone from the disk."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from baton.kvtransfer.store.disk.folder import CRASH_LOOP, CRASH_WINDOW_S, Boot, Contents, TierFolder, Trust
from baton.node.errors import SettingsError

CONTENTS = Contents("slab", bytes(32), 4096, 1 << 20)
BOOT = Boot("this run", 1000.0)


@contextmanager
def used(path: Path, contents: Contents = CONTENTS, boot: Boot = BOOT, *, end: bool = False) -> Iterator[TierFolder]:
    """A user of the folder that puts a file into it, and ends in order or not."""
    folder = TierFolder(path, contents, boot)
    try:
        folder.begin()
        yield folder
        (folder.data / "file").write_bytes(b"blocks")
        if end:
            folder.end()
    finally:
        folder.close()


def trust(path: Path, contents: Contents = CONTENTS, boot: Boot = BOOT) -> Trust:
    folder = TierFolder(path, contents, boot)
    folder.close()
    assert (folder.trust is Trust.EMPTY) is (list(folder.data.iterdir()) == [])
    assert [each.name for each in path.iterdir() if each.name.startswith("quarantine")] == []
    return folder.trust


@pytest.mark.parametrize("end", [False, True])
def test_the_same_run_of_the_machine_trusts(end: bool, tmp_path: Path) -> None:
    """Guards against throwing blocks away because a process was killed."""
    assert trust(tmp_path) is Trust.EMPTY
    with used(tmp_path, end=end):
        pass
    assert trust(tmp_path) is Trust.WHOLE


@pytest.mark.parametrize("boot", [Boot("another run", 5.0), Boot("", 1000.0)])
def test_another_run_trusts_only_an_end_in_order(boot: Boot, tmp_path: Path) -> None:
    """Guards against pages that were never written out; a kernel without a boot id may have been any."""
    with used(tmp_path, end=True):
        pass
    assert trust(tmp_path, boot=boot) is Trust.WHOLE
    with used(tmp_path, boot=replace(BOOT, boot_id="")):
        pass
    assert trust(tmp_path, boot=boot) is Trust.MIXED
    with used(tmp_path):
        pass
    assert trust(tmp_path, boot=boot) is Trust.MIXED


@pytest.mark.parametrize(
    ("other", "kept"),
    [
        (replace(CONTENTS, backend="lmdb"), False),
        (replace(CONTENTS, namespace=bytes(31) + b"1"), False),
        (replace(CONTENTS, block_bytes=8192), False),
        (replace(CONTENTS, quota_bytes=CONTENTS.quota_bytes - 1), False),
        (replace(CONTENTS, quota_bytes=CONTENTS.quota_bytes + 1), True),
    ],
)
def test_other_data_is_set_aside(other: Contents, kept: bool, tmp_path: Path) -> None:
    """Guards against blocks of another size or model, and files that break a smaller quota."""
    with used(tmp_path, end=True):
        pass
    assert trust(tmp_path, other) is (Trust.WHOLE if kept else Trust.EMPTY)


def test_data_without_a_state_is_set_aside(tmp_path: Path) -> None:
    """Guards against files of other programs."""
    with used(tmp_path, end=True):
        pass
    (tmp_path / "state.json").unlink()
    assert trust(tmp_path) is Trust.EMPTY


def test_a_deletion_that_was_cut_off_is_finished(tmp_path: Path) -> None:
    """Guards the quota against what an earlier process set aside and could not delete."""
    for name in ("quarantine-0", "quarantine-7"):
        (tmp_path / name / "index").mkdir(parents=True)
        (tmp_path / name / "index" / "data.mdb").write_bytes(bytes(100))
    assert trust(tmp_path) is Trust.EMPTY


def test_deaths_in_a_row_discard(tmp_path: Path) -> None:
    """Guards against data on which the process dies, again and again; deaths long ago do not count."""
    for death in range(CRASH_LOOP):
        with used(tmp_path, boot=Boot("this run", 1000.0 + death)) as folder:
            assert folder.trust is (Trust.WHOLE if death else Trust.EMPTY)
    later = Boot("this run", 1000.0 + CRASH_WINDOW_S + CRASH_LOOP)
    with used(tmp_path, boot=later) as folder:
        assert folder.trust is Trust.WHOLE
    for death in range(1, CRASH_LOOP):
        with used(tmp_path, boot=replace(later, age_s=later.age_s + death)) as folder:
            assert folder.trust is Trust.WHOLE
    assert trust(tmp_path, boot=replace(later, age_s=later.age_s + CRASH_LOOP)) is Trust.EMPTY


def test_an_end_in_order_forgives_deaths(tmp_path: Path) -> None:
    """Guards against counting deaths of which the data was not the cause."""
    for turn in range(3 * CRASH_LOOP):
        with used(tmp_path, boot=Boot("this run", 1000.0 + turn), end=turn % CRASH_LOOP == CRASH_LOOP - 1) as folder:
            assert (folder.trust is Trust.WHOLE) is (turn > 0)


def test_discarding_leaves_an_empty_folder(tmp_path: Path) -> None:
    """Guards against half-trusted rests."""
    with used(tmp_path, end=True):
        pass
    with used(tmp_path) as folder:
        folder.discard("a test")
        assert folder.trust is Trust.EMPTY and list(folder.data.iterdir()) == []


def test_a_failure_while_opening_frees_the_folder(tmp_path: Path) -> None:
    """Guards against a folder that its own process has locked for ever."""
    with pytest.raises(SettingsError, match="no space"), TierFolder.opening(tmp_path, CONTENTS, BOOT):
        with pytest.raises(SettingsError, match="another process"):
            TierFolder(tmp_path, CONTENTS, BOOT)
        raise OSError(errno.ENOSPC, "no space")
    assert trust(tmp_path) is Trust.EMPTY


def test_this_machine_has_an_age() -> None:
    """Guards the clock of the crash loop: it must go on over a restart of the process."""
    first, second = Boot.now(), Boot.now()
    assert first.boot_id == second.boot_id and 0 < first.age_s <= second.age_s
