"""The interface of a data plane. It moves the bytes of whole blocks; it knows no request and no role.

Two kinds stand behind it. On a *two-sided* plane (zmq, loopback, nccl) the sender posts a send and the receiver posts a
receive under the same key; the protocol sees to it that the receive is posted first. On a *pulling* plane (shm,
cuda_ipc) the receiver copies out of the sender's pool, `post_send` has nothing to do, and the protocol asks the sender
afterwards whether its lease held during the copy. One thread owns a plane and makes all calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from baton.node.messages.transfer import PlaneAddress


class ChunkKey(NamedTuple):
    """Names one movement of one chunk; a retry is a new movement."""

    transfer_id: bytes
    seq: int
    retry: int


@dataclass(frozen=True, slots=True)
class IoDone:
    """A posted operation ended. A receive with ok=True has written every byte it was posted for (not compared)."""

    key: ChunkKey
    sending: bool
    ok: bool
    reason: str = ""
    digest: bytes = b""
    """Of the blocks that a receive has written, where the plane made it on the way; else the receiver makes it."""
    sums: bytes = b""
    """Checksums of the units that a receive has written, in order, where the plane made them on the way."""


class Plane(Protocol):
    """One end of a data plane, of one pool. No call blocks for longer than a copy takes."""

    name: str
    pulls: bool

    def describe(self) -> PlaneAddress:
        """What a peer must know to use this end."""
        ...

    def reaches(self, peer: PlaneAddress) -> bool:
        """Whether this end can work with that one (same plane, same host, the peer's memory can be opened ...)."""
        ...

    def connect(self, peer: str, address: PlaneAddress) -> None:
        """Make ready for `peer` (an endpoint identity). Repeated with the same address: no effect."""
        ...

    def post_send(self, peer: str, key: ChunkKey, blocks: Sequence[int]) -> None:
        """Send these blocks of the local pool; they must stay unchanged until the peer's protocol lets them go."""
        ...

    def post_receive(self, peer: str, key: ChunkKey, source: Sequence[int], blocks: Sequence[int]) -> None:
        """Fill these blocks of the local pool from the peer's blocks `source` (same length)."""
        ...

    def poll(self) -> list[IoDone]:
        """Advance, and return what has ended since the last call. Cancelled operations are not reported."""
        ...

    def cancel(self, transfer_id: bytes) -> None:
        """Stop all operations of a transfer: when this returns and `idle` says so, its blocks are touched no more."""
        ...

    def idle(self, transfer_id: bytes) -> bool:
        """Whether no operation of this transfer can touch the local pool any more."""
        ...

    def forget(self, peer: str) -> None:
        """The peer is gone: fail its posted operations (reported by `poll`) and free what was held for it."""
        ...

    @property
    def pending(self) -> bool:
        """Whether `poll` should be called again within a millisecond or so, though no socket becomes readable."""
        ...

    def sockets(self) -> list[object]:
        """ZeroMQ sockets to wait on besides polling (empty if there is none)."""
        ...

    def close(self) -> None: ...


def choose(own: Sequence[Plane], peer: Sequence[PlaneAddress]) -> Plane | None:
    """The first of our own planes, by preference, that reaches a peer which described its ends as `peer`; or None."""
    for plane in own:
        for address in peer:
            if address.plane == plane.name and plane.reaches(address):
                return plane
    return None
