"""Every kind of tier, opened the same way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvtransfer.tiers.memory import memory_tier
from kvtransfer.tiers.tier import RecordTier
from tests.unit.kvtransfer.tiers.tier_checks import BLOCK_BYTES, Opener


def _memory(quota_blocks: int, **options: object) -> RecordTier:
    return memory_tier(quota_blocks * BLOCK_BYTES, BLOCK_BYTES, **options)  # type: ignore[arg-type]


OPENERS = {"memory": _memory}


@pytest.fixture(params=list(OPENERS))
def open_tier(request: pytest.FixtureRequest) -> Iterator[Opener]:
    """Opens a tier that has room for at least so many blocks of BLOCK_BYTES; all are closed in the end."""
    opened: list[RecordTier] = []

    def opener(quota_blocks: int, **options: object) -> RecordTier:
        opened.append(OPENERS[request.param](quota_blocks, **options))
        return opened[-1]

    yield opener
    for tier in opened:
        tier.close()
