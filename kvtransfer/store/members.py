"""The workers that are attached to a store, and the lookups and puts that each has open.

Blocks that are held for them are the arena index's; a worker that was silent for LEASE_S is the caller's to remove.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.kvtransfer.store.arena_index import Holder, Key

LEASE_S = 5.0
MAX_MEMBERS = 4096
MAX_OPEN = 4096
MAX_OPEN_BLOCKS = 1 << 18
"""Lookups and puts of one worker, and blocks in them; more are answered with nothing found and nothing granted."""
MAX_BLOCKS_OF_ALL = 1 << 21


@dataclass(slots=True)
class Member:
    namespace: bytes
    last_seen_at: float
    num_open: int = 0
    """Lookups and puts that it has not released."""
    num_blocks: int = 0
    """In them."""


@dataclass(slots=True)
class OpenRequest:
    """A lookup or a put between its beginning and its release."""

    keys: tuple[Key, ...]
    first: int
    peers: dict[Key, str]
    """Which peer has which block, of those that are not here."""


class Members:
    """Attached workers by name, and their open requests by holder."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self._requests: dict[Holder, OpenRequest] = {}
        self._num_blocks = 0  # in the requests

    def __len__(self) -> int:
        return len(self._members)

    def get(self, peer: str) -> Member | None:
        return self._members.get(peer)

    def has_room(self, peer: str) -> bool:
        return peer in self._members or len(self._members) < MAX_MEMBERS

    def attach(self, peer: str, namespace: bytes, now: float) -> bool:
        """The worker begins anew, with nothing open; whether it was not attached."""
        new = peer not in self._members
        self._drop_requests(peer)
        self._members[peer] = Member(namespace, now)
        return new

    def detach(self, peer: str) -> None:
        del self._members[peer]
        self._drop_requests(peer)

    def silent(self, now: float) -> list[str]:
        return [peer for peer, member in self._members.items() if now - member.last_seen_at > LEASE_S]

    def open(self, holder: Holder, request: OpenRequest) -> bool:
        """False if the number is in use, or the worker has too many."""
        member = self._members[holder.owner]
        blocks = len(request.keys)
        if holder in self._requests or member.num_open >= MAX_OPEN:
            return False
        if member.num_blocks + blocks > MAX_OPEN_BLOCKS or self._num_blocks + blocks > MAX_BLOCKS_OF_ALL:
            return False
        member.num_open += 1
        member.num_blocks += blocks
        self._num_blocks += blocks
        self._requests[holder] = request
        return True

    def request(self, holder: Holder) -> OpenRequest | None:
        return self._requests.get(holder)

    def close(self, holder: Holder) -> None:
        """Nothing happens if it is not open."""
        if (request := self._requests.pop(holder, None)) is not None:
            member = self._members[holder.owner]
            member.num_open -= 1
            member.num_blocks -= len(request.keys)
            self._num_blocks -= len(request.keys)

    def _drop_requests(self, peer: str) -> None:
        for holder in [holder for holder in self._requests if holder.owner == peer]:
            self._num_blocks -= len(self._requests.pop(holder).keys)
