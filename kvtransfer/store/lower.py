"""What lies under the arena, as the server sees it: the disk. Its calls return at once; results come through `poll`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from baton.kvtransfer.store.arena_index import Key
from baton.node.messages.store import DigestName


@dataclass(frozen=True, slots=True)
class ReadDone:
    """A `read` has ended: the block that was written is in the view that it was given; without a digest: it is not."""

    key: Key
    digest: bytes
    """As it was written with the block: the user of the block checks it."""


@dataclass(frozen=True, slots=True)
class WriteDone:
    """A `write` has ended, one way or the other: the view that it was given is not read any more."""

    key: Key


@dataclass(frozen=True, slots=True)
class Space:
    """A namespace: all its blocks have one size and so many units, and their digests are made one way."""

    namespace: bytes
    block_bytes: int
    num_units: int
    digest: DigestName


class LowerTier(Protocol):
    """The tier under the arena. A fault in it is a counted miss."""

    def open(self, space: Space) -> None:
        """Blocks of this namespace will come; repeated: no effect."""
        ...

    def has(self, key: Key) -> bool:
        """Whether a read is worth trying."""
        ...

    def wants(self, key: Key) -> bool:
        """Called at each use of a block in RAM: whether it should be written here now."""
        ...

    def read(self, key: Key, into: memoryview) -> None:
        """Begin to fill `into`; ReadDone follows."""
        ...

    def write(self, key: Key, data: memoryview, digest: bytes) -> bool:
        """Begin to write `data` behind, if its digest is right; True: WriteDone follows, False: there is no room."""
        ...

    def drop(self, key: Key) -> None:
        """Forget this block: it is not what its digest says."""
        ...

    def poll(self) -> list[ReadDone | WriteDone]: ...

    def stats(self) -> dict[str, float]: ...

    def close(self) -> None: ...


class NoLowerTier:
    """There is no disk."""

    def open(self, space: Space) -> None: ...

    def has(self, key: Key) -> bool:
        return False

    def wants(self, key: Key) -> bool:
        return False

    def read(self, key: Key, into: memoryview) -> None:
        raise AssertionError("nothing was promised here")

    def write(self, key: Key, data: memoryview, digest: bytes) -> bool:
        return False

    def drop(self, key: Key) -> None: ...

    def poll(self) -> list[ReadDone | WriteDone]:
        return []

    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...
