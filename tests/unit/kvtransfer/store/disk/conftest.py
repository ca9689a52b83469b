"""Every kind of tier, opened the same way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.kvtransfer.store.disk.lmdb_records import lmdb_tier
from baton.kvtransfer.store.disk.slab_records import slab_tier
from baton.kvtransfer.store.disk.tier import RecordTier
from baton.testing.memory_records import memory_tier
from baton.tests.unit.kvtransfer.store.disk.tier_checks import (
    BLOCK_BYTES,
    NAMESPACE,
    Opener,
    lmdb_quota,
    refuse_direct,
    slab_quota,
)


def _memory(path: Path, quota_blocks: int, **options: Any) -> RecordTier:
    return memory_tier(quota_blocks * BLOCK_BYTES, BLOCK_BYTES, **options)


def _lmdb(path: Path, quota_blocks: int, **options: Any) -> RecordTier:
    return lmdb_tier(path, NAMESPACE, BLOCK_BYTES, lmdb_quota(quota_blocks), **options)


def _slab(path: Path, quota_blocks: int, **options: Any) -> RecordTier:
    return slab_tier(path, NAMESPACE, BLOCK_BYTES, slab_quota(quota_blocks), **options)


def _slab_buffered(path: Path, quota_blocks: int, **options: Any) -> RecordTier:
    """Where the file system refuses direct I/O."""
    return _slab(path, quota_blocks, open_file=refuse_direct, **options)


OPENERS = {"memory": _memory, "lmdb": _lmdb, "slab": _slab, "slab, buffered": _slab_buffered}


@pytest.fixture(params=list(OPENERS))
def open_tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Opens a tier that has room for at least so many blocks of BLOCK_BYTES; all are closed in the end."""
    opened: list[RecordTier] = []

    def opener(quota_blocks: int, **options: Any) -> RecordTier:
        opened.append(OPENERS[request.param](tmp_path / str(len(opened)), quota_blocks, **options))
        return opened[-1]

    yield opener
    for tier in opened:
        tier.close()
