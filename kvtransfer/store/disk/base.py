"""What a caller knows of a tier: blocks of one namespace, all of one size, under their 32-byte hash; and its figures.

A tier is a cache. Whatever goes wrong inside (disk full, bits flipped, file gone) is a counted miss or a counted
refusal, never an exception; only opening one with settings that cannot work raises SettingsError, and a key, a digest
or a buffer of the wrong length ValueError, which is a bug of the caller's.

Calls block for as long as the storage takes, so they belong in a thread. Any thread may make any call at any time:
reads run beside each other and beside a write, writes run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

KEY_BYTES = 32
DIGEST_BYTES = 16
"""Of a block's own digest, which its owner makes and checks; a tier only keeps it."""


class Miss(StrEnum):
    """Why a `get` found nothing."""

    ABSENT = "absent"
    CORRUPT = "corrupt"  # the digest or the header does not fit
    TRUNCATED = "truncated"  # fewer bytes than a record has
    IO_ERROR = "io_error"  # the storage failed, or is out of service
    FOREIGN = "foreign"  # a record of another namespace


class Refusal(StrEnum):
    """Why a `put` stored nothing."""

    FULL = "full"  # no room, though old blocks were evicted: a reader from outside holds them, or the disk is full
    IO_ERROR = "io_error"
    PAUSED = "paused"  # soon after one of the above: writing is not tried, reading goes on
    BUSY = "busy"  # what would have to go is being read
    CLOSED = "closed"


class Eviction(StrEnum):
    """Why a block left."""

    QUOTA = "quota"  # the least recently used, to make room
    DROPPED = "dropped"  # the caller asked
    FAULT = "fault"  # its record could not be read
    DISCARDED = "discarded"  # the whole storage could not be trusted any more, and was begun anew


@dataclass(frozen=True, slots=True)
class TierStats:
    """A tier's figures since it was opened. Times are seconds inside successful reads (verified) and writes."""

    queries: int
    hits: int
    misses: Mapping[Miss, int]
    read_bytes: int
    read_s: float
    stored: int
    refusals: Mapping[Refusal, int]
    written_bytes: int
    write_s: float
    evictions: Mapping[Eviction, int]
    blocks: int
    capacity_blocks: int
    """0 while the storage is out of service."""


Changed = Callable[[bytes, bool], None]
"""Called for each key that came (True) or left (False), in order, from the thread that caused it. It must return at
once and call no tier: it puts the change into an inbox."""


def ignore_change(key: bytes, held: bool) -> None:
    """Follows nothing."""


class Tier(Protocol):
    """Blocks of one namespace on disk or in memory."""

    name: str
    block_bytes: int

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of them are held, as far as is known without reading; no query is counted."""
        ...

    def get(self, key: bytes, into: memoryview) -> bytes | None:
        """Fill `into` (uint8 [block_bytes], writable) with the block, verified to be what was put; its digest.

        None: a miss, and `into` undefined.
        """
        ...

    def put(self, key: bytes, data: memoryview, digest: bytes) -> bool:
        """Hold a copy of `data` (uint8 [block_bytes], unchanged meanwhile), evicting others. True: it is held now."""
        ...

    def drop(self, keys: Sequence[bytes]) -> None:
        """Forget these, held or not."""
        ...

    def keys(self) -> list[bytes]:
        """All that are held, least recently used first."""
        ...

    def stats(self) -> TierStats: ...

    def maintain(self) -> None:
        """Called every few seconds: find damage that no other call has met, and be in service again after it."""
        ...

    def close(self) -> None:
        """Make what is held last until the next opening. Later calls miss or refuse."""
        ...


def check_keys(keys: Sequence[bytes]) -> None:
    for key in keys:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")


def check_digest(digest: bytes) -> None:
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}")


def check_buffer(buffer: memoryview, block_bytes: int) -> None:
    if buffer.nbytes != block_bytes or not buffer.c_contiguous:
        raise ValueError(f"{buffer.nbytes} bytes for a block of {block_bytes}, contiguous={buffer.c_contiguous}")
