"""A stage's end of a data plane, on the stage's host, as the first stage's ShardedPlane has it: it sends only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from baton.kvtransfer.blocks.runs import common_runs
from baton.kvtransfer.planes.base import ChunkKey, IoDone
from baton.kvtransfer.planes.ledger import check_posting
from baton.node.addresses import is_address
from baton.node.errors import InvariantBroken
from baton.node.messages.transfer import PlaneAddress
from baton.worker.stages.remote.messages import (
    PeerForgotten,
    PeerKnown,
    PieceCancel,
    PieceEnded,
    PieceIdle,
    PieceSend,
    StageMessage,
)


class RemotePlaneEnd:
    """planes.base.Plane. `take` may be called by any thread; the rest by the plane's owner."""

    pulls = False

    def __init__(self, address: PlaneAddress, num_rows: int, send: Callable[[StageMessage], None]) -> None:
        """address, num_rows: of the end and of its pool."""
        self.name = address.plane
        self._address, self._num_rows, self._send = address, num_rows, send
        self._peers: dict[str, PlaneAddress] = {}
        self._posted: dict[ChunkKey, str] = {}
        self._stopping: set[bytes] = set()
        """Transfers that were cancelled, and may still read the pool."""
        self._ended: list[IoDone] = []
        self._inbox: deque[PieceEnded | PieceIdle] = deque()

    def take(self, message: PieceEnded | PieceIdle) -> None:
        """What the stage has said."""
        self._inbox.append(message)

    def describe(self) -> PlaneAddress:
        return self._address

    def reaches(self, peer: PlaneAddress) -> bool:
        return peer.plane == self.name and is_address(peer.address)

    def connect(self, peer: str, address: PlaneAddress) -> None:
        if self._peers.get(peer) != address:
            self._peers[peer] = address
            self._send(PeerKnown(peer=peer, address=address))

    def post_send(self, peer: str, key: ChunkKey, blocks: Sequence[int]) -> None:
        check_posting(self._num_rows, blocks)
        if peer not in self._peers:
            self._ended.append(IoDone(key, sending=True, ok=False, reason="the peer is not connected"))
            return
        self._posted[key] = peer
        runs = tuple((run.source, run.length) for run in common_runs(blocks, range(len(blocks))))
        self._send(PieceSend(peer=peer, transfer_id=key.transfer_id, seq=key.seq, retry=key.retry, runs=runs))

    def post_receive(self, peer: str, key: ChunkKey, source: Sequence[int], blocks: Sequence[int]) -> None:
        raise InvariantBroken("KV comes to a stage of a prefill worker")

    def poll(self) -> list[IoDone]:
        self._take_in()
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, transfer_id: bytes) -> None:
        self._take_in()
        self._ended = [done for done in self._ended if done.key.transfer_id != transfer_id]
        posted = [key for key in self._posted if key.transfer_id == transfer_id]
        for key in posted:
            del self._posted[key]
        if posted:
            self._stopping.add(transfer_id)
            self._send(PieceCancel(transfer_id=transfer_id))

    def idle(self, transfer_id: bytes) -> bool:
        self._take_in()
        return transfer_id not in self._stopping and all(key.transfer_id != transfer_id for key in self._posted)

    def forget(self, peer: str) -> None:
        """Its sends end as the stage says."""
        if self._peers.pop(peer, None) is not None:
            self._send(PeerForgotten(peer=peer))

    @property
    def pending(self) -> bool:
        return bool(self._posted or self._stopping or self._ended)

    def sockets(self) -> list[object]:
        return []

    def close(self) -> None:
        for peer in list(self._peers):
            self.forget(peer)
        self._posted.clear()
        self._stopping.clear()
        self._ended.clear()

    def _take_in(self) -> None:
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, PieceIdle):
                self._stopping.discard(message.transfer_id)
                continue
            key = ChunkKey(message.transfer_id, message.seq, message.retry)
            if self._posted.pop(key, None) is not None:
                self._ended.append(IoDone(key, sending=True, ok=not message.reason, reason=message.reason))
