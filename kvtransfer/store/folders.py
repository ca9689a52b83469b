"""The folder of the store on disk: one folder in it for each namespace, of which only so many are kept.

    PATH/<namespace as hex>/     a tier's own (disk/folder.py)

A model that is served no more leaves its folder behind; beyond MAX_FOLDERS the one that was opened longest ago goes,
unless a process uses it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
from pathlib import Path

from baton.kvtransfer.store.disk.base import Changed, Tier
from baton.kvtransfer.store.disk.lmdb_records import lmdb_tier
from baton.kvtransfer.store.disk.slab_records import slab_tier
from baton.node.errors import SettingsError
from baton.node.telemetry import log_event

logger = logging.getLogger("store")

MAX_FOLDERS = 4
BACKENDS = {"slab": slab_tier, "lmdb": lmdb_tier}
_NAME = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Folders:
    """Opens the tiers of one store: each of at most `quota_bytes`, `on_change` called for what they gain and lose."""

    def __init__(self, path: Path, backend: str, quota_bytes: int, on_change: Changed) -> None:
        """Raises SettingsError if the folder cannot be made or written."""
        self._path = path
        self._open = BACKENDS[backend]
        self._quota_bytes = quota_bytes
        self._on_change = on_change
        self._found()
        if not os.access(path, os.W_OK | os.X_OK):
            raise SettingsError(f"--path {path}: cannot be written")

    def open(self, namespace: bytes, block_bytes: int) -> Tier:
        """The tier of a namespace. Raises SettingsError if it cannot be had."""
        folder = self._path / namespace.hex()
        self._make_room(folder)
        return self._open(folder, namespace, block_bytes, self._quota_bytes, self._on_change)

    def _found(self) -> list[Path]:
        """What lies in the folder, which is made if it is not there: others may remove it while the store runs."""
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            return [*self._path.iterdir()]
        except OSError as error:
            raise SettingsError(f"--path {self._path}: {error.strerror}") from None

    def _make_room(self, wanted: Path) -> None:
        others = [each for each in self._found() if _NAME.fullmatch(each.name) and each != wanted]
        others.sort(key=_opened_at)
        for folder in others[: max(0, len(others) + 1 - MAX_FOLDERS)]:
            if _remove(folder):
                log_event(logger, "old_namespace_removed", namespace=folder.name[:12])


def _opened_at(folder: Path) -> float:
    """The time of the mark that each opening makes; 0 for a folder without."""
    try:
        return (folder / "state.json").stat().st_mtime
    except OSError:
        return 0.0


def _remove(folder: Path) -> bool:
    """Delete a namespace's folder; False if it is in use."""
    try:
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
