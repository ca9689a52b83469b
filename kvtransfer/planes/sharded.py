"""A data plane between two workers whose ranks each have a pool: a chunk is fanned out over pairs of ranks.

Each rank has an end of some other plane over the units of its pool or, where workers may have stages, over the layers
of these units. The plan (kvtransfer.reshard) says which units and layers a rank gets from which rank of the peer, for
any two sizes; a chunk has moved when all its pieces have. The first piece that fails fails the chunk, which is reported
once no other piece can touch a block any more. Ends know ranks by the name of their worker and their number, stage by
stage, and pieces by ids that both workers derive from the chunk's.

Where ends make checksums of the units that they receive, the digest of a chunk is made of these. That of a chunk that
came by layers is over the sums of layers, which stages can make apart from one another. So the plane makes it, not the
receiver, whose digests are over units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from baton.kvtransfer.blocks.checksum import digest_of_sums
from baton.kvtransfer.planes.base import ChunkKey, IoDone, Plane
from baton.kvtransfer.planes.ledger import check_posting
from baton.kvtransfer.reshard import Cut, Piece, RankId, reshard
from baton.node.host import host_identity
from baton.node.messages.transfer import PlaneAddress

MAX_RANKS = 64
LayersDigest = Callable[[Sequence[int]], bytes]
"""Of blocks of the local pool: over the sums of the layers of their units, in order (blocks.checksum)."""
TRANSFER_ID_BYTES = 16


class RankAddresses(msgspec.Struct, frozen=True):
    """What a sharded plane's address says."""

    total_units: int
    num_layers: int
    ranks: tuple[PlaneAddress, ...]
    """Of all stages, one behind the other."""
    stages: int = 1


class PieceIo(NamedTuple):
    """A piece's operation at the end of one of the local ranks."""

    end: int
    key: ChunkKey


@dataclass(slots=True)
class ChunkIo:
    """A posted chunk."""

    key: ChunkKey
    sending: bool
    pieces: dict[PieceIo, Piece]
    waiting: set[PieceIo]
    """Pieces that have not ended."""
    stopping: set[PieceIo] = field(default_factory=set)
    """Pieces that were cancelled, since another has failed."""
    reason: str = ""
    """Of the first failure."""
    blocks: tuple[int, ...] = ()
    """Of the local pool, that a receive fills."""
    sums: dict[PieceIo, bytes] = field(default_factory=dict)
    """Checksums of what has been received, of the ends that made them."""


@dataclass(frozen=True, slots=True)
class RankPeer:
    """A connected worker."""

    address: PlaneAddress
    sends: tuple[Piece, ...]
    receives: tuple[Piece, ...]
    cut: Cut


def rank_name(worker: str, end: int) -> str:
    """The identity of the end of a rank, which have numbers over all stages."""
    return f"{worker}/{end}"


class ShardedPlane:
    """One end. `ends`: of the local ranks in order, stage by stage, with identities of `rank_name`; each over its units
    or, with `layers_digest`, over the layers of its units, which only such peers reach."""

    def __init__(
        self, cut: Cut, num_blocks: int, ends: Sequence[Plane], layers_digest: LayersDigest | None = None
    ) -> None:
        by_layer = layers_digest is not None
        stages = len(cut.layers)
        if len(ends) != cut.ranks * stages or cut != Cut.even(cut.total_units, cut.ranks, cut.num_layers, stages):
            raise ValueError(f"{len(ends)} ends for {cut.ranks} ranks in stages of layers {cut.layers}")
        if stages > 1 and not by_layer:
            raise ValueError(f"whole units, of which each of {stages} stages has some layers")
        self.name = f"{ends[0].name}_{'layers' if by_layer else 'ranks'}"
        self._by_layer, self._layers_digest = by_layer, layers_digest
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
        address = RankAddresses(self._cut.total_units, self._cut.num_layers, ranks, len(self._cut.layers))
        return PlaneAddress(plane=self.name, host=host_identity(), address=msgspec.json.encode(address).decode())

    def reaches(self, peer: PlaneAddress) -> bool:
        """Whether each rank reaches those that it gets pieces from."""
        addresses, cut = self._read(peer)
        if cut is None:
            return False
        pairs = {(_end(self._cut, piece.target), _end(cut, piece.source)) for piece in reshard(cut, self._cut)}
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
        found = RankPeer(address, reshard(self._cut, cut), reshard(cut, self._cut), cut)
        pairs = {(_end(self._cut, piece.source), _end(cut, piece.target)) for piece in found.sends}
        pairs |= {(_end(self._cut, piece.target), _end(cut, piece.source)) for piece in found.receives}
        for own, theirs in sorted(pairs):
            self._ends[own].connect(rank_name(peer, theirs), addresses[theirs])
        self._peers[peer] = found

    def post_send(self, peer: str, key: ChunkKey, blocks: Sequence[int]) -> None:
        check_posting(self._num_blocks, blocks)
        found = self._peers.get(peer)
        if found is None:
            self._ended.append(IoDone(key, sending=True, ok=False, reason=f"{peer} is not connected"))
            return
        chunk = self._begin(key, True, [(_end(self._cut, piece.source), piece) for piece in found.sends])
        for io, piece in chunk.pieces.items():
            name = rank_name(peer, _end(found.cut, piece.target))
            self._ends[io.end].post_send(name, io.key, self._source_rows(self._cut, piece, blocks))

    def post_receive(self, peer: str, key: ChunkKey, source: Sequence[int], blocks: Sequence[int]) -> None:
        check_posting(self._num_blocks, blocks, source)
        found = self._peers.get(peer)
        if found is None:
            self._ended.append(IoDone(key, sending=False, ok=False, reason=f"{peer} is not connected"))
            return
        pieces = [(_end(self._cut, piece.target), piece) for piece in found.receives]
        chunk = self._begin(key, False, pieces, blocks)
        for io, piece in chunk.pieces.items():
            name = rank_name(peer, _end(found.cut, piece.source))
            theirs, own = self._source_rows(found.cut, piece, source), self._target_rows(piece, blocks)
            self._ends[io.end].post_receive(name, io.key, theirs, own)

    def poll(self) -> list[IoDone]:
        for number, end in enumerate(self._ends):
            for done in end.poll():
                self._on_piece(PieceIo(number, done.key), done)
        for chunk in self._chunks:
            chunk.stopping = {piece for piece in chunk.stopping if not self._is_idle(piece)}
            if not chunk.waiting and not chunk.stopping:
                self._ended.append(self._done(chunk))
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
            for number in range(_num_ends(found.cut) if found is not None else 0):
                end.forget(rank_name(peer, number))

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

    def _source_rows(self, cut: Cut, piece: Piece, blocks: Sequence[int]) -> list[int]:
        """The piece of these blocks in the pool of the rank of `cut` that has it."""
        layers = range(piece.source_layer, piece.source_layer + piece.num_layers)
        return self._rows(cut, piece.source, blocks, piece.source_unit, piece.num_units, layers)

    def _target_rows(self, piece: Piece, blocks: Sequence[int]) -> list[int]:
        """The same in the pool of the local rank that needs it."""
        layers = range(piece.target_layer, piece.target_layer + piece.num_layers)
        return self._rows(self._cut, piece.target, blocks, piece.target_unit, piece.num_units, layers)

    def _rows(
        self, cut: Cut, rank: RankId, blocks: Sequence[int], first_unit: int, num_units: int, layers: range
    ) -> list[int]:
        """The numbers of these units of each block in a rank's pool of units, or of their layers in that of layers."""
        per_block, per_unit = len(cut.units(rank.rank)), len(cut.layers[rank.stage])
        firsts = [block * per_block + first_unit for block in blocks]
        if not self._by_layer:
            return [unit for first in firsts for unit in range(first, first + num_units)]
        units = np.add.outer(np.array(firsts, dtype=np.int64), np.arange(num_units))  # of many rows
        rows: list[int] = np.add.outer(units * per_unit, np.arange(layers.start, layers.stop)).ravel().tolist()
        return rows

    def _begin(
        self, key: ChunkKey, sending: bool, pieces: Sequence[tuple[int, Piece]], blocks: Sequence[int] = ()
    ) -> ChunkIo:
        named = {PieceIo(end, piece_key(key, piece)): piece for end, piece in pieces}
        chunk = ChunkIo(key, sending, named, set(named), blocks=tuple(blocks))
        self._chunks.append(chunk)
        self._of_piece.update(dict.fromkeys(chunk.waiting, chunk))
        return chunk

    def _done(self, chunk: ChunkIo) -> IoDone:
        digest = b""
        if chunk.blocks and not chunk.reason:
            if self._layers_digest is not None:
                digest = self._layers_digest(chunk.blocks)
            elif len(chunk.sums) == len(chunk.pieces):
                digest = self._units_digest(chunk)
        return IoDone(chunk.key, chunk.sending, ok=not chunk.reason, reason=chunk.reason, digest=digest)

    def _units_digest(self, chunk: ChunkIo) -> bytes:
        """Of the sums of all units, in order; of several copies that of the first rank counts, as in RankPools."""
        units: dict[int, npt.NDArray[np.uint64]] = {}  # [num_blocks]
        for io, piece in chunk.pieces.items():
            rows = np.frombuffer(chunk.sums[io], dtype=np.uint64).reshape(len(chunk.blocks), piece.num_units)
            first = self._cut.units(piece.target.rank).start + piece.target_unit
            for unit, sums in enumerate(rows.T, first):
                units.setdefault(unit, sums)
        return digest_of_sums([np.stack([units[unit] for unit in sorted(units)], axis=1).tobytes()])

    def _on_piece(self, piece: PieceIo, done: IoDone) -> None:
        chunk = self._of_piece.pop(piece, None)
        if chunk is None:
            return  # it was cancelled
        chunk.waiting.discard(piece)
        if done.sums:
            chunk.sums[piece] = done.sums
        if not done.ok:
            chunk.reason = f"rank {piece.end}: {done.reason}"
            for other in chunk.waiting:
                self._stop(other)
            chunk.stopping, chunk.waiting = chunk.stopping | chunk.waiting, set()

    def _stop(self, piece: PieceIo) -> None:
        self._of_piece.pop(piece, None)
        self._ends[piece.end].cancel(piece.key.transfer_id)

    def _is_idle(self, piece: PieceIo) -> bool:
        return self._ends[piece.end].idle(piece.key.transfer_id)

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
            ranks, left = divmod(len(read.ranks), read.stages)
            if left or (read.stages > 1 and not self._by_layer):
                return (), None
            return read.ranks, Cut.even(read.total_units, ranks, read.num_layers, read.stages)
        except (msgspec.MsgspecError, ValueError, ZeroDivisionError):
            return (), None


def piece_key(key: ChunkKey, piece: Piece) -> ChunkKey:
    """Names the movement of a piece of a chunk; the same at both workers. Its transfer id is its own, so that an end
    can cancel it alone."""
    ranks = f"{piece.source.stage} {piece.source.rank} {piece.target.stage} {piece.target.rank}"
    names = f"{key.seq} {key.retry} {ranks} {piece.source_unit} {piece.source_layer}"
    transfer_id = blake2b(names.encode(), key=key.transfer_id, digest_size=TRANSFER_ID_BYTES).digest()
    return ChunkKey(transfer_id, key.seq, key.retry)


def _end(cut: Cut, rank: RankId) -> int:
    """The number of a rank's end over all stages."""
    return rank.stage * cut.ranks + rank.rank


def _num_ends(cut: Cut) -> int:
    return cut.ranks * len(cut.layers)
