"""What is posted at one end of a plane, and what has ended and was not reported yet. Every plane keeps one of these."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from baton.kvtransfer.blocks.checksum import digest_of_sums
from baton.kvtransfer.planes.base import ChunkKey, IoDone
from baton.node.errors import InvariantBroken


class Receive(NamedTuple):
    """A posted receive: the only peer that may fill which blocks of the local pool."""

    peer: str
    blocks: tuple[int, ...]


class IoLedger:
    """Pure bookkeeping; a key is posted for receiving at most once at a time."""

    def __init__(self) -> None:
        self._receives: dict[ChunkKey, Receive] = {}
        self._ended: list[IoDone] = []

    def post_receive(self, peer: str, key: ChunkKey, blocks: Sequence[int]) -> None:
        if key in self._receives:
            raise InvariantBroken(f"receive {key} is posted twice")
        self._receives[key] = Receive(peer, tuple(blocks))

    def receive(self, key: ChunkKey) -> Receive | None:
        """The posted receive of this name."""
        return self._receives.get(key)

    def receiving(self, transfer_id: bytes) -> bool:
        """Whether a receive of this transfer is posted."""
        return any(key.transfer_id == transfer_id for key in self._receives)

    def end_receive(self, key: ChunkKey, reason: str = "", sums: bytes = b"") -> None:
        """A posted receive has all its bytes, with these checksums, or, with a reason, has failed."""
        del self._receives[key]
        digest = digest_of_sums([sums]) if sums else b""
        self._ended.append(IoDone(key, sending=False, ok=not reason, reason=reason, digest=digest, sums=sums))

    def end_send(self, key: ChunkKey, reason: str = "") -> None:
        """A send needs its blocks no more or, with a reason, has failed."""
        self._ended.append(IoDone(key, sending=True, ok=not reason, reason=reason))

    def cancel(self, transfer_id: bytes) -> None:
        """Drop all of a transfer; nothing of it will be reported."""
        for key in [key for key in self._receives if key.transfer_id == transfer_id]:
            del self._receives[key]
        self._ended = [done for done in self._ended if done.key.transfer_id != transfer_id]

    def forget(self, peer: str, but: Collection[ChunkKey] = ()) -> None:
        """Fail all receives posted for `peer`, except those that may still be written to."""
        for key in [key for key, receive in self._receives.items() if receive.peer == peer and key not in but]:
            self.end_receive(key, "the peer is gone")

    def clear(self) -> None:
        self._receives.clear()
        self._ended.clear()

    def report(self) -> list[IoDone]:
        """What has ended since the last report."""
        ended, self._ended = self._ended, []
        return ended


def check_posting(num_blocks: int, blocks: Sequence[int], source: Sequence[int] | None = None) -> None:
    """Raise InvariantBroken unless `blocks` names one or more blocks of the local pool, and `source` as many."""
    if not blocks or (source is not None and len(source) != len(blocks)):
        raise InvariantBroken(f"{len(blocks)} blocks cannot be a chunk of {source and len(source)}")
    for block in (min(blocks), max(blocks)):
        if not 0 <= block < num_blocks:
            raise InvariantBroken(f"block {block} is posted in a pool of {num_blocks}")
