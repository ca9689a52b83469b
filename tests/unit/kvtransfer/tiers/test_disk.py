"""Guards the opening by name: namespaces and kinds side by side, each in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from kvtransfer.tiers.disk import DEFAULT_DISK, DiskKind, disk_tier
from node.errors import SettingsError
from tests.unit.kvtransfer.tiers.tier_checks import BLOCK_BYTES, DISKS, NAMESPACE, block, key

QUOTA_BYTES = 4 << 20


def test_namespaces_and_kinds_never_meet(tmp_path: Path) -> None:
    """Guards against one model's blocks in another's tier, and against a change of kind that destroys what is there."""
    assert set(get_args(DiskKind)) == set(DISKS)
    into = memoryview(bytearray(BLOCK_BYTES))
    tiers = [
        disk_tier(tmp_path, namespace, BLOCK_BYTES, QUOTA_BYTES, kind=kind)
        for namespace in (NAMESPACE, bytes(32))
        for kind in get_args(DiskKind)
    ]
    for number, tier in enumerate(tiers):
        assert tier.put(key(number), block(number))
    for number, tier in enumerate(tiers):
        assert tier.keys() == [key(number)]
        assert tier.get(key(number), into) and into == block(number)
        tier.close()
    tier = disk_tier(tmp_path, NAMESPACE, BLOCK_BYTES, QUOTA_BYTES)
    assert tier.name == DEFAULT_DISK and len(tier.keys()) == 1
    tier.close()


def test_what_cannot_work_is_said_at_the_opening(tmp_path: Path) -> None:
    """Guards against a store that starts with a disk that it cannot use."""
    with pytest.raises(SettingsError, match="too small"):
        disk_tier(tmp_path, NAMESPACE, BLOCK_BYTES, BLOCK_BYTES)
