"""A data plane between two workers whose ranks each have a pool: a chunk is fanned out over pairs of ranks.

Each rank has an end of some other plane over the units of its pool. The plan (kvtransfer.reshard) says which units a
rank gets from which rank of the peer, for any two sizes; a chunk has moved when all its pieces have. The first piece
that fails fails the chunk, which is reported once no other piece can touch a block any more. Ends know ranks by the
name of their worker and their number, and pieces by ids that both workers derive from the chunk's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from typing import NamedTuple

import msgspec

from baton.kvtransfer.planes.base import ChunkKey, IoDone, Plane
from baton.kvtransfer.planes.ledger import check_posting
from baton.kvtransfer.reshard import Cut, Piece, reshard
from baton.node.host import host_identity
from baton.node.messages.transfer import PlaneAddress

MAX_RANKS = 64
TRANSFER_ID_BYTES = 16


class RankAddresses(msgspec.Struct, frozen=True):
    """What a sharded plane's address says."""

    total_units: int
    num_layers: int
    ranks: tuple[PlaneAddress, ...]


class PieceIo(NamedTuple):
    """A piece's operation at the end of one of the local ranks."""

    rank: int
    key: ChunkKey


@dataclass(slots=True)
class ChunkIo:
    """A posted chunk."""

    key: ChunkKey
    sending: bool
    waiting: set[PieceIo] = field(default_factory=set)
    """Pieces that have not ended."""
    stopping: set[PieceIo] = field(default_factory=set)
    """Pieces that were cancelled, since another has failed."""
    reason: str = ""
    """Of the first failure."""


@dataclass(frozen=True, slots=True)
class RankPeer:
    """A connected worker."""

    address: PlaneAddress
    sends: tuple[Piece, ...]
    receives: tuple[Piece, ...]
    num_ranks: int


def rank_name(worker: str, rank: int) -> str:
    """The identity of a rank's end."""
    return f"{worker}/{rank}"


class ShardedPlane:
    """One end. `ends`: of the local ranks in order, each over its units, with an identity of `rank_name`."""

    def __init__(self, cut: Cut, num_blocks: int, ends: Sequence[Plane]) -> None:
        if len(ends) != cut.ranks or len(cut.layers) != 1:
            raise ValueError(f"{len(ends)} ends for {cut.ranks} ranks in {len(cut.layers)} stages")
        self.name = f"{ends[0].name}_ranks"
        self.pulls = ends[0].pulls
        self._cut, self._num_blocks, self._ends = cut, num_blocks, tuple(ends)
        self._peers: dict[str, RankPeer] = {}
        self._chunks: list[ChunkIo] = []
        self._of_piece: dict[PieceIo, ChunkIo] = {}
        self._stopping: dict[bytes, set[PieceIo]] = {}
        """By transfer, cancelled pieces that may still touch a block."""
        self._ended: list[IoDone] = []

    def describe(self) -> PlaneAddress:
        ranks = tuple(end.describe() for end in self._ends)
        address = RankAddresses(self._cut.total_units, self._cut.num_layers, ranks)
        return PlaneAddress(plane=self.name, host=host_identity(), address=msgspec.json.encode(address).decode())

    def reaches(self, peer: PlaneAddress) -> bool:
        """Whether each rank reaches those that it gets pieces from."""
        addresses, cut = self._read(peer)
        if cut is None:
            return False
        pairs = {(piece.target.rank, piece.source.rank) for piece in reshard(cut, self._cut)}
        return all(self._ends[own].reaches(addresses[theirs]) for own, theirs in pairs)

    def connect(self, peer: str, address: PlaneAddress) -> None:
        known = self._peers.get(peer)
        if known is not None and known.address == address:
            return
        if known is not None:
            self.forget(peer)
        addresses, cut = self._read(address)
        if cut is None:
            return
        found = RankPeer(address, reshard(self._cut, cut), reshard(cut, self._cut), cut.ranks)
        pairs = {(piece.source.rank, piece.target.rank) for piece in found.sends}
        pairs |= {(piece.target.rank, piece.source.rank) for piece in found.receives}
        for own, theirs in sorted(pairs):
            self._ends[own].connect(rank_name(peer, theirs), addresses[theirs])
        self._peers[peer] = found

    def post_send(self, peer: str, key: ChunkKey, blocks: Sequence[int]) -> None:
        check_posting(self._num_blocks, blocks)
        found = self._peers.get(peer)
        if found is None:
            self._ended.append(IoDone(key, sending=True, ok=False, reason=f"{peer} is not connected"))
            return
        chunk = self._begin(key, True, [(piece.source.rank, piece) for piece in found.sends])
        for piece in found.sends:
            source = _rows(blocks, len(self._cut.units(piece.source.rank)), piece.source_unit, piece.num_units)
            end, name = self._ends[piece.source.rank], rank_name(peer, piece.target.rank)
            end.post_send(name, piece_key(chunk.key, piece), source)

    def post_receive(self, peer: str, key: ChunkKey, source: Sequence[int], blocks: Sequence[int]) -> None:
        check_posting(self._num_blocks, blocks, source)
        found = self._peers.get(peer)
        if found is None:
            self._ended.append(IoDone(key, sending=False, ok=False, reason=f"{peer} is not connected"))
            return
        theirs = Cut.even(self._cut.total_units, found.num_ranks, self._cut.num_layers)
        chunk = self._begin(key, False, [(piece.target.rank, piece) for piece in found.receives])
        for piece in found.receives:
            rows = _rows(source, len(theirs.units(piece.source.rank)), piece.source_unit, piece.num_units)
            own = _rows(blocks, len(self._cut.units(piece.target.rank)), piece.target_unit, piece.num_units)
            end, name = self._ends[piece.target.rank], rank_name(peer, piece.source.rank)
            end.post_receive(name, piece_key(chunk.key, piece), rows, own)

    def poll(self) -> list[IoDone]:
        for rank, end in enumerate(self._ends):
            for done in end.poll():
                self._on_piece(PieceIo(rank, done.key), done)
        for chunk in self._chunks:
            chunk.stopping = {piece for piece in chunk.stopping if not self._is_idle(piece)}
            if not chunk.waiting and not chunk.stopping:
                self._ended.append(IoDone(chunk.key, chunk.sending, ok=not chunk.reason, reason=chunk.reason))
        self._chunks = [chunk for chunk in self._chunks if chunk.waiting or chunk.stopping]
        self._drop_idle()
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, transfer_id: bytes) -> None:
        for chunk in [chunk for chunk in self._chunks if chunk.key.transfer_id == transfer_id]:
            pieces = chunk.waiting | chunk.stopping
            for piece in chunk.waiting:
                self._stop(piece)
            self._stopping.setdefault(transfer_id, set()).update(pieces)
            self._chunks.remove(chunk)
        self._ended = [done for done in self._ended if done.key.transfer_id != transfer_id]

    def idle(self, transfer_id: bytes) -> bool:
        self._drop_idle()
        live = any(chunk.key.transfer_id == transfer_id for chunk in self._chunks if not self._has_ended(chunk))
        return not live and transfer_id not in self._stopping

    def forget(self, peer: str) -> None:
        found = self._peers.pop(peer, None)
        for end in self._ends:
            for rank in range(found.num_ranks if found is not None else 0):
                end.forget(rank_name(peer, rank))

    @property
    def pending(self) -> bool:
        stopping = self._stopping or any(chunk.stopping for chunk in self._chunks)
        return bool(stopping or self._ended) or any(end.pending for end in self._ends)

    def sockets(self) -> list[object]:
        return list(chain.from_iterable(end.sockets() for end in self._ends))

    def close(self) -> None:
        for end in self._ends:
            end.close()
        self._peers.clear()
        self._chunks.clear()
        self._of_piece.clear()
        self._stopping.clear()
        self._ended.clear()

    # -- inside

    def _begin(self, key: ChunkKey, sending: bool, pieces: Sequence[tuple[int, Piece]]) -> ChunkIo:
        chunk = ChunkIo(key, sending, {PieceIo(rank, piece_key(key, piece)) for rank, piece in pieces})
        self._chunks.append(chunk)
        self._of_piece.update(dict.fromkeys(chunk.waiting, chunk))
        return chunk

    def _on_piece(self, piece: PieceIo, done: IoDone) -> None:
        chunk = self._of_piece.pop(piece, None)
        if chunk is None:
            return  # it was cancelled
        chunk.waiting.discard(piece)
        if not done.ok:
            chunk.reason = f"rank {piece.rank}: {done.reason}"
            for other in chunk.waiting:
                self._stop(other)
            chunk.stopping, chunk.waiting = chunk.stopping | chunk.waiting, set()

    def _stop(self, piece: PieceIo) -> None:
        self._of_piece.pop(piece, None)
        self._ends[piece.rank].cancel(piece.key.transfer_id)

    def _is_idle(self, piece: PieceIo) -> bool:
        return self._ends[piece.rank].idle(piece.key.transfer_id)

    def _has_ended(self, chunk: ChunkIo) -> bool:
        """Whether its pieces touch nothing any more, though `poll` has not reported it yet."""
        return all(self._is_idle(piece) for piece in chain(chunk.waiting, chunk.stopping))

    def _drop_idle(self) -> None:
        for transfer_id, pieces in list(self._stopping.items()):
            left = {piece for piece in pieces if not self._is_idle(piece)}
            if left:
                self._stopping[transfer_id] = left
            else:
                del self._stopping[transfer_id]

    def _read(self, address: PlaneAddress) -> tuple[tuple[PlaneAddress, ...], Cut | None]:
        """The peer's ranks and how they share the units; None: of another model, or no such address."""
        if address.plane != self.name:
            return (), None
        try:
            read = msgspec.json.decode(address.address, type=RankAddresses)
            sizes = (read.total_units, read.num_layers)
            if sizes != (self._cut.total_units, self._cut.num_layers) or len(read.ranks) > MAX_RANKS:
                return (), None
            return read.ranks, Cut.even(read.total_units, len(read.ranks), read.num_layers)
        except (msgspec.MsgspecError, ValueError):
            return (), None


def piece_key(key: ChunkKey, piece: Piece) -> ChunkKey:
    """Names the movement of a piece of a chunk; the same at both workers. Its transfer id is its own, so that an end
    can cancel it alone."""
    names = f"{key.seq} {key.retry} {piece.source.rank} {piece.target.rank} {piece.source_unit}"
    transfer_id = blake2b(names.encode(), key=key.transfer_id, digest_size=TRANSFER_ID_BYTES).digest()
    return ChunkKey(transfer_id, key.seq, key.retry)


def _rows(blocks: Sequence[int], units_per_block: int, first_unit: int, num_units: int) -> list[int]:
    """The numbers of these units of each block in a pool of units."""
    return [block * units_per_block + first_unit + unit for block in blocks for unit in range(num_units)]
