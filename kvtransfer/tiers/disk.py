"""The tier on disk, by name. `slab` is the default: faster in the benchmark of both (docs/benchmarks/tiers.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kvtransfer.tiers.base import Changed, Tier, ignore_change
from kvtransfer.tiers.lmdb_records import lmdb_tier
from kvtransfer.tiers.slab_records import slab_tier

DiskKind = Literal["slab", "lmdb"]
DEFAULT_DISK: DiskKind = "slab"


def disk_tier(
    root: Path,
    namespace: bytes,
    block_bytes: int,
    quota_bytes: int,
    on_change: Changed = ignore_change,
    kind: DiskKind = DEFAULT_DISK,
) -> Tier:
    """The blocks of one namespace, in a folder of their own below `root`; other kinds' and namespaces' stay there.

    Raises SettingsError if the folder cannot be used, another process uses it, or the quota is too small or too large
    for the disk.
    """
    open_tier = {"slab": slab_tier, "lmdb": lmdb_tier}[kind]
    return open_tier(root / namespace.hex() / kind, namespace, block_bytes, quota_bytes, on_change)
